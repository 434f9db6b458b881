"""MODEL on the command line: a bundled model, a file of fastddim's, or a diffusers folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from fastddim import models
from fastddim.adapter import Model, own_sample_shape
from fastddim.bundled import WEIGHTS
from fastddim.choices import PREDICTIONS, Prediction
from fastddim.models.files import MODEL
from fastddim.schedule import Schedule


@dataclass(frozen=True)
class Source:
    """A model, and the sampling arguments that belong to it."""

    model: Model
    sample_shape: tuple[int, int, int]
    schedule: Schedule
    prediction: Prediction


def load(
    name: str, device: torch.device, prediction: Prediction | None, *, labelled: bool = False
) -> Source:
    """Load the model that `name` stands for onto `device`.

    Args:
        prediction: the quantity that the model predicts, if the user gives it.
        labelled: whether the model will get class labels.

    Raises:
        click.UsageError: `name` does not stand for a model.
        click.ClickException, ValueError, OSError: the files exist, but hold no usable model.
    """
    source = _load(name, device, labelled)
    if len(source.sample_shape) != 3 or source.sample_shape[0] not in (1, 3):
        raise click.ClickException(
            f"{name}: expected a model of grey or RGB images (C, H, W), got {source.sample_shape}"
        )
    return source if prediction is None else replace(source, prediction=prediction)


def _load(name: str, device: torch.device, labelled: bool) -> Source:
    path = Path(name)
    own = path.suffix == WEIGHTS or (path / (MODEL + WEIGHTS)).is_file()
    if name in models.available() or (own and path.exists()):
        model = models.load(name, device=device)
        return Source(model, model.sample_shape, model.schedule, model.prediction)
    if any((path / file).is_file() for file in ("model_index.json", "config.json")):
        return _load_diffusers(path, device, labelled)
    names = ", ".join(models.available())
    raise click.UsageError(
        f"MODEL: expected {names}, a {WEIGHTS} file, a folder with {MODEL}{WEIGHTS} or a diffusers "
        f"folder, got {name!r}"
    )


def _load_diffusers(folder: Path, device: torch.device, labelled: bool) -> Source:
    _refuse_latent_pipeline(folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    _refuse_conditional(unet, labelled)
    schedule, prediction = _read_scheduler(folder)
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise click.ClickException(
            f"{folder}: expected diffusers to be installed for a diffusers model "
            f"(pip install diffusers), got: {error}"
        ) from error
    unet_class: Any = UNet2DModel
    model = unet_class.from_pretrained(
        unet, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
    )
    shape = own_sample_shape(model)
    if shape is None:
        raise click.ClickException(f"{unet}: expected a sample_size in config.json, got none")
    return Source(
        model.eval().requires_grad_(False).to(device),
        (shape[0], shape[1], shape[2]),
        schedule,
        prediction,
    )


def _refuse_latent_pipeline(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        return
    for decoder in ("vae", "vqvae", "movq"):
        if decoder in _read_json(index):
            raise click.ClickException(
                f"{folder}: expected a model of images, got latents of the pipeline's {decoder!r}; "
                "use fastddim.sample in Python and decode its result"
            )


def _refuse_conditional(unet: Path, labelled: bool) -> None:
    config = _read_json(unet / "config.json")
    kind, embedded = config.get("_class_name"), config.get("num_class_embeds")
    labels = embedded or config.get("class_embed_type")
    if kind == "UNet2DModel" and (not labels or (labelled and embedded)):
        return
    got, way = kind, ""
    if labels:
        got = f"a class-conditional {kind}"
        way = "give it --classes (fastddim sample, fastddim generate), or "
    raise click.ClickException(
        f"{unet}: expected an unconditional UNet2DModel, got {got}; "
        f"{way}use fastddim.sample in Python, whose model_kwargs hold the condition"
    )


def _read_scheduler(folder: Path) -> tuple[Schedule, Prediction]:
    candidates = [folder / "scheduler", folder, folder.parent / "scheduler"]
    files = [candidate / "scheduler_config.json" for candidate in candidates]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        click.echo(
            f"fastddim: {folder} has no scheduler_config.json: assuming epsilon prediction and "
            "DDPM's linear schedule",
            err=True,
        )
        return Schedule.linear(), "epsilon"
    config = _read_json(file)
    if "beta_schedule" not in config:
        raise click.ClickException(
            f"{file}: expected a scheduler with a beta_schedule, got {config.get('_class_name')}"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise click.ClickException(
            f"{file}: expected prediction_type {', '.join(PREDICTIONS)}, got {prediction!r}"
        )
    return Schedule.from_diffusers(config), prediction


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.ClickException(f"{file}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise click.ClickException(
            f"{file}: expected a JSON object, got a {type(content).__name__}"
        )
    return content
