"""Timesteps and coefficients of one sampling run, all in float64.

The update of every step is affine in the state x and the model output m (arXiv 2010.02502, eq. 9,
12 and 16). With a = ᾱ_t and p = ᾱ of the next visited timestep (1 after the last):

    x0 = cx·x + cm·m, clamped to [−r, r]
    eps = e0·x0 + ex·x + em·m
    x_prev = √p·x0 + √(1−p−σ²)·eps + pn·z

where e0 is 0 unless eps is re-derived from x0. With the coefficients of x0, x and m in x_prev
collected into k0, kx and km,

    x_prev = k0·x0 + kx·x + km·m + pn·z + ph·h

where z is noise and h the eps of the step before, which order 2 extrapolates from.
`coefficient_row` is where these numbers come from; `reference.update` and the kernels are where
they are used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.elementary import sqrt
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
PerStep: TypeAlias = Coefficient | Sequence[Coefficient]

SPACINGS = ("uniform", "quadratic", "leading", "trailing", "linspace")
VARIANCES = ("small", "large")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
ORDERS = (1, 2)

# Sums of float64 numbers below 1 go wrong by a few units of 2⁻⁵³; anything further below 0 is a
# real negative.
_ROUNDING = 1e-14


class Row(NamedTuple):
    """One row of the coefficient table; a field may be a number or a tensor `[B]`.

    Attributes:
        cx: of x in the predicted x0.
        cm: of m in the predicted x0.
        r: x0 is clamped to [−r, r]; infinity where it is not.
        k0: of x0 in x_prev.
        kx: of x in x_prev.
        km: of m in x_prev.
        pn: of the noise; at 0 the noise is not read.
        g: guidance scale.
        ph: of the eps of the step before.
        e0: of x0 in eps.
        ex: of x in eps.
        em: of m in eps.
    """

    cx: Coefficient
    cm: Coefficient
    r: Coefficient
    k0: Coefficient
    kx: Coefficient
    km: Coefficient
    pn: Coefficient
    g: Coefficient
    ph: Coefficient = 0.0
    e0: Coefficient = 0.0
    ex: Coefficient = 0.0
    em: Coefficient = 0.0


class Scales(NamedTuple):
    """The roots that the coefficients of one step are made of; numbers or tensors `[B]`.

    Attributes:
        signal: √ᾱ_t.
        sigma: √(1 − ᾱ_t).
        next_signal: √ᾱ_prev.
        direction: √(1 − ᾱ_prev − σ²).
        noise: σ.
    """

    signal: Coefficient
    sigma: Coefficient
    next_signal: Coefficient
    direction: Coefficient
    noise: Coefficient


class Fit(NamedTuple):
    """What a row takes from the data of its sample, as `reference.fitted_rows` specifies it.

    Attributes:
        rescale: φ of guidance rescale, in [0, 1].
        ratio: quantile of dynamic thresholding, in (0, 1], or 0 for none.
        limit: the most that its threshold can be, or infinity.
    """

    rescale: float
    ratio: float
    limit: float


@dataclass(frozen=True)
class Update:
    """How a step is taken, apart from where it is on the schedule.

    `eta`, `guidance_scale` (or None) and `temperature` are coefficients, or for a plan sequences of
    them with one a step.
    """

    eta: Any = 0.0
    variance: str = "small"
    prediction: str = "epsilon"
    clip: float | None = None
    rederive_eps: bool = False
    guidance_scale: Any = None
    temperature: Any = 1.0
    guidance_rescale: float = 0.0
    dynamic_thresholding_ratio: float | None = None
    sample_max_value: float | None = None

    def checked(self, batch: int | None, *, per_step: bool = False) -> Update:
        """The same with every field checked and tensors turned to float64.

        Args:
            batch: B, or None where tensors cannot be used.
            per_step: whether sequences with one value a step can be used.

        Raises:
            TypeError, ValueError: a field is of the wrong type, shape or range; the message names
                it.
        """

        def coefficient(name: str, low: float = -math.inf) -> Any:
            value = getattr(self, name)
            if per_step and isinstance(value, Sequence) and not isinstance(value, str | bytes):
                return tuple(
                    check_coefficient(f"{name}[{s}]", v, batch, low) for s, v in enumerate(value)
                )
            return check_coefficient(name, value, batch, low)

        guidance, clip = self.guidance_scale, self.clip
        checked = Update(
            eta=coefficient("eta", 0.0),
            variance=check_choice("variance", self.variance, VARIANCES),
            prediction=check_choice("prediction", self.prediction, PREDICTIONS),
            clip=None if clip is None else check_number("clip", clip, 0.0, open_low=True),
            rederive_eps=check_bool("rederive_eps", self.rederive_eps),
            guidance_scale=None if guidance is None else coefficient("guidance_scale"),
            temperature=coefficient("temperature", 0.0),
            guidance_rescale=check_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0),
            dynamic_thresholding_ratio=self.dynamic_thresholding_ratio,
            sample_max_value=self.sample_max_value,
        )
        checked._check_fit()
        return checked

    def _check_fit(self) -> None:
        if self.guidance_rescale > 0 and self.guidance_scale is None:
            raise ValueError(
                f"guidance_rescale: expected 0 without guidance_scale, got {self.guidance_rescale}"
            )
        ratio, limit = self.dynamic_thresholding_ratio, self.sample_max_value
        if ratio is None:
            if limit is not None:
                raise ValueError(
                    "sample_max_value: expected None without dynamic_thresholding_ratio, "
                    f"got {limit!r}"
                )
            return
        check_number("dynamic_thresholding_ratio", ratio, 0.0, 1.0, open_low=True)
        if limit is not None:
            check_number("sample_max_value", limit, 1.0)
        if self.clip is not None:
            raise ValueError(
                f"clip: expected None with dynamic_thresholding_ratio, got {self.clip!r}"
            )

    @property
    def noisy(self) -> bool:
        """Whether any noise is added at all."""
        etas = self.eta if isinstance(self.eta, tuple) else (self.eta,)
        return any(isinstance(eta, Tensor) or eta > 0 for eta in etas)

    @property
    def fit(self) -> Fit | None:
        """What each step takes from the data, if anything."""
        ratio, limit = self.dynamic_thresholding_ratio, self.sample_max_value
        if ratio is None and self.guidance_rescale == 0:
            return None
        return Fit(self.guidance_rescale, ratio or 0.0, math.inf if limit is None else limit)

    def at_each(self, steps: int) -> list[Update]:
        """The update of every step.

        Raises:
            ValueError: a sequence has not one value a step.
        """
        series = {}
        for name in ("eta", "guidance_scale", "temperature"):
            values = getattr(self, name)
            if not isinstance(values, tuple):
                continue
            if len(values) != steps:
                raise ValueError(
                    f"{name}: expected one value a step, {steps}, got {len(values)} of them"
                )
            series[name] = values
        return [replace(self, **{n: v[s] for n, v in series.items()}) for s in range(steps)]


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a run goes and with which numbers.

    Attributes:
        timesteps: int64 `[S]` in the order visited, as the model is given them.
        alphas_cumprod: float64 `[S + 1]`, ᾱ of the states: before the first step and after each.
        table: float64 `[S, K]`, or `[B, S, K]` where a coefficient differs between samples; K =
            len(Row._fields).
        predicting: rows like those of `table` that give the predicted x_0 as the new state, where
            a function of the user comes between it and the step by `table`; else None.
        rederived: whether the step after such a function reads the state, and not epsilon.
        fit: what the rows of a step take from its data, if anything.
        noisy: whether a step adds noise.
        guided: whether the model is evaluated on 2B samples.
        order: of the integration; 2 reads the epsilon of the step before.
        refine: how many times a step is repeated with the model evaluated at its result.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    table: Tensor
    predicting: Tensor | None
    rederived: bool
    fit: Fit | None
    noisy: bool
    guided: bool
    order: int = 1
    refine: int = 0

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
    order: int = 1,
    hooked: bool = False,
) -> Plan:
    """The plan of `sample`: down the timesteps, to ᾱ = 1 after the last.

    Args:
        schedule: ᾱ of the model.
        steps: how many steps (then `spacing` and `steps_offset` choose them), or the timesteps
            themselves in the order they are visited.
        update: the kind of step, checked.
        order: 1, or 2 for the two-step Adams–Bashforth form of eq. 14, whose first step is of
            order 1.
        hooked: whether the step is cut at the predicted x_0.

    Raises:
        TypeError, ValueError: see `select_timesteps` and `coefficient_row`; the message names the
            step. So is an `order` that is not known, or that is 2 with noise.
    """
    check_choice("order", order, ORDERS)
    if order > 1 and update.noisy:
        raise ValueError("order: expected 1 with eta > 0, since order 2 solves an ODE, got 2")
    timesteps = select_timesteps(schedule.T, steps, spacing, steps_offset)
    alphas = [*schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    updates = update.at_each(len(timesteps))
    rows, predicting = [], []
    for s, (t, each) in enumerate(zip(timesteps.tolist(), updates, strict=True)):
        a, p, where = alphas[s], alphas[s + 1], f" at step {s} (timestep {t})"
        c = _extrapolation(alphas[s - 1], a, p) if order > 1 and s > 0 else 0.0
        rows.append(coefficient_row(a, p, each, where=where, extrapolation=c))
        if hooked:
            predicting.append(predicting_row(rows[-1]))
            rows[-1] = concluding_row(a, p, each, rows[-1], c)
    return Plan(
        timesteps,
        torch.tensor(alphas, dtype=torch.float64, device="cpu"),
        _table(rows),
        _table(predicting) if hooked else None,
        hooked and update.rederive_eps,
        update.fit,
        update.noisy,
        update.guidance_scale is not None,
        order,
    )


def make_inversion_plan(
    schedule: Schedule,
    steps: int | Sequence[int] | Tensor,
    update: Update,
    *,
    spacing: str = "uniform",
    steps_offset: int = 0,
    order: int = 1,
    refine: int = 0,
) -> Plan:
    """The plan of `invert`: the same timesteps upwards, from ᾱ = 1.

    At order 1 the step to timestep t evaluates the model at t. At order 2 all but the first
    evaluate it where they start, as the order asks for.

    Raises:
        TypeError, ValueError: see `select_timesteps` and `inversion_row`; also for an unknown
            `order`, and for `refine` where it is not an integer in [0, 100] or not 0 at order 2.
    """
    check_choice("order", order, ORDERS)
    check_int("refine", refine, 0, 100)
    if refine and order > 1:
        raise ValueError(
            f"refine: expected 0 at order 2, which leaves nothing to iterate, got {refine}"
        )
    timesteps = select_timesteps(schedule.T, steps, spacing, steps_offset).flip(0)
    alphas = [1.0, *schedule.alphas_cumprod[timesteps].tolist()]
    updates = update.at_each(len(timesteps))
    rows = []
    for s, (t, each) in enumerate(zip(timesteps.tolist(), updates, strict=True)):
        p, a, where = alphas[s], alphas[s + 1], f" at step {s} (timestep {t})"
        if order > 1 and s > 0:
            c = _extrapolation(alphas[s - 1], p, a)
            rows.append(coefficient_row(p, a, each, where=where, extrapolation=c))
        else:
            rows.append(inversion_row(a, p, each, where=where))
    if order > 1:
        timesteps = torch.cat([timesteps[:1], timesteps[:-1]])
    return Plan(
        timesteps,
        torch.tensor(alphas, dtype=torch.float64, device="cpu"),
        _table(rows),
        None,
        False,
        update.fit,
        False,
        update.guidance_scale is not None,
        order,
        refine,
    )


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
        roots = np.linspace(0, math.sqrt(0.8 * T), S)
        increasing = np.maximum.accumulate((roots * roots).astype(np.int64) - i) + i
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


def coefficient_row(
    a: Coefficient, p: Coefficient, update: Update, *, where: str = "", extrapolation: float = 0.0
) -> Row:
    """The coefficients of one step from ᾱ = `a` to ᾱ = `p`.

    Args:
        a: ᾱ_t in [0, 1]; 1 (clean data) only without noise and where epsilon needs no division by
            √(1 − ᾱ_t).
        p: ᾱ of the next visited timestep in [0, 1]; at 1 no noise is added.
        update: the kind of step, checked.
        where: how an error names the step.
        extrapolation: weight of eps − h, where h is the eps of the step before.

    Raises:
        ValueError: epsilon prediction at ᾱ_t = 0, noise on a step that does not go down, or an η so
            large that 1 − ᾱ_prev − σ² < 0.
    """
    a, p = _alike(a, p)
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
    if update.noisy:
        direction = 1 - p - update.eta * update.eta * _variances(a, p)[0]
        if _any(direction < -_ROUNDING):
            raise ValueError(
                f"eta: expected 1 - alpha_prev - sigma**2 >= 0, got {_shown(_least(direction))} "
                f"with eta = {_shown(update.eta)}{where}"
            )
    return unchecked_row(a, p, update, extrapolation)


def unchecked_row(
    a: Coefficient, p: Coefficient, update: Update, extrapolation: float = 0.0
) -> Row:
    """`coefficient_row` for tensors of any steps: what is refused there gives infinity or NaN."""
    direction, noise = _deviations(a, p, update)
    return row_of(Scales(sqrt(a), sqrt(1 - a), sqrt(p), direction, noise), update, extrapolation)


def row_of(scales: Scales, update: Update, extrapolation: float = 0.0) -> Row:
    """The coefficients of the step with these roots."""
    signal, sigma, next_signal, direction, noise = scales
    cx, cm, ex, em = prediction_coefficients(signal, sigma, update.prediction)
    e0: Coefficient = 0.0
    if update.rederive_eps:
        e0, ex, em = -signal / sigma, 1 / sigma, 0.0
    pe = direction + extrapolation
    return Row(
        cx=cx,
        cm=cm,
        r=math.inf if update.clip is None else update.clip,
        k0=next_signal + pe * e0,
        kx=pe * ex,
        km=pe * em,
        pn=noise * update.temperature,
        g=1.0 if update.guidance_scale is None else update.guidance_scale,
        ph=-extrapolation,
        e0=e0,
        ex=ex,
        em=em,
    )


def prediction_coefficients(
    signal: Coefficient, sigma: Coefficient, prediction: str
) -> tuple[Coefficient, Coefficient, Coefficient, Coefficient]:
    """(cx, cm, ex, em) of √ᾱ_t and √(1 − ᾱ_t): x0 = cx·x + cm·m and eps = ex·x + em·m."""
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal, 0.0, 1.0
    if prediction == "sample":
        return 0.0, 1.0, 1 / sigma, -signal / sigma
    return signal, -sigma, sigma, signal


def predicting_row(row: Row) -> Row:
    """The first half of a step that is cut at x_0: x_0 before clipping as the new state, and eps
    of the model as epsilon.
    """
    return row._replace(r=math.inf, k0=1.0, kx=0.0, km=0.0, pn=0.0, ph=0.0)


def concluding_row(
    a: Coefficient, p: Coefficient, update: Update, row: Row, extrapolation: float = 0.0
) -> Row:
    """The second half, which reads x_0 as the model output and, as the state, the state itself
    where eps is re-derived from x_0, else the eps of the first half.
    """
    if update.rederive_eps:
        given = replace(update, prediction="sample", guidance_scale=None)
        return unchecked_row(a, p, given, extrapolation)
    pe = _deviations(a, p, update)[0] + extrapolation
    return row._replace(cx=0.0, cm=1.0, k0=sqrt(p), kx=pe, km=0.0, g=1.0, e0=0.0, ex=1.0, em=0.0)


def mixing_row(x: Coefficient, m: Coefficient) -> Row:
    """The row by which the new state is x·(state) + m·(model output)."""
    return Row(cx=0.0, cm=0.0, r=math.inf, k0=0.0, kx=x, km=m, pn=0.0, g=1.0)


def known_rows(alphas_cumprod: Tensor) -> Tensor:
    """Rows `[S, K]` that give known data as it is after each step: mixed from the data and x_T on
    the straight line by which η = 0 takes x_T to the data.

    Args:
        alphas_cumprod: of a `Plan`, below 1 at first.
    """
    first, rest = alphas_cumprod[0], alphas_cumprod[1:]
    of_x_T = sqrt((1 - rest) / (1 - first))
    return stack_row(mixing_row(sqrt(rest) - of_x_T * sqrt(first), of_x_T))


def inversion_row(a: Coefficient, p: Coefficient, update: Update, *, where: str = "") -> Row:
    """The coefficients of one step up, from ᾱ = `p` to ᾱ_t = `a` < p.

    `sample` goes down by x_p = A·x_t + B·m; solved for x_t with the model evaluated at the state at
    hand, x_t = (x_p − B·m)/A. Written as a predicted x_0 and epsilon at t, so that x_0 means the
    same as in `sample`.

    Raises:
        ValueError: A = 0 (sample prediction from ᾱ = 1), or epsilon prediction at ᾱ_t = 0.
    """
    _refuse_epsilon_at_zero(a, update.prediction, where)
    signal, sigma = sqrt(a), sqrt(1 - a)
    cx, cm, ex, em = prediction_coefficients(signal, sigma, update.prediction)
    A = sqrt(p) * cx + sqrt(1 - p) * ex
    B = sqrt(p) * cm + sqrt(1 - p) * em
    if _any(A == 0):
        raise ValueError(
            f"prediction: expected epsilon or v_prediction to invert from alpha_cumprod = 1, "
            f"got {update.prediction!r}{where}: the state there does not depend on x_t"
        )
    ex, em = ex / A, em - ex * B / A
    return Row(
        cx=cx / A,
        cm=cm - cx * B / A,
        r=math.inf,
        k0=signal,
        kx=sigma * ex,
        km=sigma * em,
        pn=0.0,
        g=1.0 if update.guidance_scale is None else update.guidance_scale,
        ex=ex,
        em=em,
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


def to_table(
    rows: Tensor, dtype: torch.dtype, device: torch.device, *, checked: bool = True
) -> Tensor:
    """Rows `[…, K]` as a backend reads them: a table `[R, K]` in the dtype that it computes in.

    Raises:
        ValueError: a coefficient overflows `dtype`, and is `checked`.
    """
    table = rows.reshape(-1, rows.shape[-1]).to(dtype)
    if checked and readable(rows):
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


def _deviations(a: Coefficient, p: Coefficient, update: Update) -> tuple[Coefficient, Coefficient]:
    """(coefficient of eps, coefficient of the noise); eq. 16 and, for `variance="large"`, appendix
    D.3.
    """
    if not update.noisy:
        return sqrt(1 - p), 0.0
    small, large = _variances(a, p)
    direction = 1 - p - update.eta * update.eta * small
    variance = small if update.variance == "small" else large * (p < 1)
    return sqrt(settled(direction)), update.eta * sqrt(variance)


def _variances(a: Coefficient, p: Coefficient) -> tuple[Any, Any]:
    """σ(1)² of eq. 16 and DDPM's larger one."""
    large = _floored(1 - a / _nonzero(p))
    return (1 - p) / (1 - a) * large, large


