"""Large results in memory that an earlier one has left.

The C library tends to give memory of this size back to the system when it is freed, and the system
clears every page of it when it is asked for again, which takes several times as long as a step.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor

LARGE = 512 << 10
"""Bytes from which on results are recycled."""

KEPT = 4
"""How many of them are kept, all of one size."""


class Recycler:
    """Makes tensors, and makes them again of the memory of those that nobody holds any more."""

    def __init__(self) -> None:
        self._kept: list[torch.UntypedStorage] = []
        self._lock = threading.Lock()

    def empty_like(self, like: Tensor) -> Tensor:
        """`torch.empty_like(like)` on the CPU, whose memory is kept for later ones."""
        made = torch.empty(0, dtype=like.dtype, device="cpu")
        meta = torch.empty_like(like, device="meta")
        size = meta.untyped_storage().nbytes()
        with self._lock:
            storage = self._take(size)
            # Holds the storage from here on, so that no other call takes it.
            made.set_(storage, 0, meta.shape, meta.stride())
        return made

    def clear(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._kept.clear()

    def _take(self, size: int) -> torch.UntypedStorage:
        if any(storage.nbytes() != size for storage in self._kept):
            self._kept.clear()
        for storage in self._kept:
            if _only_here(storage):
                return storage
        storage = torch.UntypedStorage(size, device="cpu")
        if len(self._kept) < KEPT:
            self._kept.append(storage)
        return storage


def _only_here(storage: torch.UntypedStorage) -> bool:
    """Whether no tensor uses it, and no variable of the caller's holds it."""
    unused = torch._C._storage_Use_Count(storage._cdata) == 1
    return bool(unused and sys.getrefcount(storage) <= _REFERENCES)


# The list, the loop's variable, the argument here and that of getrefcount.
_REFERENCES = 4

RECYCLER = Recycler()
"""That of the process, so that what it keeps is bounded."""
