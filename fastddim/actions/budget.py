"""The number of steps whose ticks fit a time budget, found by measuring."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import torch

from fastddim import transfer
from fastddim.actions.options import ActionOptions
from fastddim.tuned import TunedSteps
from fastddim.validation import check_number

Candidate: TypeAlias = int | TunedSteps

WARM_UPS = 3
TICKS = 20
QUANTILE = 0.95

# Tests replace the clock, since they have no time to measure.
clock = time.perf_counter


class Ticking(Protocol):
    """A sampler of actions, with the methods that measuring needs."""

    device: torch.device

    def __call__(self) -> Any: ...

    def reset(self) -> None: ...


def within_budget(
    options: ActionOptions, make: Callable[..., Ticking]
) -> tuple[ActionOptions, dict[int, float]]:
    """The options with the most steps whose ticks fit `budget_ms`, and the measured times.

    Args:
        options: options with a budget.
        make: makes a sampler of such options without a budget.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range, or even the fewest
            steps do not fit; the message names it.
    """
    budget_ms = check_number("budget_ms", options.budget_ms, 0.0, open_low=True)
    own = {**vars(options), "budget_ms": None, "log": None}

    def measure(candidate: Candidate) -> float:
        sampler = make(**own | {"steps": candidate})

        def first() -> None:
            sampler.reset()
            sampler()

        kinds = [first]
        if options.warm_start is not None or options.chunking is not None:
            kinds.append(sampler)
        return max(time_of(tick, sampler.device) for tick in kinds)

    # A warm start omits at least one step.
    warm = options.warm_start
    least = warm + 1 if isinstance(warm, int) and warm > 0 else 1
    chosen, measured = most_that_fit(candidates_of(options.steps, least), measure, budget_ms)
    return replace(options, steps=chosen, budget_ms=None), measured


def candidates_of(steps: Any, least: int = 1) -> list[Candidate]:
    """The steps that a budget chooses from, from the fewest to the most.

    Args:
        steps: a number, which stands for all numbers up to it; or a sequence of numbers and
            `TunedSteps`.
        least: the fewest steps that a tick can have.

    Raises:
        TypeError, ValueError: `steps` is neither, or two candidates have the same number of steps.
    """
    if isinstance(steps, numbers.Integral) and not isinstance(steps, bool):
        return list(range(min(least, int(steps)), int(steps) + 1))
    if isinstance(steps, TunedSteps):
        return [steps]
    if not isinstance(steps, Sequence) or isinstance(steps, str | bytes) or not steps:
        raise TypeError(
            "steps: expected a number, TunedSteps, or a sequence of them to choose from with "
            f"budget_ms, got {steps!r}"
        )
    for i, one in enumerate(steps):
        if isinstance(one, bool) or not isinstance(one, numbers.Integral | TunedSteps):
            raise TypeError(
                f"steps[{i}]: expected a number of steps or TunedSteps with budget_ms, got {one!r}"
            )
    candidates = sorted(
        (one if isinstance(one, TunedSteps) else int(one) for one in steps), key=count_of
    )
    for few, many in pairwise(candidates):
        if count_of(few) == count_of(many):
            raise ValueError(
                "steps: expected candidates of different numbers of steps with budget_ms, got "
                f"{count_of(few)} twice"
            )
    return candidates


def count_of(candidate: Candidate) -> int:
    """The number of steps of a candidate."""
    return candidate.steps if isinstance(candidate, TunedSteps) else candidate


def most_that_fit(
    candidates: Sequence[Candidate], measure: Callable[[Candidate], float], budget_ms: float
) -> tuple[Candidate, dict[int, float]]:
    """The candidate with the most steps that fit a budget, by bisection, and the measured times.

    The most steps are measured first, then the fewest: often one of the two decides. Of n
    candidates, about log₂ n are measured.

    Args:
        candidates: from the fewest steps to the most; more steps take longer.
        measure: gives the time of a tick with a candidate, in milliseconds.
        budget_ms: the time that a tick may take, in milliseconds.

    Returns:
        (the candidate, {number of steps: milliseconds}).

    Raises:
        ValueError: even the fewest steps do not fit.
    """
    measured: dict[int, float] = {}

    def fits(candidate: Candidate) -> bool:
        measured[count_of(candidate)] = measure(candidate)
        return measured[count_of(candidate)] <= budget_ms

    if fits(candidates[-1]):
        return candidates[-1], measured
    if len(candidates) == 1 or not fits(candidates[0]):
        raise ValueError(
            f"budget_ms: expected time for the fewest steps, got {budget_ms:g} ms; measured were "
            f"{described_times(measured)}"
        )
    low, high = 0, len(candidates) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle
        else:
            high = middle
    return candidates[low], measured


def time_of(tick: Callable[[], Any], device: torch.device) -> float:
    """The time in milliseconds that 95 % of ticks do not exceed, each waited for on its device.

    The first ticks, which may compile, capture and fill caches, are not measured.
    """
    for _ in range(WARM_UPS):
        tick()
    taken = []
    for _ in range(TICKS):
        transfer.wait(device)
        start = clock()
        tick()
        transfer.wait(device)
        taken.append((clock() - start) * 1e3)
    return quantile(taken, QUANTILE)


def quantile(values: Sequence[float], share: float) -> float:
    """The least of the values that at least this share of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def described_times(measured: Mapping[int, float]) -> str:
    """Measured times in words, from the most steps to the fewest."""
    return ", ".join(
        f"{ms:.3g} ms for {steps} steps" for steps, ms in sorted(measured.items())[::-1]
    )
