"""The search for timesteps and weights: least squares on the error at the end of a course.

The end of a candidate's course is close to a linear function of small changes of its numbers. So
its distance to the exact solution is a least-squares problem in these changes, which the method of
Levenberg and Marquardt solves (Marquardt 1963, https://doi.org/10.1137/0111030). Derivatives are
differences between courses: the model is evaluated, never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastddim.choices import EffortName
from fastddim.tuning.candidate import (
    Candidate,
    Change,
    Numbers,
    broad_changes,
    timestep_changes,
    weight_changes,
)
from fastddim.tuning.trials import Normal, Task, Trials

DAMPING = (1e-3, 1e-2, 1e-1, 0.3, 1.0)
# Latents near the border between two samples end far from the exact solution, and their distances
# would outweigh all others. So a sample counts for less from a multiple of the median square
# distance on: from this one where candidates are chosen,
_CHOOSING = 25
# and from this one in least squares, which take the way to be linear.
_FITTING = 4
# The pull of weights towards the untuned ones, relative to the mean square error.
_PULL = 1e-3
# The largest ratio of new to old error after which iterations go on.
_GAIN = 0.98


class Found(NamedTuple):
    """A candidate, and its error on the latents that candidates are chosen by."""

    error: float
    candidate: Candidate


class Effort(NamedTuple):
    """The length of a search.

    Attributes:
        teacher_steps: number of steps of the exact solution.
        elements: wanted number of elements in the latents of each set, which decides the number of
            samples.
        least, most: bounds of the number of samples.
        starts: number of starts that are searched from.
        broad: iterations on a few numbers that move all steps.
        fine: iterations on each weight, and on each timestep.
    """

    teacher_steps: int
    elements: int
    least: int
    most: int
    starts: int
    broad: int
    fine: int

    def samples(self, numel: int) -> int:
        """The number of latents in a set, for latents of `numel` elements."""
        return min(max(self.elements // numel, self.least), self.most)

    def evaluations(self, steps: int, starts: int) -> int:
        """The most evaluations of the model on one sample of each set that a search takes."""
        rating = len(DAMPING) * steps
        broad = 6 * steps + rating
        weights = steps * steps + rating
        timesteps = steps * (steps + 5) // 2 + rating
        tried = min(self.starts, starts)
        fine = self.fine * (weights + timesteps) + weights
        return starts * steps + tried * self.broad * broad + fine


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(100, 1 << 12, 16, 512, starts=1, broad=3, fine=2),
    "thorough": Effort(200, 1 << 13, 32, 2048, starts=2, broad=4, fine=6),
}


def _error(found: Found) -> float:
    return found.error


class Search:
    """Improves candidates on two sets of tasks: one to fit, one to choose by."""

    def __init__(
        self,
        trials: Trials,
        fitted: Sequence[Task],
        chosen_by: Sequence[Task],
        report: Callable[[float], None],
    ) -> None:
        self._trials = trials
        self._fitted = fitted
        self._chosen_by = chosen_by
        self._report = report
        self._scale: float | None = None

    def best(self, starts: Sequence[Candidate], effort: Effort) -> Found:
        """The best candidate that is reached from the starts."""
        tried = self._rated(starts)[: effort.starts]
        broad = [self._improved(start, self._broad, effort.broad) for start in tried]
        found = min(broad, key=_error)
        # Weights depend so closely on timesteps that a change of both at once goes too far.
        for _ in range(effort.fine):
            before = found.error
            found = self._improved(found, weight_changes, 1)
            found = self._improved(found, self._timesteps, 1)
            if found.error > _GAIN * before:
                break
        return self._improved(found, weight_changes, 1)

    def _rated(self, candidates: Sequence[Candidate]) -> list[Found]:
        courses = [self._trials.steps.course(each) for each in candidates]
        squares = self._trials.squares(courses, self._chosen_by)
        if self._scale is None:
            self._scale = float(np.nan_to_num(np.median(squares, axis=1), nan=np.inf).min())
        errors = _robust_mean(squares, self._scale * _CHOOSING)
        rated = [Found(float(e), c) for e, c in zip(errors, candidates, strict=True)]
        return sorted(rated, key=_error)

    def _broad(self, candidate: Candidate) -> list[Change]:
        return broad_changes(candidate, self._trials.steps)

    def _timesteps(self, candidate: Candidate) -> list[Change]:
        return timestep_changes(candidate, self._trials.steps.T)

    def _improved(
        self, found: Found, changes: Callable[[Candidate], list[Change]], iterations: int
    ) -> Found:
        for _ in range(iterations):
            better = self._iterated(found.candidate, changes(found.candidate))
            gained = better.error < _GAIN * found.error
            found = min(found, better, key=_error)
            self._report(found.error)
            if not gained:
                break
        return found

    def _iterated(self, candidate: Candidate, changes: Sequence[Change]) -> Found:
        """The best candidate of one iteration, which tries the largest changes first."""
        assert self._scale is not None
        normal = self._trials.normal_equations(
            candidate, changes, self._fitted, self._scale * _FITTING
        )
        T = self._trials.steps.T
        others = [
            _changed(candidate, changes, _amounts(normal, changes, damping)).settled(T)
            for damping in DAMPING
        ]
        return self._rated(others)[0]


def _robust_mean(squares: Numbers, scale: float) -> Numbers:
    """Root mean squares `[P]` of `[P, N]`, with a logarithm for squares above the scale (Cauchy's
    loss).
    """
    scale = min(max(scale, 1e-30), 1e30)
    means: Numbers = np.sqrt((scale * np.log1p(squares / scale)).mean(1))
    # Extreme weights can lead a network to states for which it returns NaN.
    return np.nan_to_num(means, nan=np.inf)


def _amounts(normal: Normal, changes: Sequence[Change], damping: float) -> Numbers:
    """The amount by which to change each number, within its bounds."""
    gram, slope = normal.gram.copy(), normal.slope.copy()
    diagonal = np.maximum(np.diagonal(gram), 1e-12 * max(np.diagonal(gram).max(), 1e-30))
    for p, change in enumerate(changes):
        gram[p, p] += damping * diagonal[p]
        if change.pulled is not None:
            gram[p, p] += _PULL * normal.error
            slope[p] += _PULL * normal.error * change.pulled
    amounts = np.nan_to_num(-np.linalg.solve(gram, slope))
    clipped: Numbers = np.clip(amounts, [c.low for c in changes], [c.high for c in changes])
    return clipped


def _changed(candidate: Candidate, changes: Sequence[Change], amounts: Numbers) -> Candidate:
    for change, amount in zip(changes, amounts, strict=True):
        candidate = change.apply(candidate, float(amount))
    return candidate
