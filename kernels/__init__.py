"""Triton kernels, imported as `fastddim.kernels`."""

from __future__ import annotations

# From the repository root, `import kernels` finds this folder instead of PyPI's `kernels`, which
# diffusers and transformers look for. The package is then empty, and says why when it is used: a
# second copy of the modules would be worse, and an error would break code that only looks.
if __name__ != "fastddim.kernels":
    __path__.clear()

    def __getattr__(name: str) -> None:
        raise AttributeError(
            f"{name!r}: this folder is the package 'fastddim.kernels' but was imported as "
            f"{__name__!r}: use `import fastddim.kernels`, or leave the repository root to import "
            "another 'kernels'"
        )
