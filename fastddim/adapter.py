"""Facts that a user's model tells about itself, and the reading of its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.types import Device

from fastddim.notices import warn_once
from fastddim.schedule import Schedule
from fastddim.validation import STATE_DTYPES
from fastddim.wrappers import (
    held_modules,
    hooks,
    layers,
    modules,
    reachable,
    tensors,
    weights,
)

Model: TypeAlias = Callable[..., Any]
"""`model(x, t, **model_kwargs)`, as `model` of `fastddim.sample` describes it."""


def check_model(model: Any, name: str = "model") -> None:
    if not callable(model):
        raise TypeError(f"{name}: expected a callable model(x, t), got {type(model).__name__}")


def check_eval(model: Model) -> None:
    """Refuse a network in training mode.

    Raises:
        ValueError: the network is in training mode, or one that it wraps.
    """
    if any(map(_in_training, layers(model))):
        raise ValueError("model: expected eval mode (model.eval()), got training mode")


def warn_of_training(name: str, model: Model) -> None:
    """Warn, once for each class, of a network in training mode that the model is or calls.

    Args:
        name: the argument's.
    """
    if isinstance(model, nn.Module) and not model.training:
        return
    for part in (*layers(model), *reachable(model)):
        if _in_training(part):
            kind = type(part)
            warn_once(
                f"{name}: expected a network in eval mode, got {kind.__qualname__} in training "
                "mode, in which dropout draws and batch normalization learns from samples; call "
                ".eval() on it first",
                "training",
                f"{kind.__module__}.{kind.__qualname__}",
            )


def _in_training(part: Any) -> bool:
    """True for a network in training mode. False for a module that only wraps networks in eval
    mode, and for one without parameters, which is a formula.
    """
    return (
        isinstance(part, nn.Module)
        and part.training
        and any(inner.training and not inner._modules for inner in modules(part))
        and next(part.parameters(), None) is not None
    )


def output_tensor(result: Any, name: str = "model") -> Any:
    """The tensor in a model's result: itself, the first item of a tuple, or `.sample`."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple) and result:
        return result[0]
    sample = getattr(result, "sample", None)
    if not isinstance(sample, Tensor):
        raise TypeError(
            f"{name}: expected it to return a tensor, a tuple that starts with one, or an object "
            f"with .sample, got {type(result).__name__}"
        )
    return sample


def own_dtype(model: Model) -> torch.dtype | None:
    """The dtype in which the model reads the state; None where it is unknown, as where parameters
    differ in it.

    It comes from hooks that cast weights for computation, else from the model's `dtype`, else from
    the parameters, else from the buffers. A dtype that weights are merely stored in does not count.
    """
    parts = _modules(model)
    for hook in hooks(parts):
        computed = _state_dtype(hook, "compute_dtype")
        if computed is not None:
            return computed
    kinds = ({value.dtype for value in held}.intersection(STATE_DTYPES) for held in tensors(parts))
    stored = next(filter(None, kinds), set())
    for layer in layers(model):
        said = _state_dtype(layer, "dtype")
        # A network of several dtypes that sets `dtype` casts to it inside.
        inside = len(stored) > 1 and "dtype" in getattr(layer, "__dict__", {})
        if said is not None and not inside:
            return said
    return stored.pop() if len(stored) == 1 else None


