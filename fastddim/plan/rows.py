"""The coefficients of a step, in float64.

The update of every step is affine in the state x and the model output m (arXiv 2010.02502, eq. 9,
12 and 16). With a = ᾱ_t and p = ᾱ of the next visited timestep (1 after the last):

    x0 = cx·x + cm·m, clamped to [−r, r]
    eps = e0·x0 + ex·x + em·m
    x_prev = √p·x0 + √(1−p−σ²)·eps + pn·z

where e0 is 0 unless eps is re-derived from x0. With the coefficients of x0, x and m in x_prev
collected into k0, kx and km,

    x_prev = k0·x0 + kx·x + km·m + pn·z + ph·h

where z is noise and h the eps of the step before, which order 2 extrapolates from.
`coefficient_row` computes these numbers; `reference.update` and the kernels use them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastddim.choices import Prediction, PredictionSynonym
from fastddim.elementary import sqrt
from fastddim.options import Coefficient, PerStep, Update
from fastddim.plan.multistep import NO_HISTORY, Weights, epsilon_weights
from fastddim.validation import readable

# Sums of float64 numbers below 1 are off by a few units of 2⁻⁵³; anything further below 0 is a
# real negative.
_ROUNDING = 1e-14


class Row(NamedTuple):
    """One row of the coefficient table; a field may be a number or a tensor `[B]`.

    Attributes:
        cx: factor of x in the predicted x0.
        cm: factor of m in the predicted x0.
        r: x0 is clamped to [−r, r]; infinity for no clamp.
        k0: factor of x0 in x_prev.
        kx: factor of x in x_prev.
        km: factor of m in x_prev.
        pn: factor of the noise; at 0 the noise is not read.
        g: guidance scale.
        ph: factor of the eps of the step before.
        e0: factor of x0 in eps.
        ex: factor of x in eps.
        em: factor of m in eps.
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


def coefficient_row(
    a: Coefficient,
    p: Coefficient,
    update: Update,
    *,
    where: str = "",
    weights: Weights = NO_HISTORY,
) -> Row:
    """The coefficients of one step from ᾱ = `a` to ᾱ = `p`.

    Args:
        a: ᾱ_t in [0, 1]; 1 (clean data) only without noise and where epsilon needs no division by
            √(1 − ᾱ_t) and is not the score times 0.
        p: ᾱ of the next visited timestep in [0, 1]; at 1 no noise is added.
        update: the kind of step, checked.
        where: the name of the step in an error.
        weights: those of eps − h for each earlier eps h, as `plan.multistep` gives them; or those
            of tuned steps.

    Raises:
        ValueError: epsilon or score prediction at ᾱ_t = 0, noise on a step that does not go down,
            or an η so large that 1 − ᾱ_prev − σ² < 0.
    """
    a, p = _alike(a, p)
    _refuse_unknown_x_0(a, update.prediction, where)
    unknown = update.prediction in ("sample", "score")
    if _any(a == 1) and (update.noisy or update.rederive_eps or unknown):
        raise ValueError(
            "alpha_t: expected a value below 1 for sample or score prediction, rederive_eps or "
            f"eta > 0, got 1{where}"
        )
    if update.noisy and _any(p < a):
        raise ValueError(
            f"eta: expected 0 where alpha_prev < alpha_t, got eta = {_shown(update.eta)}{where}"
        )
    if update.noisy:
        eta = _coefficient(update.eta)
        direction = 1 - p - eta * eta * _variances(a, p)[0]
        if _any(direction < -_ROUNDING):
            raise ValueError(
                f"eta: expected 1 - alpha_prev - sigma**2 >= 0, got {_shown(_least(direction))} "
                f"with eta = {_shown(eta)}{where}"
            )
    return unchecked_row(a, p, update, weights)


def unchecked_row(
    a: Coefficient, p: Coefficient, update: Update, weights: Weights = NO_HISTORY
) -> Row:
    """`coefficient_row` for tensors of any steps: a step that is refused there gives infinity or
    NaN here, except score prediction at ᾱ_t = 1, whose epsilon is 0.
    """
    direction, noise = _deviations(a, p, update)
    return row_of(Scales(sqrt(a), sqrt(1 - a), sqrt(p), direction, noise), update, weights)


def row_of(scales: Scales, update: Update, weights: Weights = NO_HISTORY) -> Row:
    """The coefficients of the step with these roots."""
    signal, sigma, next_signal, direction, noise = scales
    cx, cm, ex, em = prediction_coefficients(signal, sigma, update.prediction)
    e0: Coefficient = 0.0
    if update.rederive_eps:
        e0, ex, em = -signal / sigma, 1 / sigma, 0.0
    pe, ph = epsilon_weights(direction, weights)
    return Row(
        cx=cx,
        cm=cm,
        r=math.inf if update.clip is None else update.clip,
        k0=next_signal + pe * e0,
        kx=pe * ex,
        km=pe * em,
        pn=noise * _coefficient(update.temperature),
        g=_guidance(update),
        ph=ph,
        e0=e0,
        ex=ex,
        em=em,
    )


