"""The stages of `gpucheck.table`: one module for each, with `run(record, settings)`."""
