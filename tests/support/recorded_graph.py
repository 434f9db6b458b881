"""A stand-in for a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastddim import graph
from fastddim.loop import cuda

from .probes import NoSync

_VIEWS = frozenset(
    f"aten::{name}" for name in ("select", "slice", "split", "chunk", "view", "expand", "unsqueeze")
)


class RecordedGraph(NoSync):
    """A captured graph as it would be on CUDA, on any device: the operators of `body` and the very
    tensors that they touched, repeated by `replay` into the same memory without any Python of
    `body`.

    Replays of random operators draw from their generators again, as CUDA's do. What `body`
    computes while it is recorded is NaN afterwards, since a capture computes nothing.
    """

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__()
        self._recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        with self:
            body()
        for *_, made in self._recorded:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {v.untyped_storage()._cdata for v in _tensors((args, kwargs))}
        made = [v for v in _tensors(result) if v.untyped_storage()._cdata not in given]
        self._recorded.append((func, args, kwargs or {}, made))
        return result

    @property
    def operators(self) -> list[str]:
        return [func._schema.name for func, *_ in self._recorded]

    @property
    def launched(self) -> list[str]:
        """The operators except those that only make views."""
        return [name for name in self.operators if name not in _VIEWS]

    @property
    def nodes(self) -> int:
        return len(self.launched)

    def arguments_of(self, name: str) -> list[tuple[Any, ...]]:
        """The positional arguments of each call of an operator."""
        return [args for func, args, *_ in self._recorded if func._schema.name == name]

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self._recorded:
                if not made:
                    func(*args, **kwargs)
                    continue
                given = {v.untyped_storage()._cdata for v in _tensors((args, kwargs))}
                result = _tensors(func(*args, **kwargs))
                again = [v for v in result if v.untyped_storage()._cdata not in given]
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)


@contextmanager
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Let graphs be captured on the CPU, by recording; the list has those that were."""
    graphs: list[RecordedGraph] = []

    def record(body: Callable[[], None], warm_up: Callable[[], None], *_: Any) -> RecordedGraph:
        warm_up()
        graphs.append(RecordedGraph(body))
        return graphs[-1]

    monkeypatch.setattr(cuda, "record", record)
    monkeypatch.setattr(cuda, "available", lambda device: True)
    graph.clear()
    yield graphs
    graph.clear()


def _tensors(tree: Any) -> list[Tensor]:
    return [v for v in tree_flatten(tree)[0] if isinstance(v, Tensor)]
