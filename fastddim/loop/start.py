"""The start of a run: its first step, its state and noise level, and its seed."""

from __future__ import annotations

import numbers
from typing import NamedTuple

from torch import Tensor

from fastddim.choices import Spacing, SpacingSynonym
from fastddim.notices import warn_once
from fastddim.options import CallOptions, Drawing, Seed, Steps
from fastddim.plan import Plan, StepKind
from fastddim.validation import check_int

MOST_DATA = 0.5
"""ᾱ from which on a state has more of the data than of noise."""


class LateStart(NamedTuple):
    """A first timestep at which the model expects more of the data than of noise.

    Attributes:
        timestep: the first that is visited.
        alpha_cumprod: ᾱ at this timestep.
        chosen: the argument that chose it.
    """

    timestep: int
    alpha_cumprod: float
    chosen: str

    @classmethod
    def of(cls, plan: Plan, steps: Steps, spacing: Spacing | SpacingSynonym) -> LateStart | None:
        """The late start of a plan for these `steps`; None where it starts early enough."""
        alpha = float(plan.alphas_cumprod[0])
        if alpha <= MOST_DATA:
            return None
        chosen = f"spacing={spacing!r}" if isinstance(steps, numbers.Integral) else "steps"
        return cls(int(plan.timesteps[0]), alpha, chosen)

    def warn(self) -> None:
        """Warn of the late start, once."""
        warn_once(
            f"x_T is drawn as noise alone, but the first timestep, {self.timestep} by "
            f"{self.chosen}, is one of more data than noise: alphas_cumprod is "
            f"{self.alpha_cumprod:.4g} there; pass x_T, or start later in the schedule, as "
            "spacing='trailing' does with any number of steps",
            "late start",
            self.timestep,
            self.alpha_cumprod,
        )


def check_first_step(options: Drawing, steps: int, kind: StepKind) -> int:
    """The index of the first step that is taken, checked against the other options."""
    first = options.first_step
    # Most calls begin at 0, and need no check.
    if type(first) is not int or first != 0:
        first = check_int("first_step", first, 0, steps - 1)
    if first == 0:
        return first
    if kind.history:
        raise ValueError(
            "first_step: expected 0 at order 2 and with tuned steps, which read the epsilon of the "
            f"step before, got {first}"
        )
    if options.x_T is None:
        raise ValueError(f"x_T: expected the state before step {first}, the first_step, got None")
    if options.mask is not None and options.seed is None:
        raise ValueError(
            f"seed: expected that of the whole run with mask and first_step={first}, since known "
            "data are mixed with its latents, got None"
        )
    return first


def seed_of(options: CallOptions, *, noisy: bool) -> Seed | None:
    """The seed that was asked for, or 0 where none was and nothing is drawn from it.

    Args:
        noisy: whether the steps add noise.
    """
    noise = options.noise
    latents = options.x_T is None and (noise is None or isinstance(noise, Tensor))
    drawn = latents or (noisy and noise is None)
    return 0 if options.seed is None and not drawn else options.seed
