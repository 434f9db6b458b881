"""Step tables of drop-ins: the one place that makes them, and finds those of an object again.

Every drop-in makes its tables by `step_table`. One that is called for each step keeps them in a
`Cache`: its own, or the one that `CacheOf` has for an object of another library. The key of a table
has everything that the table depends on: numbers by value, objects by their `id`, and tensors also
by their `version`.

`fastddim.kept` makes each outside the modes of the call that it is made in.
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
        rescaling: how the rows depend on the data of a step, if they do.
    """
    return StepTable(stack_row(row), rescaling=rescaling)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place, or −1 for a tensor of inference mode, whose
    changes are not counted. PyTorch has no public name for it.
    """
    try:
        return tensor._version
    except RuntimeError:
        return -1


class CacheOf:
    """A cache for each object of another library, as long as the object lives.

    It is not kept in the objects themselves, which users copy and pickle.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: how many values are kept for each object.
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
