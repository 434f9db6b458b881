"""Timesteps of one sampling run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.choices import SPACING_SYNONYMS, Spacing, SpacingSynonym
from fastddim.options import Steps
from fastddim.tuned import TunedSteps
from fastddim.validation import check_choice, check_int

Timesteps: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def _uniform(T: int, S: int) -> Timesteps:
    return _count(S) * T // S


def _quadratic(T: int, S: int) -> Timesteps:
    roots = np.linspace(0, math.sqrt(0.8 * T), S)
    i = _count(S)
    return np.maximum.accumulate((roots * roots).astype(np.int64) - i) + i


def _leading(T: int, S: int) -> Timesteps:
    return _count(S) * (T // S)


def _trailing(T: int, S: int) -> Timesteps:
    return np.round(T - _count(S) * T / S).astype(np.int64)[::-1] - 1


def _linspace(T: int, S: int) -> Timesteps:
    return np.round(np.linspace(0, T - 1, S)).astype(np.int64)


def _count(S: int) -> Timesteps:
    return np.arange(S, dtype=np.int64)


SPACINGS: dict[Spacing, Callable[[int, int], Timesteps]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}
"""The ways to choose S timesteps out of T: functions of (T, S) that return them in increasing
order."""


def select_timesteps(
    T: int,
    steps: Steps,
    spacing: Spacing | SpacingSynonym = "trailing",
    steps_offset: int = 0,
) -> Tensor:
    """int64 tensor `[S]` of distinct timesteps out of `range(T)`, in the order visited
    (decreasing).

    Args:
        T: number of training timesteps.
        steps: S in [1, T], or the timesteps themselves, which tuned steps have.
        spacing: `trailing` round(T − i·T/S) − 1, which starts at T − 1 at every S; `uniform`
            ⌊i·T/S⌋ (the paper's linear τ); `quadratic` or "quad" (the paper's other τ, made
            strictly increasing); `leading` ⌊T/S⌋·i + steps_offset; `linspace` round(linspace(0,
            T − 1, S)). At S = 1 every spacing except `trailing` visits t = 0 alone.
        steps_offset: the offset of `leading`; 0 for every other spacing.

    Raises:
        TypeError: `steps` is neither an integer nor a sequence of integers.
        ValueError: a value is out of range, or the sequence is not strictly decreasing.
    """
    check_int("T", T, 1, 2**31)
    chosen: Spacing = check_choice("spacing", spacing, tuple(SPACINGS), SPACING_SYNONYMS)
    check_int("steps_offset", steps_offset, 0, T - 1)
    if steps_offset and chosen != "leading":
        raise ValueError(f"steps_offset: expected 0 unless spacing='leading', got {steps_offset}")
    if isinstance(steps, TunedSteps):
        steps = steps.timesteps
    if isinstance(steps, Tensor | np.ndarray) and steps.ndim == 1:
        steps = steps.tolist()
    if isinstance(steps, Sequence) and not isinstance(steps, str | bytes):
        return _explicit_timesteps(T, steps)
    S = check_int("steps", steps, 1, T)
    increasing = SPACINGS[chosen](T, S) + steps_offset
    if increasing[-1] >= T:
        raise ValueError(
            f"steps_offset: expected timesteps below T = {T}, got {increasing[-1]} "
            f"with steps = {S} and steps_offset = {steps_offset}"
        )
    return torch.from_numpy(increasing[::-1].copy())


def _explicit_timesteps(T: int, steps: Sequence[Any]) -> Tensor:
    if len(steps) == 0:
        raise ValueError("steps: expected at least one timestep, got none")
    timesteps = [check_int(f"steps[{i}]", t, 0, T - 1) for i, t in enumerate(steps)]
    for i, (before, after) in enumerate(itertools.pairwise(timesteps), start=1):
        if after >= before:
            raise ValueError(
                "steps: expected strictly decreasing timesteps, "
                f"got steps[{i}] = {after} after {before}"
            )
    return torch.tensor(timesteps, device="cpu")
