"""CUDA graphs that are kept for later calls."""

from fastddim.loop.pool import POOL

__all__ = ["clear"]


def clear() -> None:
    """Free all graphs that `sample` and `invert` keep for their next calls, and their memory."""
    POOL.clear()
