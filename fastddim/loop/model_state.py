"""The modules of a model, as far as a captured graph depends on them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from fastddim.wrappers import reachable


class ModelState:
    """The state of the modules that models show, as far as a graph depends on it.

    A model shows itself, what a method is bound to, what a partial, a closure or an instance holds,
    and the globals that a function names.

    The state is read before every replay. Walking a tree of modules would take as long as the
    replay of a small model, so the modules are listed once, and again only after one came, went or
    changed places.
    """

    def __init__(self, *models: Any) -> None:
        self._models = models
        self._modules: list[nn.Module] = []
        self._links: list[int] = []

    def read(self) -> tuple[Hashable, Hashable]:
        """The addresses of the parameters and buffers, and the modules in training mode."""
        reached = chain.from_iterable(map(reachable, self._models))
        roots = [value for value in reached if isinstance(value, nn.Module)]
        if self._links != _links(roots, self._modules):
            self._modules = list(dict.fromkeys(chain.from_iterable(m.modules() for m in roots)))
            self._links = _links(roots, self._modules)
        modules = self._modules
        mappings = chain(map(_parameters, modules), map(_buffers, modules))
        tensors = [tensor for tensor in _values(mappings) if tensor is not None]
        return (_addresses(tensors), tuple(map(_dtype, tensors))), tuple(map(_training, modules))


_parameters, _buffers = attrgetter("_parameters"), attrgetter("_buffers")
_children, _training, _dtype = map(attrgetter, ("_modules", "training", "dtype"))


def _links(roots: Iterable[nn.Module], modules: Iterable[nn.Module]) -> list[int]:
    """The identities from which a list of modules follows, as long as the list keeps them alive."""
    return list(map(id, chain(roots, _values(map(_children, modules)))))


def _values(mappings: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(_values_of, filter(None, mappings)))


_values_of = methodcaller("values")


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    with suppress(NotImplementedError, RuntimeError, ValueError):
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if all(addresses):
            return addresses
    return tuple(map(_address, tensors))


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError, ValueError):
        # A lazy parameter, or a subclass without memory of its own.
        return id(tensor)
