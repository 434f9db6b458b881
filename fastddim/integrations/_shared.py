"""What drop-ins that are methods have in common."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


def give_methods(target: Any, methods: Sequence[Callable[..., Any]]) -> None:
    """Set functions as methods, under their own names, of a class or of one object."""
    for method in methods:
        own = method if isinstance(target, type) else types.MethodType(method, target)
        setattr(target, method.__name__, own)


class Kept:
    """Values worked out from the attributes of objects.

    They are not kept in the objects themselves, which users copy and pickle.
    """

    def __init__(self, most: int) -> None:
        """
        Args:
            most: how many values of one object are kept.
        """
        self._most = most
        self._of: WeakKeyDictionary[Any, tuple[tuple[Any, ...], dict[Hashable, Any]]] = (
            WeakKeyDictionary()
        )

    def get(
        self, owner: Any, basis: tuple[Any, ...], key: Hashable, make: Callable[[], Any]
    ) -> Any:
        """The value of `key`, made anew where there is none that came from this very `basis`."""
        old, values = self._of.get(owner, ((), {}))
        if len(old) != len(basis) or not all(map(operator.is_, old, basis)):
            values = {}
            self._of[owner] = basis, values
        if key not in values:
            if len(values) >= self._most:
                values.clear()
            values[key] = make()
        return values[key]


def each(function: Callable[[Tensor], Tensor], values: Tensor, count: int | None = None) -> Tensor:
    """A function of each value, given alone as a 0-dim tensor or, with `count`, as `[count]` equal
    ones.

    torch takes roots and logarithms from a vector library, in which the last bit of one may depend
    on the length of the vector. Where numbers cancel afterwards, as in 1 − ᾱ_prev − σ², only the
    shape that a peer gives to its function leads to the numbers of the peer.
    """
    distinct, place = values.unique(return_inverse=True)
    if count is None:
        results = [function(value) for value in distinct.unbind()]
    else:
        rows = distinct[:, None].repeat(1, max(count, 1))
        results = [function(row)[0] for row in rows.unbind()]
    return torch.stack(results)[place] if results else values
