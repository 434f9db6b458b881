"""Large results in memory that earlier results have left.

The C library returns freed memory of this size to the system, and the system clears every page when
the memory is requested again. Clearing takes several times as long as a step.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

LARGE = 2 << 20
"""The smallest size in bytes that is recycled; the C library tends to keep smaller blocks."""

KEPT = 4
"""The number of unused blocks of memory that are kept."""


class Recycler:
    """Makes tensors in the memory of earlier tensors that are no longer held.

    Each tensor made here holds its memory through an array of its own. PyTorch releases that array
    with the last tensor, view or array on the memory, and the block then comes back.
    """

    def __init__(self) -> None:
        self._idle: deque[Tensor] = deque(maxlen=KEPT)
        self._lent: dict[int, tuple[weakref.ref[Any], Tensor]] = {}

    def empty_like(self, like: Tensor) -> Tensor:
        """Make `torch.empty_like(like)` on the CPU, in memory that later calls use again.

        Its storage cannot be resized.
        """
        # A contiguous tensor tells the layout; making a meta tensor takes as long as a small step.
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
"""The only recycler of the process, so the memory that it keeps is bounded."""
