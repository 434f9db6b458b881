"""The steps that a scheduler of diffusers takes, as a plan.

Timesteps, ᾱ and the timestep before each are the scheduler's own. Coefficients are computed with
its operations in its dtype. Then some steps of the plan are compared with those of the scheduler.

diffusers is not imported: a scheduler is known by the name of its class.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.integrations._coefficients import (
    FIXED_VARIANCES,
    ancestral_row,
    ddim_row,
    finite,
    limits,
    valid,
)
from fastddim.integrations._tables import step_table
from fastddim.plan import Plan, Row, StepKind, stack_row

SCHEDULERS: dict[str, tuple[str, ...]] = {
    "DDIMScheduler": ("eta", "use_clipped_model_output"),
    "DDPMScheduler": (),
}
"""The schedulers whose steps are known, each with the known arguments of its `step`."""

_COMPARED = 8
"""The largest number of steps of a scheduler that are compared with the plan's."""


class Uncovered(Exception):
    """A reason to use a policy's own loop."""


def scheduler_kind(scheduler: Any) -> str | None:
    """The class among `SCHEDULERS` that an object belongs to, by class names, or None."""
    names = {base.__name__ for base in type(scheduler).__mro__}
    return next((name for name in SCHEDULERS if name in names), None)


class SchedulerSteps(NamedTuple):
    """The steps that a scheduler takes.

    Attributes:
        plan: timesteps and coefficients.
        drawn: the steps for which the scheduler draws noise.
    """

    plan: Plan
    drawn: list[int]

    @classmethod
    def of(cls, scheduler: Any, steps: int, step_kwargs: Mapping[str, Any]) -> SchedulerSteps:
        """The steps of a scheduler, which is not changed.

        Args:
            steps, step_kwargs: as in `LoopCall`.

        Raises:
            Uncovered: its steps are not those of DDPM or DDIM.
            ValueError: the scheduler refuses the number of steps, in its own words.
        """
        kind = scheduler_kind(scheduler)
        if kind is None:
            raise Uncovered(
                f"its scheduler is none of {', '.join(SCHEDULERS)}: {type(scheduler).__name__}"
            )
        for name, value in step_kwargs.items():
            if name not in SCHEDULERS[kind] or not isinstance(value, int | float):
                raise Uncovered(f"it calls {kind}.step with {name}={value!r}")
        # A copy, since other threads may be using the scheduler's own timesteps.
        own = copy.deepcopy(scheduler)
        own.alphas_cumprod = own.alphas_cumprod.detach().cpu()
        own.set_timesteps(steps)
        if not valid(own.config):
            raise Uncovered(f"its scheduler has prediction_type={own.config['prediction_type']!r}")
        found = _ancestral(own) if kind == "DDPMScheduler" else _ddim(own, **step_kwargs)
        _compare(own, found, step_kwargs)
        return found


def _ancestral(scheduler: Any) -> SchedulerSteps:
    config, timesteps = scheduler.config, scheduler.timesteps
    if config["variance_type"] not in FIXED_VARIANCES:
        raise Uncovered(f"its scheduler has variance_type={config['variance_type']!r}")
    if not hasattr(scheduler, "previous_timestep"):
        raise Uncovered("its scheduler is of an old release of diffusers")
    before = torch.tensor([int(scheduler.previous_timestep(t)) for t in timesteps])
    a, p = _alphas(scheduler, before, torch.ones(()))
    row = ancestral_row(config, a, p)
    noisy = timesteps > 0
    row = row._replace(pn=torch.where(noisy, row.pn, 0.0))
    return _as_plan(scheduler, p, row, noisy)


def _ddim(
    scheduler: Any, eta: float = 0.0, use_clipped_model_output: bool = False
) -> SchedulerSteps:
    config, timesteps = scheduler.config, scheduler.timesteps
    # The timestep before is this one, whatever timestep is visited next.
    before = timesteps - config["num_train_timesteps"] // scheduler.num_inference_steps
    a, p = _alphas(scheduler, before, scheduler.final_alpha_cumprod)
    row = ddim_row(config, a, p, eta, use_clipped_model_output)
    return _as_plan(scheduler, p, row, torch.full(timesteps.shape, eta > 0))


def _alphas(scheduler: Any, before: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """ᾱ `[S]` of the timesteps, and of the timesteps before them, negative past the last."""
    alphas = scheduler.alphas_cumprod
    return alphas[scheduler.timesteps], torch.where(
        before >= 0, alphas[before.clamp(min=0)], final.to(alphas)
    )


def _as_plan(scheduler: Any, p: Tensor, row: Row, noisy: Tensor) -> SchedulerSteps:
    config, timesteps = scheduler.config, scheduler.timesteps
    drawn = noisy.nonzero().flatten().tolist()
    plan = Plan(
        timesteps=timesteps,
        alphas_cumprod=torch.cat([scheduler.alphas_cumprod[timesteps], p[-1:]]).double(),
        table=stack_row(finite(row)),
        kind=StepKind(rescaling=limits(config)[1], noisy=bool(drawn), guided=False),
        order=1,
    )
    return SchedulerSteps(plan, drawn)


def _compare(scheduler: Any, steps: SchedulerSteps, step_kwargs: Mapping[str, Any]) -> None:
    """Refuse steps that differ from those of the scheduler, which may be of a subclass or of a
    release with other formulas.

    Raises:
        Uncovered: a step of the scheduler gives another result, or fails.
    """
    plan = steps.plan
    table = step_table(Row(*plan.table.unbind(-1)), plan.kind.rescaling)
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 16, 4)
    output = 0.7 * x.flip(1) + 0.1
    picked = torch.linspace(0, plan.steps - 1, min(plan.steps, _COMPARED)).round().int().tolist()
    for s in picked:
        t = plan.timesteps[s]
        noise = None
        if s in steps.drawn:
            noise = torch.randn(x.shape, generator=_seeded(), dtype=x.dtype)
        own, _ = table.take(x, output, s, noise=noise)
        try:
            result = scheduler.step(output, t, x, generator=_seeded(), **step_kwargs)
        except Exception as error:
            raise Uncovered(f"its scheduler's step at timestep {t} fails: {error}") from error
        theirs = result.prev_sample
        # Coefficients agree to the last bits of their float32.
        limit = 1e-6 * max(1.0, theirs.abs().max().item())
        if not torch.allclose(own, theirs, rtol=0, atol=limit, equal_nan=True):
            raise Uncovered(
                f"the step of its scheduler, {type(scheduler).__name__}, at timestep {t} is "
                "neither DDPM's nor DDIM's"
            )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
