"""The GPU check: bits, graphs, times and tools on a GPU, by one command, without network.

docs/gpu.md says how to prepare and run it. `table.py` lists its stages.
"""
