"""Model files: `<stem>.safetensors` holds the weights, `<stem>.json` everything else, and the
optional `<stem>-tuned.json` tuned steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddim.bundled import WEIGHTS
from fastddim.files import atomic_file
from fastddim.models.tuned import TunedFile, tuned_path
from fastddim.models.unet import UNet, UNetConfig
from fastddim.schedule import Schedule

RECORD = ".json"
MODEL = "model"

# A record can come from anywhere: it may not request more memory than a real schedule needs.
_MAX_TIMESTEPS = 1_000_000


def save(model: UNet, folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write `model.safetensors` (float16) and `model.json` into `folder`, each replaced atomically.

    Steps that were tuned for an earlier model in the folder are removed.

    Args:
        model: the network.
        folder: created if missing.
        record: further contents of the JSON, besides the architecture. It must hold `schedule`, the
            arguments of `Schedule.linear` (`T`, `beta_start`, `beta_end`) for the model's schedule.

    Returns:
        The path of the weights, for `load`.

    Raises:
        ValueError: `record["schedule"]` is missing or is not the model's schedule, or a weight is
            not finite in float16.
    """
    from safetensors.torch import save as to_bytes

    if "schedule" not in record or _schedule(record["schedule"]) != model.schedule:
        raise ValueError("record: expected record['schedule'] to describe the model's schedule")
    state = {name: value.detach().half().cpu() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"model: expected weights that are finite in float16, got {name}")
    description = {
        **record,
        "architecture": asdict(model.config),
        "prediction": model.prediction,
        "parameters": sum(value.numel() for value in state.values()),
    }
    path = Path(folder) / (MODEL + WEIGHTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    tuned_path(path).unlink(missing_ok=True)
    with atomic_file(path) as file:
        file.write(to_bytes(state))
    with atomic_file(path.with_suffix(RECORD)) as file:
        file.write((json.dumps(description, indent=2) + "\n").encode())
    return path


def read(path: Path) -> UNet:
    """Load the model in `path` (a `.safetensors` file with a `.json` next to it) in float32.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is corrupt, or the weights do not fit the architecture.
    """
    record_path = path.with_suffix(RECORD)
    for file in (path, record_path):
        if not file.is_file():
            raise FileNotFoundError(f"model file: expected {file}, got no such file")
    state = _read_weights(path)
    config, schedule = _read_record(record_path)
    if config.blocks > len(state):
        raise ValueError(f"{record_path}: expected blocks <= {len(state)}, got {config.blocks}")
    # On "meta" a network needs neither memory nor random numbers.
    with torch.device("meta"):
        model = UNet(config, schedule)
    _check_state(path, state, model.state_dict())
    model.load_state_dict(state, assign=True)
    model.tuned = TunedFile(tuned_path(path))
    return model


def refuse_links(path: Path) -> None:
    """Refuse a model whose files are links out of their folder.

    Raises:
        ValueError: a file is such a link.
    """
    folder = path.parent.resolve()
    for file in (path, path.with_suffix(RECORD), tuned_path(path)):
        if file.resolve().parent != folder:
            raise ValueError(f"model file: expected a file inside {folder}, got a link: {file}")


def _read_record(path: Path) -> tuple[UNetConfig, Schedule]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        architecture, prediction = dict(record["architecture"]), record["prediction"]
        names = {field.name for field in fields(UNetConfig)}
        if set(architecture) != names:
            raise ValueError(f"architecture: expected {sorted(names)}, got {sorted(architecture)}")
        config = UNetConfig(**{name: _as_tuple(value) for name, value in architecture.items()})
        schedule = _schedule(record["schedule"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the record of a model, got {error!r}") from error
    if prediction != UNet.prediction:
        raise ValueError(f"{path}: expected prediction {UNet.prediction!r}, got {prediction!r}")
    return config, schedule


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    return {name: value.float() for name, value in state.items()}


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(
            f"{path}: expected the weights of the architecture in {path.with_suffix(RECORD).name}, "
            f"got missing {sorted(missing)} and unknown {sorted(unknown)}"
        )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path}: expected {name} of shape {tuple(expected[name].shape)}, "
                f"got {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{path}: expected finite weights, got NaN or infinity in {name}")


def _schedule(record: Mapping[str, Any]) -> Schedule:
    if set(record) != {"T", "beta_start", "beta_end"}:
        raise ValueError(f"schedule: expected T, beta_start and beta_end, got {sorted(record)}")
    if record["T"] > _MAX_TIMESTEPS:
        raise ValueError(f"schedule: expected T <= {_MAX_TIMESTEPS}, got {record['T']}")
    return Schedule.linear(**record)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
