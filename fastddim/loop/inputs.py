"""The `model_kwargs` of a captured model: tensors that stay, and a key for all else."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastddim.loop.cuda import CaptureError


class Inputs:
    """Copies of the tensors in `model_kwargs` that stay where they are.

    Raises:
        CaptureError: there are values that a graph would read on the host.
    """

    def __init__(self, model_kwargs: Mapping[str, Any], device: torch.device) -> None:
        leaves, structure = tree_flatten(dict(model_kwargs))
        self._leaves = [_static(leaf, device) for leaf in leaves]
        self.model_kwargs: dict[str, Any] = tree_unflatten(self._leaves, structure)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def load(self, model_kwargs: Mapping[str, Any]) -> None:
        """Take over the values of tensors with the same `kwargs_key`."""
        if not self._leaves:
            return
        for own, given in zip(self._leaves, tree_leaves(dict(model_kwargs)), strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)


def _static(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, np.ndarray):
        raise CaptureError("model_kwargs hold a NumPy array, whose values a graph would not follow")
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.device != device:
        raise CaptureError(
            f"model_kwargs hold a tensor on {leaf.device}, whose values a graph on {device} would "
            "not follow"
        )
    return leaf.detach().clone()


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def kwargs_key(model_kwargs: Mapping[str, Any]) -> Hashable:
    """All of `model_kwargs` except the values of tensors: what a graph of the model depends on."""
    if not model_kwargs:
        return None
    leaves, structure = tree_flatten(dict(model_kwargs))
    return repr(structure), tuple(_leaf_key(leaf) for leaf in leaves)


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return type(leaf), tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    # repr tells 0.0 from -0.0.
    return (type(leaf), repr(leaf)) if isinstance(leaf, _PLAIN) else id(leaf)
