"""The loops that a diffusion policy is run in: a call for each tick of its control loop.

All loops run the same network on the timesteps and the schedule of LeRobot's default configuration,
with other features of the observation at each tick.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from gpucheck.timing import device_seconds, wait
from policy_networks import ACTION_DIM, CONDITION, HORIZON, make_policy
from torch import Tensor, nn

import fastddim
from fastddim.choices import Graph

Tick: TypeAlias = Callable[[int], Tensor]
"""Draws the chunk of a tick, given by its number; the next chunk may use the same memory."""

TIMESTEPS = 100
SEED = 2
AGREEMENT = 5e-5
"""The largest allowed difference of two chunks of actions, which are in [-1, 1].

The first step multiplies the network's rounding by √((1 − ᾱ)/ᾱ) = 7, and rounding depends on the
alignment of memory: 1.2e-5 has been seen.
"""
COMPILED_AGREEMENT = 1e-4
"""The same if the compiler has put the operations of the network in another order."""


@dataclass(frozen=True)
class Case:
    """A policy, and the way in which a tick samples from it.

    Attributes:
        network: its name in `policy_networks.NETWORKS`.
        batch: number of environments that are served together.
        ddpm: whether to take all 100 steps of DDPM, LeRobot's default, rather than 10 of DDIM.
    """

    network: str
    batch: int = 1
    ddpm: bool = False

    @property
    def steps(self) -> int:
        return TIMESTEPS if self.ddpm else 10

    @property
    def name(self) -> str:
        parts = [self.network]
        parts += [f"{self.batch} environments"] if self.batch > 1 else []
        parts += ["DDPM"] if self.ddpm else []
        return ", ".join(parts)


class Policy:
    """The network of a case, with the further arguments of its loops."""

    def __init__(
        self, case: Case, device: torch.device | str, network: nn.Module | None = None
    ) -> None:
        self.case, self.device = case, torch.device(device)
        self.network = make_policy(case.network, device) if network is None else network
        self.shape = (case.batch, HORIZON, ACTION_DIM)
        generator = torch.Generator().manual_seed(1)
        self.x_T = torch.randn(self.shape, generator=generator).to(device)
        features = torch.randn(8, case.batch, CONDITION, generator=generator)
        self.features = list(features.to(device))

    def condition(self, tick: int) -> Tensor:
        found: Tensor = self.features[tick % len(self.features)]
        return found

    def noise(self) -> torch.Generator | None:
        """A fresh generator of the noise of DDPM's steps."""
        return torch.Generator(self.device).manual_seed(3) if self.case.ddpm else None

    def floor(self) -> Tick:
        """The network alone, called as often as in a tick, always at one timestep."""
        t = torch.full((self.case.batch,), TIMESTEPS // 2, device=self.device)

        def tick(number: int) -> Tensor:
            condition = self.condition(number)
            for _ in range(self.case.steps):
                actions: Tensor = self.network(self.x_T, t, global_cond=condition)
            return actions

        return tick

    def written_out(self, tick: int) -> Tensor:
        """The chunk by equation 12 of arXiv 2010.02502 with x_0 clipped, operation by operation.

        DDPM's steps are those with η = 1, and with ε re-derived from the clipped x_0.
        """
        ddpm, x, noise = self.case.ddpm, self.x_T, self.noise()
        stride = TIMESTEPS // self.case.steps
        alphas = [*fastddim.Schedule.cosine(TIMESTEPS).alphas_cumprod.tolist(), 1.0]
        for t in range(TIMESTEPS - stride, -1, -stride):
            a, p = alphas[t], alphas[t - stride if t else -1]
            at = torch.full((self.case.batch,), t, device=self.device)
            epsilon = self.network(x, at, global_cond=self.condition(tick))
            x_0 = ((x - (1 - a) ** 0.5 * epsilon) / a**0.5).clamp(-1, 1)
            sigma = 0.0
            if ddpm:
                epsilon = (x - a**0.5 * x_0) / (1 - a) ** 0.5
                sigma = ((1 - p) / (1 - a) * (1 - a / p)) ** 0.5
            x = p**0.5 * x_0 + (1 - p - sigma**2) ** 0.5 * epsilon
            if sigma:
                z = torch.randn(self.shape, generator=noise, device=self.device)
                x = x + sigma * z
        return x


@dataclass(frozen=True)
class Contender:
    """A loop in two uses.

    Attributes:
        tick: the loop as it is timed, with noise of its own.
        actions: the loop from the features of a tick, the policy's x_T and the policy's noise.
        agreement: largest allowed difference to the actions of the loop that is written out.
    """

    tick: Tick
    actions: Callable[[int], Tensor]
    agreement: float = AGREEMENT


def prepared(policy: Policy, graph: Graph = "auto") -> Contender:
    """A `fastddim.ActionSampler`, which writes its chunks into one tensor.

    Its latents and noise are those of its seed. So it is compared to the bit with the `Sampler`
    that it uses, and that sampler with other loops.
    """
    ddpm: dict[str, Any] = {"eta": 1.0, "rederive_eps": True} if policy.case.ddpm else {}
    options: dict[str, Any] = {
        "shape": policy.shape,
        "schedule": fastddim.Schedule.cosine(TIMESTEPS),
        "spacing": "leading",
        "clip": 1.0,
        "model_kwargs": {"global_cond": torch.zeros_like(policy.features[0])},
        "device": policy.device,
        "graph": graph,
        **ddpm,
    }
    planner = fastddim.ActionSampler(policy.network, policy.case.steps, seed=SEED, **options)
    sampler = fastddim.Sampler(policy.network, policy.case.steps, **options)
    out = torch.empty_like(policy.x_T)

    def tick(number: int) -> Tensor:
        return planner(model_kwargs={"global_cond": policy.condition(number)}, out=out)

    def actions(number: int) -> Tensor:
        given = {"global_cond": policy.condition(number)}
        first = planner.tick * policy.case.batch
        expected = sampler(seed=SEED, sample_offset=first, model_kwargs=given)
        assert torch.equal(tick(number), expected)
        return sampler(x_T=policy.x_T, noise=policy.noise(), model_kwargs=given)

    return Contender(tick, actions)


def assert_parity(policy: Policy, contenders: dict[str, Contender]) -> None:
    """Check that all contenders make the same actions of two observations in turn."""
    for number in (0, 1):
        expected = policy.written_out(number)
        for name, contender in contenders.items():
            torch.testing.assert_close(
                contender.actions(number),
                expected,
                rtol=0,
                atol=contender.agreement,
                msg=partial(_said, f"{policy.case.name}, {name}"),
            )


def _said(where: str, details: str) -> str:
    return f"{where}: {details}"


@dataclass(frozen=True)
class Times:
    """Seconds of one loop's ticks: until the actions were ready, and until the call returned, which
    on a GPU is earlier.
    """

    done: list[float]
    returned: list[float]


def timed(
    ticks: dict[str, Tick], device: torch.device, *, seconds: float, most: int, least: int
) -> dict[str, Times]:
    """The ticks of every loop, taken in turn, with another loop first each time.

    So the caches hold what a network and other loops have left there, as in a control loop, and a
    slow moment of the machine affects all loops.

    Args:
        seconds: time after which no further tick begins, unless there were fewer than `least`.
        most: largest number of ticks of a loop.
    """
    names = list(ticks)
    times = {name: Times([], []) for name in names}
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            start = time.perf_counter()
            ticks[name](number)
            times[name].returned.append(time.perf_counter() - start)
            wait(device)
            times[name].done.append(time.perf_counter() - start)
    return times


def percentile(values: list[float], share: float) -> float | None:
    """The value that this share of them does not exceed; None if too few lie above it."""
    above = len(values) * (1 - share)
    return sorted(values)[math.ceil(len(values) * share) - 1] if above >= 1 else None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a gibibyte reads and writes, both counted."""
    source = torch.zeros(2**30 // 4, device=device)
    target = torch.empty_like(source)
    seconds = device_seconds(lambda: target.copy_(source), device, 9)
    return 2 * source.nbytes / statistics.median(seconds)
