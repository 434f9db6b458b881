"""Tuned steps taken one call at a time, and the state that a scheduler keeps between the calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastddim.integrations._coefficients import limits
from fastddim.plan import Update, make_plan
from fastddim.schedule import Schedule
from fastddim.steptable import StepTable
from fastddim.tuned import TunedSteps, load_steps, schedule_digest

CONFIG_KEY = "_fastddim_tuned"
"""The key of tuned steps in a config. Other classes keep entries that begin with an underscore."""


@dataclass(eq=False)
class TunedRun:
    """A run over tuned timesteps.

    Attributes:
        steps: the tuned steps.
        taken: number of steps taken so far.
        epsilon: epsilon of the last step.
    """

    steps: TunedSteps
    taken: int = 0
    epsilon: Tensor | None = None

    def take(
        self, table: StepTable, t: int, state: Tensor, model_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (x_prev, x_0) of the step at timestep t.

        Raises:
            ValueError: t is neither the first of the timesteps nor the next one, or the state is
                not like that of the step before.
        """
        timesteps = self.steps.timesteps
        following = [timesteps[0], *timesteps[self.taken : self.taken + 1]]
        if t not in following:
            expected = " or ".join(map(str, dict.fromkeys(following)))
            raise ValueError(
                f"timestep: expected {expected}, since each tuned step reads the epsilon of the "
                f"one before it, got {t}"
            )
        row = 0 if t == timesteps[0] else self.taken
        # A first step gives the epsilon before it the weight 0.
        before = torch.zeros_like(state) if row == 0 else self.epsilon
        assert before is not None
        if (before.shape, before.dtype, before.device) != (state.shape, state.dtype, state.device):
            raise ValueError(
                f"sample: expected {tuple(before.shape)}, {before.dtype} and {before.device}, as "
                f"at the step before, got {tuple(state.shape)}, {state.dtype} and {state.device}"
            )
        epsilon = torch.empty_like(state)
        results = table(state, model_output, row, history=before, epsilon=epsilon)
        self.taken, self.epsilon = row + 1, epsilon
        return results


def tuned_steps(given: Any) -> TunedSteps:
    """The tuned steps in an object, a file or an entry of a config."""
    if isinstance(given, TunedSteps):
        return given
    if isinstance(given, str | os.PathLike):
        return load_steps(given)
    if isinstance(given, Mapping):
        return TunedSteps.from_dict(given)
    raise TypeError(f"tuned: expected TunedSteps or a path, got {type(given).__name__}")


def tuned_table(
    tuned: TunedSteps, config: Mapping[str, Any], alphas: Tensor, rederive_eps: bool
) -> StepTable:
    """The table of tuned steps, one row for each of their timesteps.

    Guidance belongs to the pipeline, and cannot be compared with what the steps were tuned for.

    Raises:
        ValueError: the steps were tuned for something else.
    """
    clip, rescaling = limits(config)
    update = Update(
        prediction=config["prediction_type"],
        clip=clip,
        rederive_eps=rederive_eps,
        dynamic_thresholding_ratio=None if rescaling is None else rescaling.ratio,
        sample_max_value=None if rescaling is None else rescaling.limit,
    ).checked(None)
    unguided = replace(tuned.tuned_for, guidance_scale=None, guidance_rescale=0.0)
    plan = make_plan(_schedule(tuned, config, alphas), replace(tuned, tuned_for=unguided), update)
    return StepTable(plan.table, rescaling=plan.kind.rescaling)


def _schedule(tuned: TunedSteps, config: Mapping[str, Any], alphas: Tensor) -> Schedule:
    """ᾱ of the scheduler, in float64 if the steps were tuned for the schedule of its config."""
    try:
        exact = Schedule.from_diffusers(config)
    except ValueError:
        exact = None
    if (
        exact is not None
        and schedule_digest(exact) == tuned.tuned_for.schedule
        and len(alphas) == exact.T
        and _alike(alphas.to("cpu", torch.float64), exact.alphas_cumprod)
    ):
        return exact
    return Schedule.from_alphas_cumprod(alphas)


def _alike(alphas: Tensor, exact: Tensor) -> bool:
    """Tell whether ᾱ differ only by rounding, as in a product of a thousand float32 factors."""
    return torch.allclose(alphas, exact, rtol=1e-3, atol=1e-6)
