"""Tensors at addresses that every kernel is compiled for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes of the largest access of a kernel; Triton compiles other kernels where an address or a size
is no multiple of it."""


def aligned(count: int, dtype: torch.dtype) -> int:
    """The next number of elements from `count` on that ends at a multiple of `ALIGNMENT`."""
    items = ALIGNMENT // dtype.itemsize
    return -(-count // items) * items


def aligned_rows(
    count: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros `[count, *shape]` whose rows are contiguous and begin at multiples of `ALIGNMENT`.

    A tensor of its own begins at one too, so the same kernel takes any of these rows.
    """
    row = torch.empty(tuple(shape), device="meta")
    strides = (aligned(row.numel(), dtype), *row.stride())
    return torch.empty_strided((count, *shape), strides, dtype=dtype, device=device).zero_()
