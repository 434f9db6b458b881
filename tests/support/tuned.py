"""Tuned steps with numbers that no tuner chose."""

from __future__ import annotations

import random
from typing import Any

import torch

from fastddim import Schedule, TunedSteps
from fastddim.elementary import sqrt
from fastddim.options import Update
from fastddim.plan import history_weights
from fastddim.tuned import TunedFor

LINEAR = Schedule.linear()


def tuned_for(schedule: Schedule = LINEAR, **options: Any) -> TunedFor:
    return TunedFor.of(schedule, Update(**options).checked(None, per_step=True))


def random_steps(
    S: int = 5, seed: int = 0, schedule: Schedule = LINEAR, **options: Any
) -> TunedSteps:
    """S steps with weights of the size of those of order 2, far from any that order 2 has."""
    rng = random.Random(f"{S} {seed}")
    timesteps = sorted(rng.sample(range(schedule.T), S), reverse=True)
    return TunedSteps(
        timesteps=tuple(timesteps),
        direction=tuple(rng.uniform(-0.5, 1.0) for _ in range(S)),
        history=(0.0, *(rng.uniform(-0.5, 0.5) for _ in range(S - 1))),
        tuned_for=tuned_for(schedule, **options),
        errors={"tuned": 0.0123456789, "order 1": 0.5, "order 2": 1 / 3},
        record={"seed": seed, "teacher": {"steps": 200}, "versions": ["1", None]},
    )


def steps_of_order(order: int, timesteps: list[int], schedule: Schedule = LINEAR, **options: Any):
    """The weights that `order` itself has at these timesteps."""
    alphas = [*schedule.alphas_cumprod[torch.tensor(timesteps)].tolist(), 1.0]
    weights = [
        history_weights(order, *alphas[s - 1 : s + 2])[0] if s else 0.0
        for s in range(len(timesteps))
    ]
    return TunedSteps(
        timesteps=tuple(timesteps),
        direction=tuple(sqrt(1 - p) + w for p, w in zip(alphas[1:], weights, strict=True)),
        history=tuple(-w for w in weights),
        tuned_for=tuned_for(schedule, **options),
        chosen=f"order {order}",
    )
