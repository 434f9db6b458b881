"""The arguments of `generate`, checked before anything is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastddim.adapter import Model
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.setup import resolve_shape
from fastddim.options import Callback, Update
from fastddim.runs.conditions import Conditions
from fastddim.runs.decoding import Decoder
from fastddim.runs.fingerprints import any_on_meta
from fastddim.runs.options import GenerateOptions
from fastddim.runs.shards import is_image
from fastddim.stopping import STOP
from fastddim.validation import check_int


def checked_conditions(options: GenerateOptions, start: int, stop: int) -> Conditions | None:
    """The conditions of the samples [start, stop), if there are any."""
    if options.conditions is None:
        return None
    conditions = Conditions(options.conditions, start, stop)
    both = sorted(conditions.names & set(options.model_kwargs or {}))
    if both:
        raise ValueError(
            f"conditions: expected names that are not in model_kwargs too, got {', '.join(both)}"
        )
    return conditions


def check_network(name: str, model: Model | None, model_id: Any) -> None:
    """Refuse a network in training mode, and a function without a name in the manifest."""
    if isinstance(model, nn.Module) and model.training:
        raise ValueError(f"{name}: expected eval mode (model.eval()), got training mode")
    if model_id is not None and not isinstance(model_id, str):
        raise TypeError(f"model_id: expected a string, got {model_id!r}")
    if model_id is None and model is not None and not isinstance(model, nn.Module):
        raise ValueError(
            f"model_id: expected a string that tells this {name} from others, since only the "
            "weights of an nn.Module do, got None"
        )


def check_weights(options: GenerateOptions, decoder: Decoder | None) -> None:
    """Refuse weights that cannot be read for the manifest, unless a name stands for them."""
    networks = {"model": options.model, "uncond_model": options.uncond_model}
    offloaded = [
        f"this {name}"
        for name, network in networks.items()
        if isinstance(network, nn.Module) and any_on_meta(network)
    ]
    if decoder is not None and not decoder.readable:
        offloaded.append("this decode")
    if options.model_id is None and offloaded:
        raise ValueError(
            f"model_id: expected a string that tells {offloaded[0]} from others, since its weights "
            "are on meta, where hooks offload them, and cannot be read; got None"
        )


def check_model_arguments(
    options: GenerateOptions, model_kwargs: Mapping[str, Any] | None, batch: int, *, guided: bool
) -> None:
    """Refuse arguments that the model cannot be called with for `batch` samples."""
    apart = options.uncond_model is not None
    try:
        ModelArguments.of(
            model_kwargs, options.uncond_kwargs, batch=batch, guided=guided, apart=apart
        )
    except ValueError as error:
        if options.conditions is not None or guided:
            raise
        raise ValueError(f"{error}; conditions= takes a row for each sample") from error


def checked_sample_shape(model: Model, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample: `shape` without B, or the one that the model tells."""
    resolved = resolve_shape(model, shape, 1)
    return tuple(check_int(f"shape[{i}]", n, 1, 2**32) for i, n in enumerate(resolved))[1:]


def checked_batch_size(options: GenerateOptions) -> int | None:
    """The given batch size, or None where it is to be chosen."""
    batch_size, memory, shape = options.batch_size, options.memory, options.shape
    if isinstance(batch_size, str):
        if batch_size != "auto":
            raise ValueError(f"batch_size: expected an integer or 'auto', got {batch_size!r}")
        if shape is None:
            if memory is not None:
                check_int("memory", memory, 1, 2**62)
            return None
        batch_size = shape[0]
    if memory is not None:
        raise ValueError(
            f"memory: expected None unless batch_size='auto' and shape=None, got {memory!r}"
        )
    if shape is not None and batch_size != shape[0]:
        raise ValueError(f"batch_size: expected {shape[0]}, as in shape, got {batch_size}")
    return check_int("batch_size", batch_size, 1, 2**32)


def checked_archive(path: str | os.PathLike[str], sample_shape: Sequence[int]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".npz":
        raise ValueError(f"merged: expected a name that ends in .npz, got {str(path)!r}")
    if not is_image(sample_shape):
        raise ValueError(
            "merged: expected None for samples that are no images (1 or 3 channels, H, W), got "
            f"{str(path)!r} for shape {tuple(sample_shape)}"
        )
    return target


def checked_update(update: Update) -> Update:
    """The arguments of each step as numbers; a manifest cannot hold tensors."""
    checked = update.checked(None, per_step=True)
    for name, value in vars(checked).items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, Tensor) for v in values):
            raise ValueError(f"{name}: expected a number or one per step, got a tensor")
    return checked


def unstopped(callback: Callback | None) -> Callback | None:
    """The callback, which may not end a run: files hold the samples of all steps."""
    if callback is None:
        return None

    def call(step_index: int, timestep: int, x_t: Tensor, x_0: Tensor) -> None:
        if callback(step_index, timestep, x_t, x_0) is STOP:
            raise ValueError(
                "callback: expected a result other than fastddim.STOP, since files hold samples "
                f"after the last step, got {STOP!r} at step {step_index}"
            )

    return call
