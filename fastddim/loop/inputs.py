"""The arguments of a model in memory, in tensors that stay where they have to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.loop.arguments import ModelArguments
from fastddim.loop.cuda import CaptureError
from fastddim.loop.rows import Rows, Trees, taken_apart


class Inputs:
    """The arguments that models read eagerly: the caller's tensors where they are read as they are,
    and tensors that stay where rows are repeated or stacked.

    Attributes:
        arguments: those of each model that a step evaluates.
    """

    arguments: Trees = ({},)

    def __init__(self) -> None:
        self._given: ModelArguments | None = None
        self._own: dict[int, Tensor] = {}
        self._written: list[tuple[Rows, Tensor]] = []

    def load(self, given: ModelArguments) -> None:
        """Take over the current values; where the arguments are those of the last call, only rows
        that are repeated or stacked are read again.
        """
        if given is not self._given:
            self._take(given)
        for rows, own in self._written:
            rows.write(own)

    def _take(self, given: ModelArguments) -> None:
        if not any(given.trees):
            self.arguments, self._given = given.trees, given
            return
        leaves, with_leaves = taken_apart(given.trees)
        self._written = []
        read = [self._read(i, leaf) for i, leaf in enumerate(leaves)]
        self.arguments, self._given = with_leaves(read), given

    def _read(self, i: int, leaf: Any) -> Any:
        if not isinstance(leaf, Rows):
            return leaf
        if leaf.whole:
            return leaf.like
        own = self._own.get(i)
        if own is None:
            own = self._own[i] = leaf.empty()
        self._written.append((leaf, own))
        return own

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that stay."""
        yield from self._own.values()


class StaticInputs:
    """The arguments that a graph reads: copies of all tensors, which stay where they are.

    Attributes:
        arguments: those of each model that a step evaluates.

    Raises:
        CaptureError: there are values that a graph would read on the host.
    """

    def __init__(self, given: ModelArguments, device: torch.device) -> None:
        leaves, with_leaves = taken_apart(given.trees)
        self._leaves = [_static(leaf, device) for leaf in leaves]
        self.arguments = with_leaves(self._leaves)

    def tensors(self) -> Iterator[Tensor]:
        yield from (leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def load(self, given: ModelArguments) -> None:
        """Take over the values of arguments with the same `key`, or of arguments in their place."""
        if not self._leaves:
            return
        leaves, _ = taken_apart(given.trees)
        for own, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(leaf, Rows):
                leaf.write(own)


def _static(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, np.ndarray):
        raise CaptureError("model_kwargs hold a NumPy array, whose values a graph would not follow")
    if not isinstance(leaf, Rows):
        return leaf
    if leaf.like.device != device:
        raise CaptureError(
            f"model_kwargs hold a tensor on {leaf.like.device}, whose values a graph on {device} "
            "would not follow"
        )
    if leaf.whole:
        return leaf.like.detach().clone()
    own = leaf.empty()
    leaf.write(own)
    return own
