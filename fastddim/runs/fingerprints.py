"""SHA-256 of inputs that the bytes of a run depend on: weights, and arguments of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path


def any_on_meta(model: nn.Module) -> bool:
    """True where weights are on meta, without bytes for a fingerprint."""
    return any(value.is_meta for value in chain(model.parameters(), model.buffers()))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        add_tensor(digest, name, value)
    return digest.hexdigest()


def weights_of(model: Any) -> str | None:
    """The fingerprint of a module; None for a function, and where hooks offload the weights."""
    return fingerprint(model) if isinstance(model, nn.Module) and not any_on_meta(model) else None


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 over named values, with the content of the tensors and arrays in them."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        leaves = tree_flatten_with_path(value)[0]
        if not any(isinstance(leaf, Tensor | np.ndarray) for _, leaf in leaves):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        # Their repr leaves most of the numbers out.
        for path, leaf in leaves:
            _add_leaf(digest, name + keystr(path), leaf)
    return digest.hexdigest()


def _add_leaf(digest: Any, name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        add_tensor(digest, name, leaf)
    elif isinstance(leaf, np.ndarray):
        digest.update(f"{name} {leaf.dtype} {list(leaf.shape)}\n".encode())
        digest.update(leaf.tobytes())
    else:
        digest.update(f"{name} {leaf!r}\n".encode())


def add_tensor(digest: Any, name: str, value: Tensor) -> None:
    """Add the name, dtype, shape and bytes of a tensor to a digest of `hashlib`."""
    digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())
