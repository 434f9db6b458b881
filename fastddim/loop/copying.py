"""Copies and pickles of objects that own buffers, graphs and locks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

from torch import nn

from fastddim.wrappers import held_modules

Own = TypeVar("Own", bound="Rebuilt")


class Rebuilt:
    """An object whose copies and pickles hold what it was made from, and build the rest anew.

    `__init__` sets the attributes that are held, then calls `_rebuild`.
    """

    _built: frozenset[str]

    def _build(self) -> None:
        """Set the attributes that are not held, without a look into the models.

        The models may be parts of a module that is being copied itself, and still be empty.
        """
        raise NotImplementedError

    def _functions(self) -> tuple[Any, ...]:
        """The model, and other functions of the user."""
        raise NotImplementedError

    def _rebuild(self) -> None:
        held = frozenset(vars(self))
        self._build()
        self._built = frozenset({*vars(self), "_built"} - held)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._rebuild()

    def __deepcopy__(self: Own, memo: dict[int, Any]) -> Own:
        for module in _closed_over(*self._functions()):
            if id(module) in memo:
                raise TypeError(
                    "model: expected a module, or a method or functools.partial of one, to copy it "
                    f"with the {type(module).__name__} that it belongs to, got a function, whose "
                    "copy would still use the original"
                )
        state = self.__getstate__()
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied


def _closed_over(*functions: Any) -> Iterator[nn.Module]:
    """The modules that copies of the functions would share, since a copied function is itself."""
    for function in functions:
        if isinstance(function, FunctionType):
            yield from held_modules(function)
        elif isinstance(function, MethodType):
            yield from _closed_over(function.__self__)
        elif isinstance(function, partial):
            yield from _closed_over(function.func, *function.args, *function.keywords.values())
