"""The result of a run, in memory that is the caller's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddim.loop.buffers import row_major
from fastddim.options import Reporting
from fastddim.transforms import check_unfollowed
from fastddim.validation import check_like, check_same_dtype


def check_out(out: Tensor, state: Tensor, reporting: Reporting) -> None:
    """Refuse a tensor that a run of such states cannot write its result into."""
    if reporting.return_trajectory:
        raise ValueError("out: expected None with return_trajectory=True, got a tensor")
    check_written("out", out, state)


def check_written(name: str, out: Tensor, state: Tensor) -> None:
    """Refuse a tensor that a state cannot be written into as it is."""
    check_unfollowed(name, out)
    check_like(name, out, "the state", state)
    check_same_dtype(name, out, state.dtype)
    strides = out.stride()
    if 0 in strides and any(n > 1 for n, s in zip(out.shape, strides, strict=True) if s == 0):
        raise ValueError(f"{name}: expected memory for each element, got an expanded tensor")


def own_copy(made: Tensor, out: Tensor | None) -> Tensor:
    """A copy of a run's result, or `out` with the result in it."""
    if out is None:
        return row_major(made)
    write(made, out)
    return out


def write(made: Tensor, out: Tensor) -> None:
    """Copy into a tensor of the caller's, which may be one of inference mode."""
    if out.is_inference():
        with torch.inference_mode():
            out.copy_(made)
    else:
        out.copy_(made)
