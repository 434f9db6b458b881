"""Functions that several drop-ins share: setting methods, and taking roots one by one."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def give_methods(target: Any, methods: Sequence[Callable[..., Any]]) -> None:
    """Set functions as methods of a class or of one object, under their own names."""
    for method in methods:
        own = method if isinstance(target, type) else types.MethodType(method, target)
        setattr(target, method.__name__, own)


def each(function: Callable[[Tensor], Tensor], values: Tensor, count: int | None = None) -> Tensor:
    """Apply a function to each value alone, as a 0-dim tensor or, with `count`, as `[count]` equal
    values.

    PyTorch takes roots and logarithms from a vector library, whose last bit may depend on the
    length of the vector. If numbers cancel afterwards, as in 1 − ᾱ_prev − σ², only the shape that
    the peer gives to its function leads to the peer's numbers.
    """
    distinct, place = values.unique(return_inverse=True)
    if count is None:
        results = [function(value) for value in distinct.unbind()]
    else:
        rows = distinct[:, None].repeat(1, max(count, 1))
        results = [function(row)[0] for row in rows.unbind()]
    return torch.stack(results)[place] if results else values
