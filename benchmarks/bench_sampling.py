"""Wall time by the number of steps, against DDPM's 1000 steps: the paper's figure 4.

The baseline is the loop of 1000 steps of `diffusers.DDPMScheduler` on the same model and batch. Its
ratio to the loop of `diffusers.DDIMScheduler` with S steps is what fewer steps gain; the ratio of
that to fastddim's is what the faster loop gains. fastddim runs with noise too, at η = 1 as DDPM
does, with order 2, and with the tuned steps of a model that has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from harness import against, in_turn
from loops import SEED, Loop, assert_agree, ddpm_loop, diffusers_loop, make, step_noise
from torch import Tensor

import fastddim

RESULTS = "sampling-cpu"
STEPS = (5, 10, 20, 50, 100, 1000)
BASELINE = "DDPM, 1000 steps"
OWN: dict[str, dict[str, Any]] = {
    "fastddim": {},
    "fastddim, η = 1": {"eta": 1.0},
    "fastddim, order 2": {"order": 2},
}
"""The contenders of fastddim, and what they pass to `Sampler`."""
TUNED = "fastddim, tuned"


@pytest.mark.parametrize("name", ["policy head", "digits U-Net", "fashion U-Net"])
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


def agreeing(model: Any, x_T: Tensor, steps: int) -> dict[str, Loop]:
    """Loops of as many steps, after those of fastddim have given what they should.

    That is what diffusers' loop gives, and with order 2 or tuned steps, which diffusers lacks, what
    the reference path gives. Only tuned steps are timed where `STEPS` lacks the number.
    """
    loops: dict[str, Loop] = {}
    if steps in tuned_steps(model):
        loops[TUNED] = _tuned_loop(model, x_T, steps)
    if steps not in STEPS:
        return loops
    loops["diffusers"] = diffusers_loop(model, x_T, steps, 0.0)
    for name, options in OWN.items():
        sampler = _sampler(model, x_T, steps, **options)
        eta = options.get("eta", 0.0)
        noise = step_noise(tuple(x_T.shape), steps) if eta else None
        own = sampler(x_T=x_T, noise=noise)
        if options.get("order") == 2:
            expected = _sampler(model, x_T, steps, impl="reference", **options)(x_T=x_T)
        else:
            expected = diffusers_loop(model, x_T, steps, eta)()
        assert isinstance(own, Tensor)
        assert isinstance(expected, Tensor)
        assert_agree(own, expected, f"{name}, {steps} steps")
        loops[name] = partial(sampler, x_T=x_T, seed=SEED)
    return loops


def tuned_steps(model: Any) -> Mapping[int, fastddim.TunedSteps]:
    """The tuned steps that a model carries, by their number; of most models none."""
    found: Mapping[int, fastddim.TunedSteps] = getattr(model, "tuned", {})
    return found


def _tuned_loop(model: Any, x_T: Tensor, steps: int) -> Loop:
    fused, reference = (
        _sampler(model, x_T, tuned_steps(model)[steps], spacing="trailing", impl=impl)
        for impl in ("auto", "reference")
    )
    own, expected = fused(x_T=x_T), reference(x_T=x_T)
    assert isinstance(own, Tensor)
    assert isinstance(expected, Tensor)
    assert_agree(own, expected, f"{TUNED}, {steps} steps")
    return partial(fused, x_T=x_T, seed=SEED)


def _sampler(
    model: Any, x_T: Tensor, steps: int | fastddim.TunedSteps, spacing: str = "uniform", **more: Any
) -> fastddim.Sampler:
    return fastddim.Sampler(
        model,
        steps,
        shape=tuple(x_T.shape),
        schedule=fastddim.Schedule.linear(),
        spacing=spacing,
        **more,
    )