def settled(value: Any) -> Any:
    """A difference of numbers below 1: 0 where only rounding has taken it below 0, NaN where more
    than that has.
    """
    if not isinstance(value, Tensor):
        return max(value, 0.0)
    rounding = 64 * torch.finfo(value.dtype).eps
    return torch.where(value < -rounding, math.nan, value.clamp_min(0.0))


def _extrapolation(b: float, a: float, p: float) -> float:
    """Weight of eps(a) − eps(b) in a step from ᾱ = `a` to ᾱ = `p` that comes after one from `b`.

    Eq. 14 is dx̄ = eps dσ with x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ). Two-step Adams–Bashforth with the
    steps h = σ(p) − σ(a) and h_b = σ(a) − σ(b) adds h²/(2·h_b)·(eps(a) − eps(b)) to the step of
    order 1.
    """
    if 0 in (a, b, p):
        return 0.0  # σ is infinite there: no line goes through it
    sigma_b, sigma_a, sigma_p = (sqrt((1 - v) / v) for v in (b, a, p))
    h, h_b = sigma_p - sigma_a, sigma_a - sigma_b
    return float(sqrt(p) * h * h / (2 * h_b))


def _refuse_epsilon_at_zero(a: Coefficient, prediction: str, where: str) -> None:
    if prediction == "epsilon" and _any(a == 0):
        raise ValueError(
            "prediction: expected sample or v_prediction where alpha_cumprod is 0 "
            f"(zero terminal SNR), got 'epsilon'{where}"
        )


def _table(rows: Sequence[Row]) -> Tensor:
    stacked = [stack_row(row) for row in rows]
    shape = max((row.shape for row in stacked), key=len)
    return torch.stack([row.expand(shape) for row in stacked], dim=-2)


def _any(condition: Any) -> bool:
    """Whether a condition holds anywhere; values on an accelerator are not read."""
    if isinstance(condition, Tensor):
        return readable(condition) and bool(condition.any())
    return bool(condition)


def _floored(value: Any) -> Any:
    return value.clamp_min(0.0) if isinstance(value, Tensor) else max(value, 0.0)


def _alike(a: Coefficient, p: Coefficient) -> tuple[Coefficient, Coefficient]:
    """Two numbers or two tensors: torch divides a number by a tensor with two roundings."""
    if isinstance(a, Tensor) and not isinstance(p, Tensor):
        return a, torch.full_like(a, p)
    if isinstance(p, Tensor) and not isinstance(a, Tensor):
        return torch.full_like(p, a), p
    return a, p


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
