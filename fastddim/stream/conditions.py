"""The `model_kwargs` of the requests that share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map_only,
    tree_unflatten,
)

from fastddim.loop.inputs import kwargs_key
from fastddim.loop.setup import check_model_kwargs
from fastddim.validation import check_device


class Conditions:
    """The tensors of `model_kwargs`, a row or a pair of rows for each slot."""

    def __init__(self, model_kwargs: Mapping[str, Any], batch: int, parts: int) -> None:
        self.key = kwargs_key(model_kwargs)
        self._parts = parts
        leaves, self._structure = tree_flatten(dict(model_kwargs))
        self.slots = [v.new_zeros((batch, *v.shape)) for v in leaves if isinstance(v, Tensor)]
        # Under guidance the model reads all first rows, then all second ones.
        self.inputs = [
            store.flatten(0, 1) if parts == 1 else torch.zeros_like(store.flatten(0, 1))
            for store in self.slots
        ]
        inputs = iter(self.inputs)
        self._leaves = [next(inputs) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def put(self, conditions: Sequence[Tensor], slot: int) -> None:
        for store, value in zip(self.slots, conditions, strict=True):
            store[slot].copy_(value)

    def arrange(self, size: int) -> None:
        """Make the first `size` slots what the model reads."""
        if self._parts == 1:
            return
        for store, given in zip(self.slots, self.inputs, strict=True):
            for part in range(self._parts):
                given[part * size : (part + 1) * size].copy_(store[:size, part])

    def of(self, size: int) -> dict[str, Any]:
        """`model_kwargs` of the first `size` slots."""
        rows = self._parts * size
        leaves = [leaf[:rows] if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        kwargs: dict[str, Any] = tree_unflatten(leaves, self._structure)
        return kwargs


def copied_conditions(
    model_kwargs: Any, parts: int, device: torch.device
) -> tuple[dict[str, Any], list[Tensor]]:
    """(`model_kwargs` of one request with its tensors copied, these tensors).

    Raises:
        TypeError, ValueError: they are no mapping, or a tensor has not `parts` rows on `device`.
    """
    kwargs = check_model_kwargs(model_kwargs)
    for path, leaf in tree_flatten_with_path(kwargs)[0]:
        if not isinstance(leaf, Tensor):
            continue
        name = f"model_kwargs{keystr(path)}"
        if leaf.ndim == 0 or leaf.shape[0] != parts:
            raise ValueError(
                f"{name}: expected a tensor [{parts}, ...], got shape {tuple(leaf.shape)}"
            )
        check_device(name, leaf, "the state", device)
    kwargs = tree_map_only(Tensor, copied, kwargs)
    return kwargs, [leaf for leaf in tree_flatten(kwargs)[0] if isinstance(leaf, Tensor)]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check_same_conditions(kwargs: dict[str, Any], conditions: Conditions) -> None:
    """Refuse `model_kwargs` that cannot share a batch with those of the first request."""
    if kwargs_key(kwargs) == conditions.key:
        return
    shown = tree_map_only(Tensor, lambda v: f"{v.dtype} {tuple(v.shape)}", kwargs)
    raise ValueError(
        "model_kwargs: expected the names, shapes, dtypes and plain values of the stream's "
        f"first request, got {shown!r}"
    )
