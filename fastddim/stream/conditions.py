"""The arguments of the model for the requests that share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from fastddim.loop.arguments import ModelArguments
from fastddim.loop.rows import trees_key
from fastddim.options import RequestOptions
from fastddim.plan import StepKind
from fastddim.validation import check_device

Trees = tuple[dict[str, Any], ...]


class Conditions:
    """The tensors among the arguments of the models, a row or a pair of rows for each slot."""

    def __init__(self, arguments: Trees, batch: int, parts: int) -> None:
        self.key = trees_key(arguments)
        self._parts = parts
        leaves, self._structure = tree_flatten(arguments)
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
        """Copy the first `size` slots into the model's input, half by half."""
        if self._parts == 1:
            return
        for store, given in zip(self.slots, self.inputs, strict=True):
            for part in range(self._parts):
                given[part * size : (part + 1) * size].copy_(store[:size, part])

    def of(self, size: int) -> Trees:
        """The arguments of the first `size` slots."""
        rows = self._parts * size
        leaves = [leaf[:rows] if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        arguments: Trees = tree_unflatten(leaves, self._structure)
        return arguments


def copied_conditions(
    options: RequestOptions, kind: StepKind, device: torch.device
) -> tuple[Trees, list[Tensor]]:
    """The arguments of each model for one request with copied tensors, and a list of the copies.

    Raises:
        TypeError, ValueError: they do not fit one request on `device`; the message names the
            argument.
    """
    given = ModelArguments.of(
        options.model_kwargs,
        options.uncond_kwargs,
        batch=1,
        guided=kind.guided,
        apart=kind.apart,
    )
    for name, tensor in given.tensors_without_rows.items():
        raise ValueError(
            f"model_kwargs{name}: expected a tensor [{kind.parts}, ...], got shape "
            f"{tuple(tensor.shape)}"
        )
    for name, tensor in given.tensors.items():
        check_device(f"model_kwargs{name}", tensor, "the state", device)
    arguments: Trees = tree_map_only(Tensor, copied, given.joined(1))
    return arguments, [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def check_same_conditions(arguments: Trees, conditions: Conditions) -> None:
    """Refuse arguments that cannot share a batch with those of the first request."""
    if trees_key(arguments) == conditions.key:
        return
    shown = tree_map_only(Tensor, lambda v: f"{v.dtype} {tuple(v.shape)}", arguments[-1])
    raise ValueError(
        "model_kwargs: expected the names, shapes, dtypes and plain values of the stream's "
        f"first request, got {shown!r}"
    )
