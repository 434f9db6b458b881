"""The GPU check: bits, graphs, times and tools on a GPU, by one command, without network.

docs/gpu.md says how it is prepared and run. `table.py` lists its stages.
"""
