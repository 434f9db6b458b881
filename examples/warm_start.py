"""Warm starts: a robot plans again at every tick, from its last plan instead of from noise.

Demonstrations pass an obstacle on either side, so the policy has two modes. If the robot plans from
noise at every tick, it changes its mind. If it plans from its last plan, shifted by a tick and
noised to the middle of the schedule, it keeps its side, with 4 evaluations of the policy a tick
instead of 10. Each call gets a new observation: the part of the way behind the robot.

The policy is exact, not trained: ε of two Gaussians around the two ways.

python examples/warm_start.py
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

import fastddim

STEPS, WARM = 10, 4  # all steps, and those of a warm start
HORIZON, TICKS = 16, 24
PACE = 1 / (TICKS + HORIZON)  # part of the way to the goal that is covered each tick
WIDTH = 0.05  # the spread of the demonstrations


class Policy(nn.Module):
    """ε for plans `[B, HORIZON, 1]`: the places between left and right at the next ticks."""

    schedule = fastddim.Schedule.cosine()

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", self.schedule.alphas_cumprod.float())

    def forward(self, plan: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """ε, given the part of the way behind the robot as `observation` `[B, 1]`."""
        a = self.alphas_cumprod[t][:, None, None]
        variance = a * WIDTH**2 + 1 - a
        ahead = observation + PACE * torch.arange(1, HORIZON + 1, device=plan.device)
        left = torch.sin(math.pi * ahead)[:, :, None]
        agreement = (plan * left).sum((1, 2), keepdim=True)
        # E[the way | plan]: both ways are equally likely, and mirror images.
        way = left * torch.tanh(a.sqrt() * agreement / variance)
        return (1 - a).sqrt() / variance * (plan - a.sqrt() * way)


def make_sampler(*, warm: bool) -> fastddim.ActionSampler:
    return fastddim.ActionSampler(
        Policy().eval(),
        STEPS,
        shape=(1, HORIZON, 1),
        warm_start=WARM if warm else None,
        model_kwargs={"observation": torch.zeros(1, 1)},
    )


def drive(sampler: fastddim.ActionSampler) -> list[float]:
    """The place of the robot after each tick."""
    places = []
    for tick in range(TICKS):
        now = {"observation": torch.full((1, 1), PACE * tick)}
        plan = sampler(model_kwargs=now, executed=1)
        places.append(plan[0, 0, 0].item())
    return places


def changes_of_side(places: list[float]) -> int:
    return sum(before * after < 0 for before, after in pairwise(places))


def main() -> None:
    for name, warm, taken in (("from noise", False, STEPS), ("warm start", True, WARM)):
        places = drive(make_sampler(warm=warm))
        evaluations, changes = STEPS + (TICKS - 1) * taken, changes_of_side(places)
        print(f"{name}: {evaluations} evaluations, {changes} changes of side in {TICKS} ticks")


if __name__ == "__main__":
    main()
