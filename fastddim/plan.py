"""Timesteps and coefficients of one sampling run, all in float64.

The update of every step is affine in the state x and the model output m (arXiv 2010.02502, eq. 9,
12 and 16). With a = ᾱ_t and p = ᾱ of the next visited timestep (1 after the last):

    x0 = cx·x + cm·m, clamped to [−r, r]
    eps = ex·x + em·m, or (x − √a·x0)/√(1−a) where it is re-derived
    x_prev = √p·x0 + √(1−p−σ²)·eps + pn·z

so that, with the coefficients of x0, x and m in x_prev collected into k0, kx and km,

    x_prev = k0·x0 + kx·x + km·m + pn·z + ph·h

where z is noise and h, with its coefficient ph = 0 here, room for an earlier model output.
`coefficient_row` is where these numbers come from; `reference.update` and the kernels are where
they are used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.schedule import Schedule
from fastddim.validation import (
    check_bool,
    check_choice,
    check_coefficient,
    check_int,
    check_number,
    readable,
)

Coefficient: TypeAlias = float | Tensor

SPACINGS = ("uniform", "quadratic", "leading", "trailing", "linspace")
VARIANCES = ("small", "large")
PREDICTIONS = ("epsilon", "sample", "v_prediction")

# Sums of float64 numbers below 1 go wrong by a few units of 2⁻⁵³; anything further below 0 is a
# real negative.
_ROUNDING = 1e-14


class Row(NamedTuple):
    """One row of the coefficient table; a field may be a number or a tensor `[B]`."""

    cx: Coefficient
    cm: Coefficient
    r: Coefficient
    k0: Coefficient
    kx: Coefficient
    km: Coefficient
    pn: Coefficient
    g: Coefficient
    ph: Coefficient = 0.0


@dataclass(frozen=True)
class Update:
    """How one step is taken, apart from where it is on the schedule."""

    eta: Coefficient = 0.0
    variance: str = "small"
    prediction: str = "epsilon"
    clip: float | None = None
    rederive_eps: bool = False
    guidance_scale: Coefficient | None = None

    def checked(self, batch: int | None) -> Update:
        """The same with every field checked and tensors turned to float64.

        Raises:
            TypeError, ValueError: a field is of the wrong type, shape or range; the message names
                it.
        """
        guidance = self.guidance_scale
        return Update(
            eta=check_coefficient("eta", self.eta, batch, 0.0),
            variance=check_choice("variance", self.variance, VARIANCES),
            prediction=check_choice("prediction", self.prediction, PREDICTIONS),
            clip=None if self.clip is None else check_number("clip", self.clip, 0.0, open_low=True),
            rederive_eps=check_bool("rederive_eps", self.rederive_eps),
            guidance_scale=None
            if guidance is None
            else check_coefficient("guidance_scale", guidance, batch),
        )

    @property
    def noisy(self) -> bool:
        """Whether any noise is added at all."""
        return isinstance(self.eta, Tensor) or self.eta > 0


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a run goes and with which numbers.

    Attributes:
        timesteps: int64 `[S]` in the order visited.
        table: float64 `[S, K]`, or `[B, S, K]` where a coefficient differs between samples; K =
            len(Row._fields).
        noisy: whether a step adds noise.
        guided: whether the model is evaluated on 2B samples.
    """

    timesteps: Tensor
    table: Tensor
    noisy: bool
    guided: bool

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]


def make_plan(
    schedule: Schedule,
    steps: int | Sequence[int] | Tensor,
    update: Update,
    *,
    spacing: str = "uniform",
    steps_offset: int = 0,
) -> Plan:
    """The plan of `sample`: down the timesteps, to ᾱ = 1 after the last.

    Args:
        schedule: ᾱ of the model.
        steps: how many steps (then `spacing` and `steps_offset` choose them), or the timesteps
            themselves in the order they are visited.
        update: the kind of step, checked.

    Raises:
        TypeError, ValueError: see `select_timesteps` and `coefficient_row`; the message names the
            step.
    """
    timesteps = select_timesteps(schedule.T, steps, spacing, steps_offset)
    alphas = schedule.alphas_cumprod[timesteps].tolist()
    rows = [
        coefficient_row(a, p, update, where=f" at step {s} (timestep {t})")
        for s, (t, a, p) in enumerate(
            zip(timesteps.tolist(), alphas, [*alphas[1:], 1.0], strict=True)
        )
    ]
    return Plan(timesteps, _table(rows), update.noisy, update.guidance_scale is not None)


def make_inversion_plan(
    schedule: Schedule,
    steps: int | Sequence[int] | Tensor,
    update: Update,
    *,
    spacing: str = "uniform",
    steps_offset: int = 0,
) -> Plan:
    """The plan of `invert`: the same timesteps upwards, from ᾱ = 1.

    Raises:
        TypeError, ValueError: see `select_timesteps` and `inversion_row`.
    """
    timesteps = select_timesteps(schedule.T, steps, spacing, steps_offset).flip(0)
    alphas = schedule.alphas_cumprod[timesteps].tolist()
    rows = [
        inversion_row(a, p, update, where=f" at step {s} (timestep {t})")
        for s, (t, a, p) in enumerate(
            zip(timesteps.tolist(), alphas, [1.0, *alphas[:-1]], strict=True)
        )
    ]
    return Plan(timesteps, _table(rows), False, update.guidance_scale is not None)


