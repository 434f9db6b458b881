"""A tensor as a model reads it: its rows, which may be repeated or stacked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Part: TypeAlias = Tensor | bool | int | float | complex
Trees: TypeAlias = tuple[dict[str, Any], ...]


# No code changes one once it is made. A frozen dataclass would take three times as long to make,
# and a call of a `Sampler` with other arguments makes one for each tensor.
@dataclass(slots=True, eq=False)
class Rows:
    """A tensor as the model reads it: its parts one below the other, of the same number of rows.

    Attributes:
        parts: tensors `[each, …]`, `[1, …]` or `[]`, or numbers that fill a part.
        like: a tensor with the rest of the shape, the dtype and the device.
        each: rows of a part; None for a tensor without rows of samples.
        whole: whether there is one part, which is read as it is.
    """

    parts: tuple[Part, ...]
    like: Tensor
    each: int | None
    whole: bool

    @classmethod
    def of(cls, parts: tuple[Part, ...], like: Tensor, each: int) -> Rows:
        first = parts[0]
        if len(parts) == 1 and isinstance(first, Tensor) and first.ndim and first.shape[0] == each:
            return cls.as_given(first, each)
        return cls(parts, like, each, whole=False)

    @classmethod
    def as_given(cls, tensor: Tensor, each: int | None = None) -> Rows:
        return cls((tensor,), tensor, each, whole=True)

    @property
    def key(self) -> Hashable:
        """Everything that a graph of the model depends on: all except the values."""
        like = self.like
        if self.whole:
            return type(like), tuple(like.shape), like.stride(), like.dtype, like.device
        return len(self.parts), self.each, tuple(like.shape[1:]), like.dtype, like.device

    def empty(self) -> Tensor:
        """A tensor for `write`, for rows that are not read as they are."""
        assert self.each is not None
        return self.like.new_empty((len(self.parts) * self.each, *self.like.shape[1:]))

    def write(self, out: Tensor) -> None:
        """Write the parts into a tensor that `empty` made for these rows, or for rows that these
        replace.
        """
        if len(self.parts) == 1:
            _fill(out, self.parts[0])
            return
        assert self.each is not None
        for i, part in enumerate(self.parts):
            _fill(out[i * self.each : (i + 1) * self.each], part)

    def joined(self, each: Any) -> Tensor:
        """The parts as one tensor, in operations that programs can hold.

        Args:
            each: rows of a part, a number that may be unknown in a program.
        """
        if self.whole:
            return self.like
        shape = (each, *self.like.shape[1:])
        parts = [
            part.expand(shape) if isinstance(part, Tensor) else self.like.new_full(shape, part)
            for part in self.parts
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _fill(out: Tensor, part: Part) -> None:
    if isinstance(part, Tensor):
        out.copy_(part)
    else:
        out.fill_(part)


def checked_number(shown: str, value: Any, dtype: torch.dtype) -> Part:
    """A number that a tensor of the dtype can hold."""
    truth = isinstance(value, bool | np.bool_)
    fits = False
    if truth or dtype == torch.bool:
        fits = truth and dtype == torch.bool
    elif dtype.is_complex:
        fits = isinstance(value, numbers.Complex)
    elif dtype.is_floating_point:
        fits = isinstance(value, numbers.Real) and not _overflows(value, dtype)
    elif isinstance(value, numbers.Integral):
        limits = torch.iinfo(dtype)
        fits = limits.min <= int(value) <= limits.max
    if not fits:
        raise TypeError(
            f"{shown}: expected a tensor or a number of {dtype}, got {described(value)}"
        )
    part: Part = value.item() if isinstance(value, np.generic) else value
    return part


def _overflows(value: Any, dtype: torch.dtype) -> bool:
    return math.isfinite(value) and abs(value) > torch.finfo(dtype).max


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def taken_apart(trees: Trees) -> tuple[list[Any], Callable[[Iterable[Any]], Trees]]:
    """The leaves of some arguments, and the function that puts others in their places."""
    leaves = [leaf for tree in trees for leaf in tree.values()]
    # To flatten trees of tensors alone would take longer than everything that is done with them.
    if all(type(leaf) is Rows for leaf in leaves):
        return leaves, lambda others: _in_places(trees, others)
    leaves, structure = tree_flatten(trees)
    return leaves, lambda others: tree_unflatten(others, structure)


def _in_places(trees: Trees, leaves: Iterable[Any]) -> Trees:
    """Trees of the same names, with these leaves."""
    each = iter(leaves)
    return tuple({name: next(each) for name in tree} for tree in trees)


def trees_key(trees: Trees) -> Hashable:
    """All of some arguments except the values of tensors."""
    if not any(trees):
        return None
    leaves, structure = tree_flatten(trees)
    return repr(structure), tuple(map(leaf_key, leaves))


def leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Rows):
        return leaf.key
    if isinstance(leaf, Tensor):
        return Rows.as_given(leaf).key
    # repr tells 0.0 from -0.0.
    return (type(leaf), repr(leaf)) if isinstance(leaf, _PLAIN) else id(leaf)
