"""Large results in memory that an earlier one has left.

The C library gives memory of this size back to the system when it is freed, and the system clears
every page of it when it is asked for again, which takes several times as long as a step.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

LARGE = 2 << 20
"""Bytes from which on results are recycled; smaller ones the C library tends to keep."""

KEPT = 4
"""How many unused blocks of memory are kept."""


class Recycler:
    """Makes tensors in the memory of earlier ones that are no longer held.

    A tensor made here holds its memory by way of an array that is its alone. PyTorch lets go of the
    array when the last tensor, view or array on the memory is gone, and the block comes back then.
    """

    def __init__(self) -> None:
        self._idle: deque[Tensor] = deque(maxlen=KEPT)
        self._lent: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

    def empty_like(self, like: Tensor) -> Tensor:
        """Make `torch.empty_like(like)` on the CPU, in memory that later calls use again.

        Its storage cannot be resized.
        """
        # Of a contiguous tensor this is known, and a meta tensor takes as long as a small step.
        wanted = like if like.is_contiguous() else torch.empty_like(like, device="meta")
        block = self._block(wanted.nbytes)
        array = block.numpy()
        loan = weakref.ref(array, self._give_back)
        self._lent[id(loan)] = loan, block
        made = torch.empty(0, dtype=like.dtype, device="cpu")
        return made.set_(
            torch.from_numpy(array).untyped_storage(), 0, wanted.shape, wanted.stride()
        )

    def clear(self) -> None:
        """Drop the unused blocks."""
        self._idle.clear()

    def _block(self, size: int) -> Tensor:
        """An idle block of this size, or a new one; idle blocks of other sizes are dropped."""
        try:
            while (block := self._idle.pop()).nbytes != size:
                pass
        except IndexError:
            block = torch.empty(size, dtype=torch.uint8, device="cpu")
        return block

    def _give_back(self, loan: weakref.ref[Any]) -> None:
        _, block = self._lent.pop(id(loan))
        self._idle.append(block)


RECYCLER = Recycler()
"""The recycler of the process: one, so that the memory it keeps is bounded."""
