"""Triton kernels, imported as `fastddim.kernels`."""

from __future__ import annotations

# From the repository root `import kernels` finds this folder: a second copy of its modules, in the
# place of PyPI's `kernels`, which diffusers and transformers import where it is installed.
if __name__ != "fastddim.kernels":
    raise ImportError(
        f"this folder is the package 'fastddim.kernels' but was imported as {__name__!r}: "
        "use `import fastddim.kernels`, or leave the repository root to import another 'kernels'"
    )
