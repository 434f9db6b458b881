"""DDPM's 1000 steps against DDIM's 50, in diffusers and in fastddim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from loops import Loop, ddpm_loop, diffusers_loop, make
from torch import Tensor

from fastddim import philox
from fastddim.choices import Graph
from gpucheck import measures
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.stages.loops import sampler
from gpucheck.timing import host_seconds, spread

FEW, MANY, ROUNDS = 50, 1000, 5
DRY_FEW, DRY_MANY, DRY_ROUNDS = 2, 4, 1


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    for name in measures.DDPM_MODELS:
        record.attempt(partial(one_model, record, settings, name), model=name)


def one_model(record: Record, settings: Settings, name: str) -> None:
    few, many = (DRY_FEW, DRY_MANY) if settings.dry else (FEW, MANY)
    model, shape = make(name, str(settings.device))
    x_T = philox.initial_latents(shape, 0, device=settings.device)
    prepare = contenders(model, x_T, few, many, settings.modes)
    for contender, make_loop in prepare.items():
        about = {"model": name, "contender": contender}
        loop = record.attempt(make_loop, **about)
        if loop is not None:
            measure = partial(one_contender, record, settings, name, contender, loop)
            record.attempt(measure, **about)


def contenders(
    model: Any, x_T: Tensor, few: int, many: int, modes: Sequence[Graph]
) -> dict[str, Callable[[], Loop]]:
    """Functions that prepare the loops, by the contender's name.

    The whole loop is one graph if it is short, else there is one graph a step.
    """
    mode_of_few, mode_of_many = modes[-1], modes[:2][-1]
    return {
        f"diffusers DDIM, {few}": partial(diffusers_loop, model, x_T, few, 0.0),
        f"diffusers DDPM, {many}": partial(ddpm_loop, model, x_T, many),
        f"fastddim, {few}": partial(sampler, model, x_T, few, 0.0, mode_of_few),
        f"fastddim, {many}": partial(sampler, model, x_T, many, 1.0, mode_of_many),
    }


def one_contender(
    record: Record, settings: Settings, name: str, contender: str, loop: Loop
) -> None:
    """Seconds of whole runs, and of only one run for the slowest contender."""
    slow = contender.startswith("diffusers DDPM")
    if not slow:
        loop()
    rounds = 1 if slow else DRY_ROUNDS if settings.dry else ROUNDS
    seconds = [host_seconds(loop, settings.device) for _ in range(rounds)]
    record.show(measure=measures.ddpm(name, contender), seconds=spread(seconds), rounds=rounds)
