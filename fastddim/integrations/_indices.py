"""Timesteps and other indices that users give, read as the peers read them: as indices of tensors.

So a float is refused rather than truncated, and a boolean is not a number.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# PyTorch reads tensors of other dtypes as masks, or refuses them as indices.
_NUMBERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8))
_INDICES = frozenset((torch.int64, torch.int32))


def one_index(name: str, value: Any, otherwise: str = "") -> int | None:
    """The value of an index that all samples share, or None if it lies on a device.

    Args:
        name: name of the argument.
        value: an int, or another value with one element that indexes a tensor: a tensor, or a
            number of NumPy.
        otherwise: advice for an index per sample, at the end of the error.

    Raises:
        IndexError: the value is a number, or a tensor of numbers, that is not an integer.
        TypeError: the value is not a number.
        ValueError: the value is a tensor with more or fewer than one element.
    """
    if isinstance(value, Tensor):
        if value.dtype in _NUMBERS:
            try:
                if value.is_cpu:
                    return value.item()  # type: ignore[return-value]
                if value.numel() == 1:
                    return None
            except RuntimeError:
                if value.numel() == 1:
                    raise
            raise ValueError(
                f"{name}: expected one for all samples, got {value.numel()}{otherwise}"
            )
    elif isinstance(value, np.ndarray):
        return one_index(name, torch.from_numpy(value), otherwise)
    elif type(value) is not bool and hasattr(value, "__index__"):
        return operator.index(value)
    expected = f"{name}: expected an integer, or a tensor with one"
    if isinstance(value, Tensor):
        raise IndexError(f"{expected}, got {value.dtype} of shape {tuple(value.shape)}")
    number = hasattr(value, "__float__") or isinstance(value, complex)
    raise (IndexError if number else TypeError)(f"{expected}, got {value!r}")


def is_one_index(value: Any) -> bool:
    """Tell whether a value is a tensor that `one_index` takes, on any device."""
    return isinstance(value, Tensor) and value.dtype in _NUMBERS and value.numel() == 1


def check_indices(name: str, value: Any) -> Tensor:
    """Return a tensor of indices, one a sample.

    Raises:
        IndexError: the tensor has a dtype other than int64 and int32.
        TypeError: the value is not a tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {value!r}")
    if value.dtype in _INDICES:
        return value
    raise IndexError(f"{name}: expected an int64 tensor, got {value.dtype}")
