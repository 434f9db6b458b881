"""The captured programs of a loop: one step, or all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim import philox
from fastddim.backends import Backend
from fastddim.loop import capture
from fastddim.loop.alignment import aligned_rows
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.buffers import Buffers
from fastddim.loop.capture import Graph
from fastddim.loop.counters import Counters, Position
from fastddim.loop.cuda import CaptureError
from fastddim.loop.inputs import StaticInputs
from fastddim.loop.noise import listed, noise_at
from fastddim.loop.programs import Programs
from fastddim.loop.step import Step
from fastddim.options import NoiseSource

MOST_NODES = 1250
"""The most kernels, copies and fills that "auto" captures as one graph of all steps: 25 per step in
50 steps. On an H100, such a graph saves 3.3 to 4.5 µs per step against a graph of one step. Around
U-Nets its steps take up to 6 % longer. At 2.6 µs per kernel that cancels the saving from 25 kernels
on.
"""

MOST_BEGINNINGS = 4
"""The most graphs of all steps that "auto" captures besides a graph of one step, each from another
first step. Runs from yet other steps replay the graph of one step: warm starts begin at the same
step every time.
"""


class Run(NamedTuple):
    """A run as far as its program depends on it.

    Attributes:
        noise: the caller's, for steps that add noise.
        with_x_0: whether the predicted x_0 is written at each step.
        with_trajectory: whether all states are returned.
        masked: whether steps blend the state with known data.
        first: the step to begin with.
        latents: whether it begins with the latents of the seed, which nothing else reads.
        progress: whether each step is reported.
    """

    noise: NoiseSource
    with_x_0: bool
    with_trajectory: bool
    masked: bool
    first: int
    latents: bool
    progress: bool

    @property
    def of_a_step(self) -> Hashable:
        """Everything that the program of a step depends on."""
        noise = self.noise
        kind = noise.dtype if isinstance(noise, Tensor) else noise and listed(noise)
        return kind, self.with_x_0, self.masked

    @property
    def of_all_steps(self) -> Hashable:
        return self.of_a_step, self.with_trajectory, self.first, self.latents

    def drawn_inside(self, device: torch.device) -> bool:
        """True where a graph can hold the noise of all steps, without memory for it."""
        if isinstance(self.noise, Tensor):
            return False
        return capture.draws_inside(listed(self.noise), device) if self.noise else True


class Program(NamedTuple):
    """A captured part of the loop, one step or all, with the tensors that it reads and writes
    besides the loop's buffers.

    Attributes:
        graph: the captured graph.
        inputs: the arguments of models.
        whole: whether it has all steps.
        latents: whether it draws the latents that the run begins with.
        noise: `[steps, B, …]`, given for its steps, or None.
        trajectory: `[steps + 1, B, …]`, the state before its steps and after each, or None.
        all_steps: under "auto", the programs of all steps that stand in for this one of one step,
            by their first step and their `latents`; None where one cannot be captured.
    """

    graph: Graph
    inputs: StaticInputs
    whole: bool
    latents: bool
    noise: Tensor | None
    trajectory: Tensor | None
    all_steps: dict[tuple[int, bool], Program | None]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inputs.tensors()
        yield from (t for t in (self.noise, self.trajectory) if t is not None)
        for program in self.all_steps.values():
            if program is not None:
                yield from program.tensors()


class LoopPrograms(Programs[Program]):
    """The programs of a loop."""

    def __init__(
        self,
        mode: bool | str,
        backend: Backend,
        buffers: Buffers,
        counters: Counters,
        step: Step,
    ) -> None:
        device = buffers.state.device
        super().__init__(mode, device)
        self._backend, self._counters, self._step = backend, counters, step
        self._buffers = buffers

    def choose(self, run: Run, arguments: ModelArguments) -> Program | None:
        """The program for a run; None where the run goes without one.

        Raises:
            ValueError: it cannot be captured, and the caller asked for a graph.
        """
        whole = self._mode == "loop"
        key = arguments.key, run.of_all_steps if whole else run.of_a_step
        program = self.find(key, lambda: self._capture(run, arguments, whole=whole))
        if program is None or self._mode != "auto" or not self._pays_as_a_whole(program, run):
            return program
        begin, kept = (run.first, run.latents), program.all_steps
        if begin not in kept:
            if run.first > 0 and len(kept) >= MOST_BEGINNINGS:
                return program
            try:
                kept[begin] = self._capture(run, arguments, whole=True)
            except CaptureError:  # such as for want of memory
                kept[begin] = None
        return kept[begin] or program

    def _pays_as_a_whole(self, program: Program, run: Run) -> bool:
        """True where nothing watches a run, and a graph for all its steps has few enough nodes."""
        watched = run.with_x_0 or run.with_trajectory or run.progress
        nodes, steps = program.graph.nodes, self._counters.steps - run.first
        if watched or nodes is None:
            return False
        return nodes * steps <= MOST_NODES and run.drawn_inside(self._device)

    def _capture(self, run: Run, arguments: ModelArguments, *, whole: bool) -> Program:
        state, counters = self._buffers.state, self._counters
        device, shape = state.device, tuple(state.shape)
        if whole:
            counters.unroll()
        positions = counters.each[run.first :] if whole else [counters.now]
        inputs = StaticInputs(arguments, device)
        noise = run.noise
        generators = [] if isinstance(noise, Tensor) else listed(noise)
        staged = None
        if noise is not None and not run.drawn_inside(device):
            dtype = noise.dtype if isinstance(noise, Tensor) else state.dtype
            staged = aligned_rows(len(positions), shape, dtype, device)
            noise, generators = staged, []
        trajectory = None
        if whole and run.with_trajectory:
            trajectory = state.new_zeros((len(positions) + 1, *shape))

        def take_steps(positions: Sequence[Position]) -> None:
            if whole:
                self._begin(run, trajectory)
            for s, at in enumerate(positions):
                z = noise_at(noise, s, state)
                self._step.take(
                    at,
                    z,
                    arguments=inputs.arguments,
                    with_x_0=run.with_x_0,
                    masked=run.masked,
                )
                if trajectory is not None:
                    trajectory[s + 1].copy_(state)

        def warm_up() -> None:
            take_steps(positions[:1])
            counters.rewind()

        def body() -> None:
            take_steps(positions)

        counters.rewind()
        graph = capture.capture(body, warm_up=warm_up, device=device, generators=generators)
        return Program(graph, inputs, whole, whole and run.latents, staged, trajectory, {})

    def _begin(self, run: Run, trajectory: Tensor | None) -> None:
        """Write the tensors that the graph of all steps writes before the first step."""
        state = self._buffers.state
        if run.latents:
            self._backend.normal_out(self._counters.each[0].keys, philox.LATENTS, state)
        if trajectory is not None:
            trajectory[0].copy_(state)
        self._buffers.follow_state()