def _state_dtype(owner: Any, name: str) -> torch.dtype | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, torch.dtype) and value in STATE_DTYPES else None


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by the number of dimensions of a batch."""


def is_channels_last(model: Model, dims: int) -> bool:
    """True where the model reads and writes samples in channels_last: its first and its last weight
    are convolutions in this format, as after `model.to(memory_format=torch.channels_last)`.

    Args:
        dims: the number of dimensions of a batch.
    """
    if dims not in CHANNELS_LAST:
        return False
    for root in held_modules(model):
        ends = [next(weights(root, last=last), None) for last in (False, True)]
        if _lie_channels_last([end for end in ends if end is not None], dims):
            return True
    return False


def _lie_channels_last(ends: list[Tensor], dims: int) -> bool:
    """True for weights of convolutions in channels_last; those of one pixel are in both formats."""
    return not all(end.is_contiguous() for end in ends) and all(
        end.ndim == dims and end.is_contiguous(memory_format=CHANNELS_LAST[dims]) for end in ends
    )


def own_device(model: Model) -> Device:
    """The device that the model computes on: the one to which hooks take its weights, else that of
    its parameters, or of its buffers where it has none. None for a model that is no module.

    Raises:
        ValueError: parameters are on several devices, or have no values, and no hook moves them.
    """
    parts = _modules(model)
    for hook in hooks(parts):
        device = _execution_device(hook)
        if device is not None and str(device) != "meta":
            return device
    held = next(tensors(parts), [])
    devices = sorted({tensor.device for tensor in held}, key=str)
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ValueError(
            "device: expected the device that the model computes on, since its parameters are "
            f"on {' and '.join(map(str, devices))} and no hook of accelerate or diffusers "
            f"moves them{_hint(devices)}; got None"
        )
    return devices[0] if devices else None


def _hint(devices: list[torch.device]) -> str:
    on_meta = any(device.type == "meta" for device in devices)
    return ", and those on meta have no values: load the weights first" if on_meta else ""


def _execution_device(hook: Any) -> Device:
    """The device to which a hook of accelerate or of diffusers takes weights and inputs, if any."""
    group = getattr(hook, "group", None)
    device: Device = getattr(hook, "execution_device", getattr(group, "onload_device", None))
    return device


def own_schedule(model: Model) -> Schedule | None:
    """The `.schedule` of the model or of a model that it wraps, else the one that all networks
    within its reach agree on.
    """
    for layer in layers(model):
        schedule = getattr(layer, "schedule", None)
        if isinstance(schedule, Schedule):
            return schedule
    found = (getattr(part, "schedule", None) for part in _parts(model))
    schedules = {schedule for schedule in found if isinstance(schedule, Schedule)}
    return schedules.pop() if len(schedules) == 1 else None


def own_sample_shape(model: Model) -> tuple[int, ...] | None:
    """Shape of one sample from `.sample_shape`, or from a diffusers `.config` (in_channels,
    sample_size), of the model or of a model that it wraps.
    """
    return next(filter(None, map(_sample_shape, layers(model))), None)


def check_batched(name: str, shape: tuple[int, ...], model: Model, *, tensor: bool) -> None:
    """Refuse the shape of one sample of the model where one that starts with B is expected.

    A network that tells its `sample_shape` has samples of no other number of dimensions; a
    diffusers config, whose sizes some networks read otherwise, is compared with the shape itself.

    Args:
        name: the argument's.
        shape: the given one, or that of the given tensor.
        tensor: whether the argument is a tensor.
    """
    own = own_sample_shape(model)
    if own is None or len(shape) != len(own):
        return
    said = any(getattr(layer, "sample_shape", None) is not None for layer in layers(model))
    if said or shape == own:
        one = f"{name}[None]" if tensor else f"{name}={(1, *shape)}"
        raise ValueError(
            f"{name}: expected (B, {', '.join(map(str, own))}), got {shape}, which is one sample; "
            f"for one write {one}"
        )


def may_lack_batch(model: Model, shape: Sequence[int]) -> bool:
    """True where every convolution within the model's reach takes one dimension more.

    The convolutions may be those of an encoder of something else. So the answer only explains an
    error, and refuses nothing.
    """
    parts = (part for part in _parts(model) if isinstance(part, nn.modules.conv._ConvNd))
    return {2 + len(part.kernel_size) for part in parts} == {len(shape) + 1}


def _sample_shape(layer: Any) -> tuple[int, ...] | None:
    shape = getattr(layer, "sample_shape", None)
    if isinstance(shape, Sequence) and shape:
        return tuple(int(n) for n in shape)
    config = getattr(layer, "config", None)
    channels, size = _field(config, "in_channels"), _field(config, "sample_size")
    if channels is None or size is None:
        return None
    return (int(channels), *((size, size) if isinstance(size, int) else map(int, size)))


def label_argument(model: Model) -> str | None:
    """The argument for class labels, `y` or `class_labels`; None for a model without one."""
    for layer in layers(model):
        parameters = _parameters(layer.forward if isinstance(layer, nn.Module) else layer)
        # Networks of diffusers have the argument whether they can use it or not.
        unused = getattr(layer, "class_embedding", layer) is None
        for name in ("y", "class_labels"):
            if name in parameters and not unused:
                return name
    return None


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C
        return ()


def number_of_classes(model: Model) -> tuple[int | None, int | None]:
    """(`.num_classes`, embedded labels of a diffusers `.config`), of the model or one it wraps.

    A model with K classes that was sometimes trained without labels takes K for no label. A network
    of diffusers does not tell whether its last label means this.
    """
    for layer in layers(model):
        classes = getattr(layer, "num_classes", None)
        embedded = _field(getattr(layer, "config", None), "num_class_embeds")
        if isinstance(classes, int) or isinstance(embedded, int):
            return (
                classes if isinstance(classes, int) else None,
                embedded if isinstance(embedded, int) else None,
            )
    return None, None


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _modules(model: Model) -> list[nn.Module]:
    """All modules of the model that is called, where that is a module."""
    roots = (layer for layer in layers(model) if isinstance(layer, nn.Module))
    return next(map(modules, roots), [])


def _parts(model: Model) -> Iterator[Any]:
    for value in reachable(model):
        yield from modules(value) if isinstance(value, nn.Module) else (value,)
