"""Courses walked from the same latents, and compared with the exact solution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddim.options import Update
from fastddim.plan import coefficient_row, stack_rows, to_table
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.tuning.candidate import Candidate, Change, Course, Numbers, Steps
from fastddim.tuning.network import Network
from fastddim.validation import check_finite_output

# Elements of one matrix in float64 at a time.
_SLICE = 1 << 22


class Task(NamedTuple):
    """Latents, and the samples to which the exact solution takes them; both `[B, …]`."""

    x_T: Tensor
    x_0: Tensor


class State(NamedTuple):
    """A state of a course, and the epsilon of the step before."""

    x: Tensor
    history: Tensor


class Walk(NamedTuple):
    """A course that was walked, with the states and outputs from which others can branch off."""

    timesteps: list[int]
    table: Tensor  # [S, K]
    states: list[State]
    outputs: list[Tensor]
    end: Tensor


class Trace(NamedTuple):
    """The states and predictions of a course, for the paths through it.

    Attributes:
        states: those of some samples, before each step and after the last.
        x_0, epsilon: the predictions for these samples in each step.
        end: the last states of all samples.
    """

    states: list[Tensor]
    x_0: list[Tensor]
    epsilon: list[Tensor]
    end: Tensor


class Normal(NamedTuple):
    """The normal equations of least squares, as means over the elements of the samples.

    Attributes:
        gram: float64 `[P, P]`, products of the derivatives by P changes with one another.
        slope: float64 `[P]`, products of these derivatives with the error.
        error: mean square of the error.
    """

    gram: Numbers
    slope: Numbers
    error: float


class Trials:
    """Walks courses with one network."""

    def __init__(self, network: Network, schedule: Schedule, update: Update) -> None:
        """
        Args:
            network: evaluated at each step.
            schedule: ᾱ of the model.
            update: the kind of step, checked.
        """
        self.steps = Steps(schedule)
        self._network = network
        self._update = update

    def table(self, course: Course, like: Tensor) -> Tensor:
        """Rows `[S, K]` of a course, for a state."""
        alphas = self.steps.alphas(course.timesteps)
        rows = [
            coefficient_row(a, p, self._update, where=f" at timestep {t}", weights=weights)
            for (a, p), t, weights in zip(
                itertools.pairwise(alphas), course.timesteps, course.weights, strict=True
            )
        ]
        return to_table(stack_rows(rows), compute_dtype(like.dtype), like.device)

    def walk(self, course: Course, x_T: Tensor) -> Walk:
        """Walk a whole course."""
        table = self.table(course, x_T)
        states, outputs = [], []
        state = _start(x_T, table)
        for t, row in zip(course.timesteps, table, strict=True):
            states.append(state)
            outputs.append(self._network.output(state.x, t))
            state = self._take(state, outputs[-1], row)
        return Walk(course.timesteps, table, states, outputs, state.x)

    def trace(self, course: Course, x_T: Tensor, kept: int = 0) -> Trace:
        """Walk a whole course and remember all states of the first `kept` samples.

        Raises:
            ValueError: the model's output is not finite.
        """
        table = self.table(course, x_T)
        state = _start(x_T, table)
        trace = Trace([], [], [], x_T)
        for t, row in zip(course.timesteps, table, strict=True):
            trace.states.append(state.x[:kept])
            output = self._network.output(state.x, t)
            check_finite_output(output, partial("at timestep {}".format, t))
            taken = self._network.updated(state.x, output, row[None], state.history)
            trace.x_0.append(taken.x_0[:kept])
            trace.epsilon.append(taken.epsilon[:kept])
            state = State(taken.x_prev, taken.epsilon)
        trace.states.append(state.x[:kept])
        return trace._replace(end=state.x)

    def branch(self, course: Course, walk: Walk) -> Tensor:
        """The end of a course, walked from the step at which it leaves `walk`."""
        table, timesteps = self.table(course, walk.end), course.timesteps
        others = (table != walk.table).any(1).tolist()
        first = next(
            (s for s, other in enumerate(others) if other or timesteps[s] != walk.timesteps[s]),
            None,
        )
        if first is None:
            return walk.end
        state = walk.states[first]
        for s in range(first, len(timesteps)):
            known = s == first and timesteps[s] == walk.timesteps[s]
            output = walk.outputs[s] if known else self._network.output(state.x, timesteps[s])
            state = self._take(state, output, table[s])
        return state.x

    def _take(self, state: State, output: Tensor, row: Tensor) -> State:
        taken = self._network.updated(state.x, output, row[None], state.history)
        return State(taken.x_prev, taken.epsilon)

    def squares(self, courses: Sequence[Course], tasks: Sequence[Task]) -> Numbers:
        """`[P, N]`: the mean square distance to the exact solution of each course and sample."""
        return np.concatenate([self._squares(courses, task) for task in tasks], axis=1)

    def _squares(self, courses: Sequence[Course], task: Task) -> Numbers:
        walk = self.walk(courses[0], task.x_T)
        ends = [walk.end, *(self.branch(other, walk) for other in courses[1:])]
        return np.stack([_mean_squares(end - task.x_0).cpu().numpy() for end in ends])

    def normal_equations(
        self,
        candidate: Candidate,
        changes: Sequence[Change],
        tasks: Sequence[Task],
        scale: float,
    ) -> Normal:
        """The normal equations of the changes, with derivatives by finite differences.

        Args:
            scale: the mean square distance from which on a sample counts for less.
        """
        course = self.steps.course(candidate)
        probed = [
            self.steps.course(change.apply(candidate, change.probe).settled(self.steps.T))
            for change in changes
        ]
        probes = torch.tensor([change.probe for change in changes], dtype=torch.float64)
        size = len(changes)
        gram = np.zeros((size, size))
        slope, error, count = np.zeros(size), 0.0, 0
        for task in tasks:
            walk = self.walk(course, task.x_T)
            differences = torch.stack(
                [(self.branch(other, walk) - walk.end).flatten() for other in probed]
            )
            residual = walk.end - task.x_0
            far = _mean_squares(residual).nan_to_num(torch.inf) / max(scale, 1e-30)
            weights = (1 / (1 + far)).sqrt()
            # Values outside the model's range tell nothing of the slope.
            differences, residual = (
                values.nan_to_num(0.0, 0.0, 0.0) for values in (differences, residual)
            )
            shape = (len(residual), *[1] * (residual.ndim - 1))
            weighted = weights.reshape(shape).to(residual.dtype).expand_as(residual).flatten()
            residual = residual.flatten() * weighted
            for part, rest in _slices(differences * weighted, residual):
                derivatives = part / probes[:, None].to(part.device)
                gram += (derivatives @ derivatives.mT).cpu().numpy()
                slope += (derivatives @ rest).cpu().numpy()
                error += float(rest.square().sum())
            count += residual.numel()
        return Normal(gram / count, slope / count, error / count)


def _mean_squares(difference: Tensor) -> Tensor:
    """The mean square of each sample, float64 `[B]`."""
    return difference.double().square().flatten(1).mean(1)


def _start(x_T: Tensor, table: Tensor) -> State:
    return State(x_T, torch.zeros_like(x_T, dtype=table.dtype))


def _slices(differences: Tensor, residual: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of both in float64, some elements at a time."""
    size = max(1, _SLICE // len(differences))
    for part, rest in zip(differences.split(size, dim=1), residual.split(size), strict=True):
        yield part.double(), rest.double()
