"""The whole loop of 50 steps, for models from free to heavy: the effect of the step.

Contenders run the same model on the same timesteps from the same x_T. First they get the same
noise, and all must agree. When they are timed, each draws its own noise.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from harness import SETTLED, case_id, compare
from loops import (
    MODELS,
    assert_agree,
    compiled_loop,
    diffusers_loop,
    make,
    official_loop,
    step_noise,
)

import fastddim

RESULTS = "loops-cpu"
STEPS = 50
CASES = [(name, 0.0) for name in MODELS] + [("null model", 1.0), ("policy head", 1.0)]


@pytest.mark.parametrize(
    ("name", "eta"), CASES, ids=[case_id(n, f"eta{eta:g}") for n, eta in CASES]
)
def test_loop(name: str, eta: float, rows: list[dict[str, Any]], benchmark: Any) -> None:
    torch.set_num_threads(2)
    model, shape = make(name)
    x_T = fastddim.philox.initial_latents(shape, 0)
    options: dict[str, Any] = {
        "shape": shape,
        "schedule": fastddim.Schedule.linear(),
        "eta": eta,
        "spacing": "uniform",
    }
    sampler = fastddim.Sampler(model, STEPS, **options)
    # Around a model without cost, or a user's own, the gain from compiling is the compiler's.
    fused = fastddim.Sampler(torch.compile(model, dynamic=False), STEPS, **options)
    contenders = {
        "fastddim": lambda: sampler(x_T=x_T, seed=3),
        "diffusers": diffusers_loop(model, x_T, STEPS, eta),
        "official": official_loop(model, x_T, STEPS, eta),
        "fastddim, compiled model": lambda: fused(x_T=x_T, seed=3),
        "torch.compile": compiled_loop(model, x_T, STEPS, eta),
    }
    noise = step_noise(shape, STEPS) if eta else None
    expected = sampler(x_T=x_T, noise=noise)
    for contender, run in contenders.items():
        got = fused(x_T=x_T, noise=noise) if contender == "fastddim, compiled model" else run()
        if contender != "fastddim":
            assert_agree(got, expected, contender)
    timings = compare(contenders, "fastddim", budget=3, shortest=SETTLED)
    rows.append(
        {
            "case": name,
            "eta": eta,
            "shape": shape,
            "steps": STEPS,
            "timings": {n: asdict(timing) for n, timing in timings.items()},
        }
    )
    benchmark.extra_info["against diffusers"] = timings["diffusers"].ratio
    benchmark.pedantic(contenders["fastddim"], rounds=5, iterations=1, warmup_rounds=1)
