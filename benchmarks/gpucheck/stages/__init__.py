"""One module for each stage of `gpucheck.table`, with `run(record, settings)`."""
