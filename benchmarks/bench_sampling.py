"""Wall time by the number of steps, against DDPM's 1000 steps: the paper's figure 4.

The baseline is the loop of 1000 steps of `diffusers.DDPMScheduler` on the same model and batch. Its
ratio to the loop of `diffusers.DDIMScheduler` with S steps is what fewer steps gain; the ratio of
that to fastddim's is what the faster loop gains.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from harness import compare
from loops import ddpm_loop, diffusers_loop, make

import fastddim

RESULTS = "sampling-cpu"
STEPS = (5, 10, 20, 50, 100, 1000)
BASELINE = "DDPM, 1000 steps"


@pytest.mark.parametrize("name", ["policy head", "digits U-Net", "fashion U-Net"])
def test_sampling(name: str, rows: list[dict[str, Any]], benchmark: Any) -> None:
    torch.set_num_threads(2)
    model, shape = make(name)
    x_T = fastddim.philox.initial_latents(shape, 0)
    schedule = fastddim.Schedule.linear()
    contenders: dict[str, Any] = {BASELINE: ddpm_loop(model, x_T)}
    for steps in STEPS:
        sampler = fastddim.Sampler(model, steps, shape=shape, schedule=schedule)
        contenders[f"fastddim, {steps}"] = partial(sampler, x_T=x_T)
        contenders[f"diffusers, {steps}"] = diffusers_loop(model, x_T, steps, 0.0)
        expected = sampler(x_T=x_T)
        assert isinstance(expected, torch.Tensor)
        tolerance = 2e-3 * expected.abs().max().item()
        got = contenders[f"diffusers, {steps}"]()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, msg=f"{steps} steps")
    timings = compare(contenders, BASELINE, budget=3, least=3)
    for steps in STEPS:
        names = (BASELINE, f"fastddim, {steps}", f"diffusers, {steps}")
        keys = ("DDPM", "fastddim", "diffusers")
        rows.append(
            {
                "case": name,
                "shape": shape,
                "steps": steps,
                "timings": {key: asdict(timings[n]) for key, n in zip(keys, names, strict=True)},
            }
        )
    benchmark.extra_info["DDPM's 1000 steps"] = timings[BASELINE].seconds
    benchmark.pedantic(contenders["fastddim, 20"], rounds=5, iterations=1, warmup_rounds=1)
