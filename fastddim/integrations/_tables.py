"""Step tables of drop-ins: the one place that makes them, and the caches that keep them.

Every drop-in makes its tables with `step_table`. A drop-in that is called for each step keeps them
in a `Cache`: its own, or the one that `CacheOf` has for an object of another library. The key of a
table covers everything that the table depends on: numbers by value, objects by their `id`, and
tensors also by their `version`.

`fastddim.kept` makes each table outside the modes of the call.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fastddim.cache import Cache
from fastddim.plan import Rescaling, Row, stack_row
from fastddim.steptable import StepTable


def step_table(row: Row, rescaling: Rescaling | None = None) -> StepTable:
    """Make a table from coefficients that are float64 `[R]` or numbers.

    Args:
        rescaling: the dependence of the rows on the data of a step, if any.
    """
    return StepTable(stack_row(row), rescaling=rescaling)


def version(tensor: Tensor) -> int:
    """Return the number of times that a tensor was changed in place, or −1 for a tensor of
    inference mode, whose changes are not counted. PyTorch has no public name for it.
    """
    try:
        return tensor._version
    except RuntimeError:
        return -1


class CacheOf:
    """A cache for each object of another library, for as long as the object lives.

    The caches are not kept in the objects themselves, since users copy and pickle those.
    """

    def __init__(self, size: int) -> None:
        """Make no cache yet.

        Args:
            size: number of values that are kept for each object.
        """
        self._size = size
        self._caches: WeakKeyDictionary[Any, Cache[Any]] = WeakKeyDictionary()

    def __contains__(self, owner: Any) -> bool:
        return owner in self._caches

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, owner: Any) -> Cache[Any]:
        found = self._caches.get(owner)
        if found is None:
            found = self._caches.setdefault(owner, Cache(self._size))
        return found
