"""The description of a run: everything that its bytes depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastddim._version import __version__
from fastddim.loop.setup import Setup
from fastddim.options import GenerateOptions, Update
from fastddim.runs.manifest import VERSION, Manifest
from fastddim.runs.shards import Sharding


def describe(
    setup: Setup,
    update: Update,
    sharding: Sharding,
    *,
    seed: int,
    model_id: str | None,
    given: GenerateOptions,
) -> Manifest:
    """The manifest of a run as its file gives it back, with `batch_size` left open (None).

    Args:
        setup: how each batch is drawn.
        update: the arguments of each step as numbers.
        sharding: which samples are drawn, and into which files.
        given: what the model is called with, and the other one, if there is any.
    """
    manifest = {
        "version": VERSION,
        "model": _model(setup.model, model_id, given),
        "plan": _plan(setup, update),
        "seed": seed,
        "start": sharding.start,
        "stop": sharding.stop,
        "batch_size": None,
        "sample_shape": list(sharding.sample_shape),
        "format": sharding.format,
        "dtype": _name(setup.dtype),
        "model_dtype": _name(setup.model_dtype),
        "computation": _computation(setup),
        "versions": {"fastddim": __version__, "torch": torch.__version__},
    }
    normalized: Manifest = json.loads(json.dumps(manifest))
    return normalized


def _model(model: Any, model_id: str | None, given: GenerateOptions) -> dict[str, Any]:
    kwargs, uncond_kwargs, uncond_model = (
        given.model_kwargs,
        given.uncond_kwargs,
        given.uncond_model,
    )
    described = {
        "class": type(model).__qualname__,
        "weights": _weights(model),
        "id": model_id,
        "kwargs": digest_of(kwargs) if kwargs else None,
    }
    # Only where they are given, so that other runs have the manifests that they always had.
    if uncond_kwargs:
        described["uncond_kwargs"] = digest_of(uncond_kwargs)
    if uncond_model is not None:
        described["uncond_class"] = type(uncond_model).__qualname__
        described["uncond_weights"] = _weights(uncond_model)
    return described


def _weights(model: Any) -> str | None:
    read = isinstance(model, nn.Module) and not any_on_meta(model)
    return fingerprint(model) if read else None


def _plan(setup: Setup, update: Update) -> dict[str, Any]:
    plan, tuned = setup.plan, setup.plan.tuned
    denoised: Any = setup.denoised_fn
    weights = {} if tuned is None else {"direction": tuned.direction, "history": tuned.history}
    return {
        "timesteps": plan.timesteps.tolist(),
        "alphas_cumprod": plan.alphas_cumprod.tolist(),
        **asdict(update),
        "order": plan.order,
        **weights,
        "denoised_fn": getattr(denoised, "__qualname__", type(denoised).__qualname__),
    }


def _computation(setup: Setup) -> dict[str, Any]:
    on_cpu, on_gpu = setup.device.type == "cpu", setup.device.type == "cuda"
    return {
        "device": setup.device.type,
        "gpu": torch.cuda.get_device_name(setup.device) if on_gpu else None,
        "impl": backend_name(setup),
        "threads": torch.get_num_threads() if on_cpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32 if on_gpu else None,
    }


def backend_name(setup: Setup) -> str:
    """The name of the backend in use, such as "cpu"; `impl` never is "auto" in a manifest."""
    return setup.backend.__name__.rpartition(".")[2]


def any_on_meta(model: nn.Module) -> bool:
    """True where weights have no bytes that a fingerprint could be of."""
    return any(value.is_meta for value in chain(model.parameters(), model.buffers()))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        _add_tensor(digest, name, value)
    return digest.hexdigest()


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 over named values, with the content of those that are tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            _add_tensor(digest, name, value)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
    flat = value.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
