"""Whole loops around models from free to heavy, timed on the host."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from loops import AGREEMENT, SEED, Loop, diffusers_loop, make
from torch import Tensor

import fastddim
from fastddim import philox
from fastddim.choices import Graph
from gpucheck import measures
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.timing import (
    difference,
    full_precision,
    in_turn,
    seconds_to_return,
    spread,
)

ROUNDS = 9
DRY_STEPS, DRY_ROUNDS = 2, 1
# Time for the calls whose return is timed: without a graph, one takes as long as its loop.
CALL_SECONDS, DRY_CALL_SECONDS = 1.0, 0.01
# Shares of the largest value. TF32 keeps ten bits, and fifty steps add up the error. In float16,
# diffusers rounds several times a step, and the fused update once.
TF32_AGREEMENT, HALF_AGREEMENT = 2e-2, 1e-2


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    for name, etas in measures.LOOP_ETAS.items():
        for eta in etas:
            measure = partial(one_loop, record, settings, name, eta)
            record.attempt(measure, model=name, eta=eta)


def one_loop(record: Record, settings: Settings, name: str, eta: float) -> None:
    """Time one model's loop in every contender that runs and agrees with the others."""
    steps = DRY_STEPS if settings.dry else measures.LOOP_STEPS
    model, shape = make(name, str(settings.device))
    x_T = philox.initial_latents(shape, 0, device=settings.device)
    about: dict[str, Any] = {"model": name, "eta": eta}
    prepare = {
        f"graph={mode}": partial(sampler, model, x_T, steps, eta, mode)
        for mode in (*settings.modes, "auto")
    }
    prepare["diffusers"] = partial(diffusers_loop, model, x_T, steps, eta)
    contenders = {}
    for contender, make_loop in prepare.items():
        loop = record.attempt(make_loop, **about, contender=contender)
        if loop is not None:
            contenders[contender] = loop
    alive = agreeing(record, contenders, base="graph=False", other_noise=eta > 0, **about)
    for run in alive.values():
        run()
    rounds = DRY_ROUNDS if settings.dry else ROUNDS
    seconds = in_turn(alive, settings.device, rounds)
    most = DRY_CALL_SECONDS if settings.dry else CALL_SECONDS
    returned = {
        contender: spread(seconds_to_return(loop, settings.device, most))
        for contender, loop in alive.items()
        if contender != "diffusers"
    }
    for contender, values in seconds.items():
        a_step = spread([value / steps for value in values])
        of_a_call = {"host_seconds": returned[contender]} if contender in returned else {}
        record.row(
            measure=measures.loop(name, eta, contender),
            seconds=a_step,
            **of_a_call,
            steps=steps,
            shape=shape,
        )
    record.show(
        **about,
        microseconds_a_step={
            contender: round(spread(values)["median"] / steps * 1e6, 2)
            for contender, values in seconds.items()
        },
        microseconds_until_a_call_returns={
            contender: round(found["median"] * 1e6, 1) for contender, found in returned.items()
        },
    )


def sampler(model: Any, x_T: Tensor, steps: int, eta: float, mode: Graph) -> Loop:
    """The loop of a prepared `fastddim.Sampler` with one kind of graph."""
    prepared = fastddim.Sampler(
        model,
        steps,
        shape=tuple(x_T.shape),
        schedule=fastddim.Schedule.linear(),
        spacing="uniform",
        eta=eta,
        device=x_T.device,
        graph=mode,
    )

    def loop() -> Tensor:
        return prepared(x_T=x_T, seed=SEED)

    return loop


def agreeing(
    record: Record,
    contenders: dict[str, Loop],
    *,
    base: str,
    other_noise: bool = False,
    most: float = AGREEMENT,
    precise: bool = True,
    **about: Any,
) -> dict[str, Loop]:
    """The contenders that run; one whose result differs from that of `base` is a problem.

    Args:
        other_noise: whether diffusers draws its own noise, and so is run but not compared.
        most: largest difference, as a share of the largest value.
        precise: whether to compare without TF32. Timed runs have torch's own settings.
    """
    results: dict[str, Tensor] = {}
    with full_precision() if precise else nullcontext():
        for contender, run in contenders.items():
            result = record.attempt(run, **about, contender=contender)
            if result is not None:
                results[contender] = result
    for contender, result in results.items():
        if base not in results or (other_noise and contender == "diffusers"):
            continue
        differs = difference(result, results[base])
        # With `<=`, NaN counts as a difference.
        say = record.row if differs <= most else record.problem
        say(**about, contender=contender, differs_from=base, difference=differs)
    return {contender: contenders[contender] for contender in results}
