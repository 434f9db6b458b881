"""Timesteps and weights on trial, and the ways to change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastddim.elementary import sqrt
from fastddim.plan import NO_HISTORY, EpsilonWeights, epsilon_weights, history_weights
from fastddim.schedule import Schedule

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Timesteps, and additions to the weights of the two-step Adams–Bashforth method at each.

    The additions are in units of the step's length, the sine of the angle between the noise levels
    √(1 − ᾱ)/√ᾱ from and to which it goes.

    Attributes:
        timesteps: `[S]`, decreasing; whole numbers where the candidate is `settled`.
        direction: `[S]`, added to the weight of ε.
        history: `[S]`, added to the weight of the ε before.
    """

    timesteps: Numbers
    direction: Numbers
    history: Numbers

    @classmethod
    def at_order_2(cls, timesteps: Iterable[float]) -> Candidate:
        """The weights of order 2 at these timesteps."""
        timesteps = np.array(list(timesteps), dtype=np.float64)
        return cls(timesteps, np.zeros(len(timesteps)), np.zeros(len(timesteps)))

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def settled(self, T: int) -> Candidate:
        """The candidate with timesteps that are distinct whole numbers below T."""
        return replace(self, timesteps=_distinct(self.timesteps, T))


def _distinct(timesteps: Numbers, T: int) -> Numbers:
    """Decreasing whole numbers in [0, T) near these; there are no more of them than T."""
    places = np.arange(len(timesteps), dtype=np.float64)
    # t + s may not increase along the steps s of timesteps t that decrease by 1 at least.
    lifted = np.rint(timesteps) + places
    lifted = np.minimum.accumulate(np.clip(lifted, len(timesteps) - 1, T - 1))
    distinct: Numbers = lifted - places
    return distinct


def resampled(timesteps: Sequence[int], steps: int) -> Candidate:
    """A candidate with another number of timesteps, at the same density."""
    places = np.linspace(0, len(timesteps) - 1, steps) if steps > 1 else np.zeros(1)
    return Candidate.at_order_2(np.interp(places, np.arange(len(timesteps)), timesteps))


class Course(NamedTuple):
    """Timesteps and weights of a run.

    Attributes:
        timesteps: `[S]`, in the order visited.
        weights: those of ε and of the ε before at each step.
    """

    timesteps: list[int]
    weights: list[EpsilonWeights]


class Steps:
    """The meaning of candidates on a schedule.

    Attributes:
        T: number of training timesteps.
        noise_levels: float64 `[T]`, log(√(1 − ᾱ)/√ᾱ), finite.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._alphas = schedule.alphas_cumprod.double().numpy()
        self.T = schedule.T
        inside = np.clip(self._alphas, 1e-12, 1 - 1e-12)
        self.noise_levels = 0.5 * np.log((1 - inside) / inside)

    def alphas(self, timesteps: Sequence[int]) -> list[float]:
        """ᾱ of the S + 1 states of a course."""
        return [*self._alphas[list(timesteps)].tolist(), 1.0]

    def untuned(self, timesteps: Sequence[int], order: int) -> Course:
        """The course of `sample` at this order."""
        alphas = self.alphas(timesteps)
        weights = []
        for s in range(len(timesteps)):
            a, p = alphas[s], alphas[s + 1]
            history = history_weights(order, alphas[s - 1], a, p) if s else NO_HISTORY
            weights.append(epsilon_weights(sqrt(1 - p), history))
        return Course(list(timesteps), weights)

    def course(self, candidate: Candidate) -> Course:
        """The course of a settled candidate."""
        timesteps = [int(t) for t in candidate.timesteps]
        angles = np.arccos(np.sqrt(self.alphas(timesteps)))
        lengths = np.sin(angles[:-1] - angles[1:])
        plain = self.untuned(timesteps, 2)
        additions = zip(
            plain.weights, candidate.direction * lengths, candidate.history * lengths, strict=True
        )
        return plain._replace(
            weights=[
                EpsilonWeights(w.direction + float(d), w.history + float(h))
                for w, d, h in additions
            ]
        )

    def at(self, noise_levels: Numbers) -> Numbers:
        """The timesteps of these noise levels, with fractions."""
        rising = np.maximum.accumulate(self.noise_levels)
        return np.interp(noise_levels, rising, np.arange(self.T))


class Change(NamedTuple):
    """One number of a candidate that the search changes.

    Attributes:
        apply: the candidate with the number changed by an amount.
        probe: the amount by which derivatives are taken.
        low, high: the least and the greatest amount of one iteration.
        pulled: the number's distance from the untuned one, where there is one.
    """

    apply: Callable[[Candidate, float], Candidate]
    probe: float
    low: float
    high: float
    pulled: float | None = None


PROBE = 0.02
FARTHEST = 0.4


def timestep_changes(candidate: Candidate, T: int) -> list[Change]:
    """The timestep of each step, between its neighbours."""
    ends = [float(T), *candidate.timesteps, -1.0]
    changes = []
    for s, t in enumerate(candidate.timesteps):
        above, below = ends[s] - t, t - ends[s + 2]
        if s == 0:
            above = min(above, below) if above > 1 else above
        probe = max(1.0, round(0.15 * min(above, below)))
        room_above, room_below = ends[s] - t - 1, below - 1
        probe = min(probe, room_above) if room_above >= room_below else -min(probe, room_below)
        if probe:
            changes.append(
                Change(_mover("timesteps", s), probe, -FARTHEST * below, FARTHEST * (ends[s] - t))
            )
    return changes


def weight_changes(candidate: Candidate) -> list[Change]:
    """Every weight of a candidate."""
    return [
        Change(
            _mover(name, s), PROBE, -FARTHEST, FARTHEST, pulled=float(getattr(candidate, name)[s])
        )
        for name, first in (("direction", 0), ("history", 1))
        for s in range(first, candidate.steps)
    ]


def broad_changes(candidate: Candidate, steps: Steps) -> list[Change]:
    """The noise levels of the first, the last and the middle steps, which draw the others along,
    and all weights at once.
    """
    levels = np.interp(candidate.timesteps, np.arange(steps.T), steps.noise_levels)
    place = (levels - levels[-1]) / (levels[0] - levels[-1]) if candidate.steps > 1 else np.ones(1)
    shapes = [place, 1 - place, 4 * place * (1 - place)][: min(candidate.steps, 3)]
    # The first step may have no timestep above.
    changes = [
        Change(_warp(steps, shape), probe, -0.7, 0.7)
        for shape, probe in zip(shapes, (-0.1, 0.1, 0.1), strict=False)
    ]
    later = slice(1, None)
    names = ("direction", "history") if candidate.steps > 1 else ()
    return changes + [Change(_mover(name, later), PROBE, -0.3, 0.3) for name in names]


def _mover(name: str, at: int | slice) -> Callable[[Candidate, float], Candidate]:
    def apply(candidate: Candidate, amount: float) -> Candidate:
        values = getattr(candidate, name).copy()
        values[at] += amount
        return replace(candidate, **{name: values})

    return apply


def _warp(steps: Steps, shape: Numbers) -> Callable[[Candidate, float], Candidate]:
    def apply(candidate: Candidate, amount: float) -> Candidate:
        levels = np.interp(candidate.timesteps, np.arange(steps.T), steps.noise_levels)
        return replace(candidate, timesteps=steps.at(levels + amount * shape))

    return apply
