"""Small trained diffusion models that ship with fastddim, and files of the same kind."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastddim.bundled import FOLDER, WEIGHTS, available
from fastddim.models.files import MODEL, RECORD, read, refuse_links, save
from fastddim.models.tuned import read_tuned, tuned_path, write_tuned
from fastddim.models.unet import UNet, UNetConfig
from fastddim.validation import check_working_device

__all__ = [
    "UNet",
    "UNetConfig",
    "available",
    "load",
    "locate",
    "read_tuned",
    "save",
    "tuned_path",
    "write_tuned",
]


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> UNet:
    """Load a trained model, ready to sample from.

    Args:
        name_or_path: one of `available()`, a `.safetensors` file, or a folder written by `save`
            (and so by `examples/train.py`). For a folder with the name of a bundled model, write
            `./digits`.
        device: device of the model; by default the CPU.
        dtype: dtype of the parameters; by default float32 (files hold float16).

    Returns:
        The model in eval mode and without gradients. Its `sample_shape` (C, H, W), `schedule` and
        `prediction` make `fastddim.sample(model, 50)` work without further arguments. Its `tuned`
        maps numbers of steps to tuned steps, as in `fastddim.sample(model, model.tuned[10])`. They
        are read from `<stem>-tuned.json`, next to the weights, on first use; without that file
        there are none.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: the name is unknown, a file is corrupt or is a link out of its folder, the
            weights do not fit the architecture, or the device does not work here.
        TypeError: `dtype` is not a floating-point dtype, or `device` does not name a device.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    if device is not None:
        check_working_device("device", device)
    model = read(locate(name_or_path)).eval().requires_grad_(False)
    return model.to(device=device, dtype=dtype)


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """Find the file of the weights that `load` reads; the record is next to it, as `.json`.

    Raises:
        ValueError: the argument is neither the name of a bundled model nor a path that could be a
            model, or it is a link out of its folder.
    """
    if name_or_path in available():
        return FOLDER / f"{name_or_path}{WEIGHTS}"
    path = Path(name_or_path)
    if path.is_dir():
        path = path / (MODEL + WEIGHTS)
    elif path.suffix != WEIGHTS:
        raise ValueError(
            f"name_or_path: expected one of {', '.join(available())}, a {WEIGHTS} file or a folder "
            f"with {MODEL}{WEIGHTS} and {MODEL}{RECORD}, got {str(name_or_path)!r}"
        )
    refuse_links(path)
    return path
