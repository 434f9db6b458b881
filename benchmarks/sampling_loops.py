"""The loops of S steps that `bench_sampling.py` times, after a check of their results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from loops import SEED, Loop, assert_agree, diffusers_loop, step_noise
from torch import Tensor

import fastddim

STEPS = (5, 10, 20, 50, 100, 1000)
OWN: dict[str, dict[str, Any]] = {
    "fastddim": {},
    "fastddim, η = 1": {"eta": 1.0},
    "fastddim, order 2": {"order": 2},
}
"""The contenders of fastddim, with the arguments that they pass to `Sampler`."""
TUNED = "fastddim, tuned"


def agreeing(model: Any, x_T: Tensor, steps: int) -> dict[str, Loop]:
    """Loops with the same number of steps, whose results are checked first.

    The reference is diffusers' loop or, for order 2 and tuned steps, which diffusers lacks, the
    reference path. If `STEPS` lacks the number, only tuned steps are timed.
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
        assert_agree(own, expected, f"{name}, {steps} steps")
        loops[name] = partial(sampler, x_T=x_T, seed=SEED)
    return loops


def tuned_steps(model: Any) -> Mapping[int, fastddim.TunedSteps]:
    """The tuned steps of a model, by their number; empty for most models."""
    found: Mapping[int, fastddim.TunedSteps] = getattr(model, "tuned", {})
    return found


def _tuned_loop(model: Any, x_T: Tensor, steps: int) -> Loop:
    fused, reference = (
        _sampler(model, x_T, tuned_steps(model)[steps], spacing="trailing", impl=impl)
        for impl in ("auto", "reference")
    )
    own, expected = fused(x_T=x_T), reference(x_T=x_T)
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
