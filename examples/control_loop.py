"""A control loop of 10 Hz: one thread acts at every control tick, another plans meanwhile.

A call of the policy takes 20 ms, so the 10 calls for a chunk take more than two ticks. The control
thread does not wait for them. It continues with its current chunk and changes to the new one when
that is ready, at the action that is due then. Demonstrations pass obstacles on either side. Chunks
that are planned independently change sides at the transition from one to the next: the robot would
have to jump. `fastddim.ActionSampler` draws chunks that continue what is being executed.

python examples/control_loop.py
python examples/control_loop.py --rate 20 --seconds 1.2 --call-ms 10
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from warm_start import HORIZON, PACE, STEPS, Policy

import fastddim

REPLAN = 4  # the least number of actions that are executed before the next chunk is planned

CHUNKS: Mapping[str, Mapping[str, Any]] = {
    "independent": {},
    "frozen": {"chunking": "freeze"},
    # The usual limit is for networks, whose gradients are rough. The gradients here are exact.
    "guided": {"chunking": "guide", "max_guidance_weight": 1e6},
    "frozen, warm start": {"chunking": "freeze", "warm_start": 4},
}


class Network(Policy):
    """The policy of `warm_start.py`, as slow as a network of some size."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, plan: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(plan, t, observation)


@dataclass(frozen=True)
class Chunk:
    """Actions, one for each tick from `first` on, and the time that it took to plan them."""

    first: int
    actions: list[float]
    seconds: float

    def at(self, tick: int) -> float | None:
        """The action of a tick, or None after the end of the chunk."""
        i = tick - self.first
        return self.actions[i] if i < len(self.actions) else None


class Planner:
    """Plans chunks from observations, one at a time."""

    def __init__(self, network: Network, options: Mapping[str, Any]) -> None:
        self._sampler = fastddim.ActionSampler(
            network.eval(),
            STEPS,
            shape=(1, HORIZON, 1),
            model_kwargs={"observation": torch.zeros(1, 1)},
            **options,
        )
        self._sampler.prepare()  # the first calls are slow, since they load libraries

    def plan(self, tick: int, *, executed: int, frozen: int) -> Chunk:
        """The chunk whose first action is due at `tick`, which is now.

        Args:
            executed: number of actions of the last chunk that are past.
            frozen: number of control ticks that planning is expected to take.
        """
        began = time.perf_counter()
        actions = self._sampler(
            model_kwargs={"observation": torch.full((1, 1), PACE * tick)},
            executed=executed,
            frozen=frozen,
        )
        # With a GPU, `tolist` waits, in the thread that may.
        return Chunk(tick, actions[0, :, 0].tolist(), time.perf_counter() - began)


@dataclass(frozen=True)
class Drive:
    """The actions of all ticks, the chunks that they are from, and the number of missed ticks."""

    actions: list[float]
    chunks: list[Chunk]
    missed: int

    def largest_change(self) -> float:
        """The largest change of the action from one tick to the next."""
        return max(abs(after - before) for before, after in pairwise(self.actions))


def drive(planner: Planner, *, rate: float, ticks: int) -> Drive:
    """Act `rate` times a second.

    A control tick is missed if it is over before it has an action, or if the chunk has ended; the
    last action is then held. An exception of the planner is raised here, at the next tick.
    """
    chunk = planner.plan(0, executed=0, frozen=0)
    chunks, delays = [chunk], deque([ceil(chunk.seconds * rate)], maxlen=5)
    pending: Future[Chunk] | None = None
    actions: list[float] = []
    missed = 0
    with ThreadPoolExecutor(1, "planner") as planning:
        began = time.perf_counter()
        for tick in range(ticks):
            time.sleep(max(0.0, began + tick / rate - time.perf_counter()))
            if pending is not None and pending.done():
                chunk, pending = pending.result(), None
                chunks.append(chunk)
                delays.append(tick - chunk.first)
            action = chunk.at(tick)
            late = time.perf_counter() > began + (tick + 1) / rate
            missed += late or action is None
            actions.append(actions[-1] if action is None else action)
            executed = min(tick - chunk.first, HORIZON)
            if pending is None and executed >= REPLAN:
                frozen = min(max(delays), HORIZON - executed)
                pending = planning.submit(planner.plan, tick, executed=executed, frozen=frozen)
    return Drive(actions, chunks, missed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=10.0, help="control ticks a second")
    parser.add_argument("--seconds", type=float, default=2.4, help="for each kind of chunks")
    parser.add_argument("--call-ms", type=float, default=20.0, help="of one call of the policy")
    args = parser.parse_args(arguments)
    for name, options in CHUNKS.items():
        planner = Planner(Network(args.call_ms / 1000), options)
        driven = drive(planner, rate=args.rate, ticks=round(args.rate * args.seconds))
        p50, p99 = np.percentile([1000 * chunk.seconds for chunk in driven.chunks], [50, 99])
        print(
            f"{name}: {len(driven.chunks)} chunks, {p50:.0f} ms (p99 {p99:.0f}); "
            f"{driven.missed} of {len(driven.actions)} ticks missed; "
            f"largest change {driven.largest_change():.2f}"
        )


if __name__ == "__main__":
    main()
