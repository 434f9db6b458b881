"""Wall time by the number of steps, against DDPM's 1000 steps: the paper's figure 4.

The baseline is the loop of 1000 steps of `diffusers.DDPMScheduler` on the same model and batch. Its
ratio to the loop of `diffusers.DDIMScheduler` with S steps is the gain of fewer steps. The ratio of
that loop to fastddim's is the gain of the faster loop. fastddim also runs with noise, at η = 1 like
DDPM, with order 2, and with the tuned steps of a model that has some.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from harness import against, case_id, in_turn
from loops import Loop, ddpm_loop, make
from sampling_loops import OWN, STEPS, TUNED, agreeing, tuned_steps

import fastddim

RESULTS = "sampling-cpu"
BASELINE = "DDPM, 1000 steps"


@pytest.mark.parametrize("name", ["policy head", "digits U-Net", "fashion U-Net"], ids=case_id)
def test_sampling(name: str, rows: list[dict[str, Any]], benchmark: Any) -> None:
    torch.set_num_threads(2)
    model, shape = make(name)
    x_T = fastddim.philox.initial_latents(shape, 0)
    contenders: dict[str, Loop] = {BASELINE: ddpm_loop(model, x_T)}
    numbers = sorted({*STEPS, *tuned_steps(model)})
    for steps in numbers:
        contenders |= {f"{n}, {steps}": loop for n, loop in agreeing(model, x_T, steps).items()}
    seconds = in_turn(contenders, budget=3, least=5, shortest=0.1)
    baseline = seconds[BASELINE]
    ddpm = against(baseline, baseline)
    for steps in numbers:
        names = [n for n in (*OWN, TUNED, "diffusers") if f"{n}, {steps}" in seconds]
        of = {n: seconds[f"{n}, {steps}"] for n in names}
        timings = {n: against(values, baseline) for n, values in of.items()}
        timings["DDPM"] = ddpm
        if "diffusers" in of:
            timings["diffusers against fastddim"] = against(of["diffusers"], of["fastddim"])
        rows.append(
            {
                "case": name,
                "shape": shape,
                "steps": steps,
                "timings": {n: asdict(timing) for n, timing in timings.items()},
            }
        )
    benchmark.extra_info["DDPM's 1000 steps"] = ddpm.seconds
    benchmark.pedantic(contenders["fastddim, 20"], rounds=5, iterations=1, warmup_rounds=1)
