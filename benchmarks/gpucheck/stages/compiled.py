"""The loop that people write for speed today: model and equation 12 under torch.compile."""

from __future__ import annotations

import time
from functools import partial

import torch
from loops import compiled_loop, make

from fastddim import philox
from gpucheck import measures
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.stages.loops import DRY_STEPS, TF32_AGREEMENT, agreeing, sampler
from gpucheck.timing import host_seconds, spread

ROUNDS, DRY_ROUNDS = 5, 1


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    for name in measures.COMPILED_MODELS:
        record.attempt(partial(one_model, record, settings, name), model=name)


def one_model(record: Record, settings: Settings, name: str) -> None:
    steps = DRY_STEPS if settings.dry else measures.LOOP_STEPS
    model, shape = make(name, str(settings.device))
    x_T = philox.initial_latents(shape, 0, device=settings.device)
    # A rehearsal compiles nothing, since that takes a minute on a CPU.
    options = {"backend": "eager"} if settings.dry else {"mode": "reduce-overhead"}
    contenders = {
        "graph=False": sampler(model, x_T, steps, 0.0, False),
        "torch.compile": compiled_loop(model, x_T, steps, 0.0, **options),
    }
    start = time.perf_counter()
    # The compiled graphs would keep the setting of TF32 under which they were recorded.
    alive = agreeing(
        record, contenders, base="graph=False", most=TF32_AGREEMENT, precise=False, model=name
    )
    record.row(model=name, compile_seconds=round(time.perf_counter() - start, 2))
    loop = alive.get("torch.compile")
    if loop is None:
        return
    # The first calls warm up and record.
    for _ in range(2):
        loop()
    rounds = DRY_ROUNDS if settings.dry else ROUNDS
    seconds = [host_seconds(loop, settings.device) / steps for _ in range(rounds)]
    record.show(measure=measures.compiled(name), seconds=spread(seconds), steps=steps)
