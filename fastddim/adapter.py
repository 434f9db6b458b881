"""Facts that a user's model tells about itself, and the reading of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastddim.schedule import Schedule

Model: TypeAlias = Callable[..., Any]


def check_model(model: Any) -> None:
    if not callable(model):
        raise TypeError(f"model: expected a callable model(x, t), got {type(model).__name__}")


def output_tensor(result: Any) -> Any:
    """The tensor in a model's result: itself, the first item of a tuple, or `.sample`."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple) and result:
        return result[0]
    sample = getattr(result, "sample", None)
    if not isinstance(sample, Tensor):
        raise TypeError(
            "model: expected it to return a tensor, a tuple that starts with one, or an object "
            f"with .sample, got {type(result).__name__}"
        )
    return sample


def own_dtype(model: Model) -> torch.dtype | None:
    """dtype of the model's first floating-point parameter or buffer."""
    return next((v.dtype for v in _tensors(model) if v.is_floating_point()), None)


def own_device(model: Model) -> torch.device | None:
    """Device of the model's first parameter or buffer."""
    return next((v.device for v in _tensors(model)), None)


def own_schedule(model: Model) -> Schedule | None:
    schedule = getattr(model, "schedule", None)
    return schedule if isinstance(schedule, Schedule) else None


def own_sample_shape(model: Model) -> tuple[int, ...] | None:
    """Shape of one sample from `.sample_shape`, or from a diffusers `.config` (in_channels,
    sample_size).
    """
    shape = getattr(model, "sample_shape", None)
    if isinstance(shape, Sequence) and shape:
        return tuple(int(n) for n in shape)
    config = getattr(model, "config", None)
    channels, size = _field(config, "in_channels"), _field(config, "sample_size")
    if channels is None or size is None:
        return None
    return (int(channels), *((size, size) if isinstance(size, int) else map(int, size)))


def _tensors(model: Model) -> Iterable[Tensor]:
    if isinstance(model, nn.Module):
        yield from model.parameters()
        yield from model.buffers()


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
