"""The description of a run: everything that its bytes depend on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from fastddim._version import __version__
from fastddim.loop.setup import Setup
from fastddim.options import Update
from fastddim.runs.conditions import Conditions
from fastddim.runs.decoding import Decoder
from fastddim.runs.differences import Manifest
from fastddim.runs.fingerprints import digest_of, weights_of
from fastddim.runs.manifest import VERSION
from fastddim.runs.options import GenerateOptions
from fastddim.runs.shards import Sharding


def describe(
    options: GenerateOptions,
    setup: Setup,
    update: Update,
    sharding: Sharding,
    *,
    seed: int,
    conditions: Conditions | None,
    decoder: Decoder | None,
) -> Manifest:
    """The manifest of a run as its file gives it back.

    `batch_size` is left open (None), and so are the digests of conditions, which depend on it.
    Entries that a run has no use for are left out: runs of earlier versions can then go on.

    Args:
        setup: the setup of each batch.
        update: the arguments of each step as numbers.
        sharding: the division of the samples into files.
        given: the arguments of the model, and the unconditional model where there is one.
    """
    manifest = {
        "version": VERSION,
        "model": _model(options),
        "plan": described_plan(setup, update),
        "seed": seed,
        "start": sharding.start,
        "stop": sharding.stop,
        "batch_size": None,
        "sample_shape": list(sharding.sample_shape),
        "format": sharding.format,
        "dtype": dtype_name(setup.dtype),
        "model_dtype": dtype_name(setup.model_dtype),
        "computation": described_computation(setup),
        "versions": {"fastddim": __version__, "torch": torch.__version__},
    }
    if conditions is not None:
        manifest["conditions"] = None
        if conditions.label_name is not None:
            manifest["labels"] = conditions.label_name
    if decoder is not None:
        manifest["decode"] = decoder.describe(setup.shape[1:])
    normalized: Manifest = json.loads(json.dumps(manifest))
    return normalized


def _model(options: GenerateOptions) -> dict[str, Any]:
    model, uncond_model = options.model, options.uncond_model
    described = {
        "class": type(model).__qualname__,
        "weights": weights_of(model),
        "id": options.model_id,
        "kwargs": digest_of(options.model_kwargs) if options.model_kwargs else None,
    }
    if options.uncond_kwargs:
        described["uncond_kwargs"] = digest_of(options.uncond_kwargs)
    if uncond_model is not None:
        described["uncond_class"] = type(uncond_model).__qualname__
        described["uncond_weights"] = weights_of(uncond_model)
    return described


def described_plan(setup: Setup, update: Update) -> dict[str, Any]:
    """Timesteps, noise levels and options of each step."""
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


def described_computation(setup: Setup) -> dict[str, Any]:
    """The machine, the dtypes and the backend, which the last bits depend on."""
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


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")
