"""The noise level at which a run starts, beside latents that are drawn as noise alone."""

from __future__ import annotations

import numbers
from typing import NamedTuple

from fastddim.choices import Spacing
from fastddim.notices import warn_once
from fastddim.options import Steps
from fastddim.plan import Plan

MOST_DATA = 0.5
"""ᾱ from which on a state is more of the data than of noise."""


class LateStart(NamedTuple):
    """A first timestep at which the model expects more of the data than of noise.

    Attributes:
        timestep: the first that is visited.
        alpha_cumprod: ᾱ there.
        chosen: by which argument.
    """

    timestep: int
    alpha_cumprod: float
    chosen: str

    @classmethod
    def of(cls, plan: Plan, steps: Steps, spacing: Spacing) -> LateStart | None:
        """What `warn` says of a plan for these `steps`; None where it starts early enough."""
        alpha = float(plan.alphas_cumprod[0])
        if alpha <= MOST_DATA:
            return None
        chosen = f"spacing={spacing!r}" if isinstance(steps, numbers.Integral) else "steps"
        return cls(int(plan.timesteps[0]), alpha, chosen)

    def warn(self) -> None:
        """Warn of it once."""
        warn_once(
            f"x_T is drawn as noise alone, but the first timestep, {self.timestep} by "
            f"{self.chosen}, is one of more data than noise: alphas_cumprod is "
            f"{self.alpha_cumprod:.4g} there; pass x_T, or start later in the schedule, as "
            "spacing='trailing' does with any number of steps",
            "late start",
            self.timestep,
            self.alpha_cumprod,
        )
