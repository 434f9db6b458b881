"""SHA-256 of what the bytes of a run depend on: weights, and arguments of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def any_on_meta(model: nn.Module) -> bool:
    """True where weights have no bytes that a fingerprint could be of."""
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
    """SHA-256 over named values, with the content of those that are tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            add_tensor(digest, name, value)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def add_tensor(digest: Any, name: str, value: Tensor) -> None:
    """Add the name, dtype, shape and bytes of a tensor to a digest of `hashlib`."""
    digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())