def select_timesteps(
    T: int, steps: int | Sequence[int] | Tensor, spacing: str = "uniform", steps_offset: int = 0
) -> Tensor:
    """int64 tensor `[S]` of distinct timesteps out of `range(T)`, in the order visited
    (decreasing).

    Args:
        T: number of training timesteps.
        steps: S in [1, T], or the timesteps themselves.
        spacing: `uniform` ⌊i·T/S⌋ (the paper's linear τ); `quadratic` (the paper's other τ, made
            strictly increasing); `leading` ⌊T/S⌋·i + steps_offset; `trailing` round(T − i·T/S) − 1;
            `linspace` round(linspace(0, T − 1, S)). At S = 1 only `trailing` starts at T − 1; the
            others visit t = 0 alone.
        steps_offset: of `leading`; 0 for every other spacing.

    Raises:
        TypeError: `steps` is neither an integer nor a sequence of integers.
        ValueError: a value is out of range, or the sequence is not strictly decreasing.
    """
    check_int("T", T, 1, 2**31)
    check_choice("spacing", spacing, SPACINGS)
    check_int("steps_offset", steps_offset, 0, T - 1)
    if steps_offset and spacing != "leading":
        raise ValueError(f"steps_offset: expected 0 unless spacing='leading', got {steps_offset}")
    if isinstance(steps, Tensor | np.ndarray) and steps.ndim == 1:
        steps = steps.tolist()
    if isinstance(steps, Sequence) and not isinstance(steps, str | bytes):
        return _explicit_timesteps(T, steps)
    S = check_int("steps", steps, 1, T)
    i = np.arange(S, dtype=np.int64)
    if spacing == "uniform":
        increasing = i * T // S
    elif spacing == "quadratic":
        squares = (np.linspace(0, math.sqrt(0.8 * T), S) ** 2).astype(np.int64)
        increasing = np.maximum.accumulate(squares - i) + i
    elif spacing == "leading":
        increasing = i * (T // S) + steps_offset
    elif spacing == "trailing":
        increasing = np.round(T - i * T / S).astype(np.int64)[::-1] - 1
    else:
        increasing = np.round(np.linspace(0, T - 1, S)).astype(np.int64)
    if increasing[-1] >= T:
        raise ValueError(
            f"steps_offset: expected timesteps below T = {T}, got {increasing[-1]} "
            f"with steps = {S} and steps_offset = {steps_offset}"
        )
    return torch.from_numpy(increasing[::-1].copy())


def coefficient_row(a: Coefficient, p: Coefficient, update: Update, *, where: str = "") -> Row:
    """The coefficients of one step from ᾱ = `a` to ᾱ = `p`.

    Args:
        a: ᾱ_t in [0, 1]; 1 (clean data) only without noise and where epsilon needs no division by
            √(1 − ᾱ_t).
        p: ᾱ of the next visited timestep in [0, 1]; at 1 no noise is added.
        update: the kind of step, checked.
        where: how an error names the step.

    Raises:
        ValueError: epsilon prediction at ᾱ_t = 0, noise on a step that does not go down, or an η so
            large that 1 − ᾱ_prev − σ² < 0.
    """
    _refuse_epsilon_at_zero(a, update.prediction, where)
    if _any(a == 1) and (update.noisy or update.rederive_eps or update.prediction == "sample"):
        raise ValueError(
            "alpha_t: expected a value below 1 for sample prediction, rederive_eps or eta > 0, "
            f"got 1{where}"
        )
    if update.noisy and _any(p < a):
        raise ValueError(
            f"eta: expected 0 where alpha_prev < alpha_t, got eta = {_shown(update.eta)}{where}"
        )
    cx, cm, ex, em = _prediction_coefficients(a, update.prediction)
    pe, pn = _deviations(a, p, update, where)
    k0, kx, km = p**0.5, pe * ex, pe * em
    if update.rederive_eps:
        k0, kx, km = p**0.5 - pe * (a / (1 - a)) ** 0.5, pe / (1 - a) ** 0.5, 0.0
    return Row(
        cx=cx,
        cm=cm,
        r=math.inf if update.clip is None else update.clip,
        k0=k0,
        kx=kx,
        km=km,
        pn=pn,
        g=1.0 if update.guidance_scale is None else update.guidance_scale,
    )


def inversion_row(a: Coefficient, p: Coefficient, update: Update, *, where: str = "") -> Row:
    """The coefficients of one step up, from ᾱ = `p` to ᾱ_t = `a` < p.

    `sample` goes down by x_p = A·x_t + B·m; solved for x_t with the model evaluated at the state at
    hand, x_t = (x_p − B·m)/A. Written as a predicted x_0 and epsilon at t, so that x_0 means the
    same as in `sample`.

    Raises:
        ValueError: A = 0 (sample prediction from ᾱ = 1), or epsilon prediction at ᾱ_t = 0.
    """
    _refuse_epsilon_at_zero(a, update.prediction, where)
    cx, cm, ex, em = _prediction_coefficients(a, update.prediction)
    A = p**0.5 * cx + (1 - p) ** 0.5 * ex
    B = p**0.5 * cm + (1 - p) ** 0.5 * em
    if _any(A == 0):
        raise ValueError(
            f"prediction: expected epsilon or v_prediction to invert from alpha_cumprod = 1, "
            f"got {update.prediction!r}{where}: the state there does not depend on x_t"
        )
    return Row(
        cx=cx / A,
        cm=cm - cx * B / A,
        r=math.inf,
        k0=a**0.5,
        kx=(1 - a) ** 0.5 * ex / A,
        km=(1 - a) ** 0.5 * (em - ex * B / A),
        pn=0.0,
        g=1.0 if update.guidance_scale is None else update.guidance_scale,
    )


def stack_row(row: Row) -> Tensor:
    """float64 tensor `[K]`, or `[B, K]` where a field is a tensor."""
    tensors = [v for v in row if isinstance(v, Tensor)]
    if not tensors:
        return torch.tensor(row, dtype=torch.float64, device="cpu")
    like = tensors[0]
    return torch.stack(
        [v if isinstance(v, Tensor) else torch.full_like(like, v) for v in row], dim=-1
    )


def to_table(rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows `[…, K]` as a backend reads them: a table `[R, K]` in the dtype that it computes in.

    Raises:
        ValueError: a coefficient overflows `dtype`.
    """
    table = rows.reshape(-1, rows.shape[-1]).to(dtype)
    if readable(rows):
        overflow = rows.reshape(table.shape).isfinite() & ~table.isfinite()
        if overflow.any():
            r, k = overflow.nonzero()[0].tolist()
            raise ValueError(
                f"alphas_cumprod: expected coefficients in the range of {dtype}, got "
                f"{Row._fields[k]} = {rows.reshape(table.shape)[r, k].item():g} in row {r}; "
                "a float64 state has the range"
            )
    return table.to(device)


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


def _prediction_coefficients(
    a: Coefficient, prediction: str
) -> tuple[Coefficient, Coefficient, Coefficient, Coefficient]:
    """(cx, cm, ex, em): x0 = cx·x + cm·m and eps = ex·x + em·m."""
    signal, sigma = a**0.5, (1 - a) ** 0.5
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal, 0.0, 1.0
    if prediction == "sample":
        return 0.0, 1.0, 1 / sigma, -signal / sigma
    return signal, -sigma, sigma, signal


def _deviations(
    a: Coefficient, p: Coefficient, update: Update, where: str
) -> tuple[Coefficient, Coefficient]:
    """(coefficient of eps, coefficient of the noise); eq. 16 and, for `variance="large"`, appendix
    D.3.
    """
    if not update.noisy:
        return (1 - p) ** 0.5, 0.0
    large = _floored(1 - a / _nonzero(p))
    small = (1 - p) / (1 - a) * large
    direction = 1 - p - update.eta**2 * small
    if _any(direction < -_ROUNDING):
        raise ValueError(
            f"eta: expected 1 - alpha_prev - sigma**2 >= 0, got {_shown(_least(direction))} "
            f"with eta = {_shown(update.eta)}{where}"
        )
    variance = small if update.variance == "small" else large * (p < 1)
    return _floored(direction) ** 0.5, update.eta * variance**0.5


def _refuse_epsilon_at_zero(a: Coefficient, prediction: str, where: str) -> None:
    if prediction == "epsilon" and _any(a == 0):
        raise ValueError(
            "prediction: expected sample or v_prediction where alpha_cumprod is 0 "
            f"(zero terminal SNR), got 'epsilon'{where}"
        )


def _table(rows: Sequence[Row]) -> Tensor:
    stacked = [stack_row(row) for row in rows]
    return torch.stack(stacked, dim=-2)


def _any(condition: Any) -> bool:
    """Whether a condition holds anywhere; values on an accelerator are not read."""
    if isinstance(condition, Tensor):
        return readable(condition) and bool(condition.any())
    return bool(condition)


def _floored(value: Any) -> Any:
    return value.clamp_min(0.0) if isinstance(value, Tensor) else max(value, 0.0)


def _nonzero(value: Any) -> Any:
    """0 → 1: at ᾱ_prev = 0 the state is noise already and the ratio ᾱ_t/ᾱ_prev never counts."""
    return torch.where(value == 0, 1.0, value) if isinstance(value, Tensor) else value or 1.0


def _least(value: Any) -> Any:
    return value.min() if isinstance(value, Tensor) else value


def _shown(value: Any) -> str:
    return (
        str([round(v, 6) for v in value.reshape(-1).tolist()])
        if isinstance(value, Tensor)
        else f"{value:g}"
    )