def prediction_coefficients(
    signal: Coefficient, sigma: Coefficient, prediction: Prediction | PredictionSynonym
) -> tuple[Coefficient, Coefficient, Coefficient, Coefficient]:
    """(cx, cm, ex, em) of √ᾱ_t and √(1 − ᾱ_t): x0 = cx·x + cm·m and eps = ex·x + em·m."""
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal, 0.0, 1.0
    if prediction == "sample":
        return 0.0, 1.0, 1 / sigma, -signal / sigma
    if prediction == "score":
        return 1 / signal, sigma * sigma / signal, 0.0, -sigma
    if prediction == "v_prediction":
        return signal, -sigma, sigma, signal
    raise ValueError(f"prediction: expected that of a checked update, got {prediction!r}")


def first_half_row(row: Row) -> Row:
    """The first half of a step that is split at x_0: x_0 before clipping as the new state, and the
    model's eps as epsilon.
    """
    return row._replace(r=math.inf, k0=1.0, kx=0.0, km=0.0, pn=0.0, ph=0.0)


def second_half_row(
    a: Coefficient,
    p: Coefficient,
    update: Update,
    row: Row,
    weights: Weights = NO_HISTORY,
) -> Row:
    """The second half, which reads x_0 as the model output and, as the state, the state itself
    where eps is re-derived from x_0, else the eps of the first half.
    """
    if update.rederive_eps:
        given = replace(update, prediction="sample", guidance_scale=None)
        return unchecked_row(a, p, given, weights)
    pe, _ = epsilon_weights(_deviations(a, p, update)[0], weights)
    return row._replace(cx=0.0, cm=1.0, k0=sqrt(p), kx=pe, km=0.0, g=1.0, e0=0.0, ex=1.0, em=0.0)


def mixing_row(x: Coefficient, m: Coefficient) -> Row:
    """The row by which the new state is x·(state) + m·(model output)."""
    return Row(cx=0.0, cm=0.0, r=math.inf, k0=0.0, kx=x, km=m, pn=0.0, g=1.0)


def known_row(alphas_cumprod: Tensor) -> Row:
    """The row that mixes the data and x_T to known data at the noise level after each step, on the
    straight line by which η = 0 takes x_T to the data; its fields are `[S]`.

    Args:
        alphas_cumprod: those of a `Plan`, the first one below 1.
    """
    first, rest = alphas_cumprod[0], alphas_cumprod[1:]
    of_x_T = sqrt((1 - rest) / (1 - first))
    return mixing_row(sqrt(rest) - of_x_T * sqrt(first), of_x_T)


def inversion_row(a: Coefficient, p: Coefficient, update: Update, *, where: str = "") -> Row:
    """The coefficients of one step up, from ᾱ = `p` to ᾱ_t = `a` < p.

    `sample` goes down by x_p = A·x_t + B·m; solved for x_t with the model evaluated at the state at
    hand, x_t = (x_p − B·m)/A. The row is written as a predicted x_0 and epsilon at t, where x_0
    means the same as in `sample`.

    Raises:
        ValueError: A = 0 (sample prediction from ᾱ = 1), or epsilon or score prediction at
            ᾱ_t = 0.
    """
    _refuse_unknown_x_0(a, update.prediction, where)
    signal, sigma = sqrt(a), sqrt(1 - a)
    cx, cm, ex, em = prediction_coefficients(signal, sigma, update.prediction)
    A = sqrt(p) * cx + sqrt(1 - p) * ex
    B = sqrt(p) * cm + sqrt(1 - p) * em
    if _any(A == 0):
        raise ValueError(
            "prediction: expected epsilon, v_prediction or score to invert from alpha_cumprod = 1, "
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
        g=_guidance(update),
        ex=ex,
        em=em,
    )


def _deviations(a: Coefficient, p: Coefficient, update: Update) -> tuple[Coefficient, Coefficient]:
    """(coefficient of eps, coefficient of the noise); eq. 16 and, for `variance="large"`, appendix
    D.3.
    """
    if not update.noisy:
        return sqrt(1 - p), 0.0
    eta = _coefficient(update.eta)
    small, large = _variances(a, p)
    direction = 1 - p - eta * eta * small
    variance = small if update.variance == "small" else large * (p < 1)
    return sqrt(settled(direction)), eta * sqrt(variance)


def _guidance(update: Update) -> Coefficient:
    return 1.0 if update.guidance_scale is None else _coefficient(update.guidance_scale)


def _coefficient(value: PerStep) -> Coefficient:
    """The value at the one step that an update is for."""
    return cast(Coefficient, value)


def _variances(a: Coefficient, p: Coefficient) -> tuple[Any, Any]:
    """σ(1)² of eq. 16 and DDPM's larger one."""
    large = _floored(1 - a / _nonzero(p))
    return (1 - p) / (1 - a) * large, large


def settled(value: Any) -> Any:
    """A difference of numbers below 1: 0 where rounding alone has taken it below 0, NaN where it is
    further below.
    """
    if not isinstance(value, Tensor):
        return max(value, 0.0)
    rounding = 64 * torch.finfo(value.dtype).eps
    return torch.where(value < -rounding, math.nan, value.clamp_min(0.0))


def _refuse_unknown_x_0(a: Coefficient, prediction: str, where: str) -> None:
    """Refuse a prediction that says nothing of x_0 where the state is noise alone."""
    if prediction in ("epsilon", "score") and _any(a == 0):
        raise ValueError(
            "prediction: expected sample or v_prediction where alpha_cumprod is 0 "
            f"(zero terminal SNR), got {prediction!r}{where}"
        )


def _any(condition: Any) -> bool:
    """True where a condition holds anywhere; values on an accelerator are not read."""
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
