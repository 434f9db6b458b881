"""The forward process of DDIM, its reversal and its objective, as Gaussians.

    name here       paper (arXiv 2010.02502)                    where
    alpha_t         α_t, elsewhere in this package ᾱ_t          section 2
    alpha_prev      α_{t−1}; 1 at t = 1                         section 3
    epsilon         ε, or the model's ε_θ(x_t)                  eq. 4, 9
    marginal        q_σ(x_t | x_0)                              eq. 4, lemma 1
    posterior       q_σ(x_{t−1} | x_t, x_0)                     eq. 7
    forward_kernel  q_σ(x_t | x_{t−1}, x_0)                     eq. 8
    predicted_x_0   f_θ(x_t)                                    eq. 9
    generative      p_θ(x_{t−1} | x_t)                          eq. 10
    training_loss   one t of L_γ                                eq. 5
    gamma           γ_t                                         theorem 1
    sigma, eta      σ_t, η                                      eq. 7, 16
    sigma_hat       σ̂_t                                         section 5, appendix D.3

An alpha, sigma or eta is a number or a real tensor `[B]`, one value per sample. States are
floating-point tensors `[B, …]`. The arithmetic is float64; a mean is rounded once, to the dtype of
the first state. A wrong type raises TypeError and a wrong shape or value (NaN among them)
ValueError; both name the argument. Timesteps count from 0, the paper's from 1: t = 0 is its t = 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim.adapter import Model, check_model, output_tensor
from fastddim.elementary import sqrt
from fastddim.options import Coefficient
from fastddim.schedule import Schedule
from fastddim.transforms import bare
from fastddim.validation import (
    check_coefficient,
    check_int,
    check_like,
    check_model_output,
    check_state,
    check_timestep,
    with_derivatives,
)

# σ² = 1 − α_{t−1} may come out of eq. 16 too large by a few units of 2⁻⁵³.
_ROUNDING = 1e-15


class Gaussian(NamedTuple):
    """N(mean, variance·I).

    Attributes:
        mean: `[B, …]`, in the dtype of the state that it is computed from.
        variance: float64 `[1 or B, 1, …]`.
    """

    mean: Tensor
    variance: Tensor


def marginal(x_0: Tensor, alpha_t: Coefficient) -> Gaussian:
    """q(x_t | x_0) = N(√α_t·x_0, (1 − α_t)·I), for every σ (lemma 1)."""
    check_state("x_0", x_0)
    a = _column(_vector("alpha_t", alpha_t, len(x_0), 1.0), x_0)
    return Gaussian((sqrt(a) * x_0).to(x_0.dtype), 1 - a)


def sigma(alpha_t: Coefficient, alpha_prev: Coefficient, eta: Coefficient) -> Tensor:
    """σ_t(η) = η·√((1 − α_{t−1})/(1 − α_t))·√(1 − α_t/α_{t−1}) (eq. 16), float64, 0-dim or `[B]`.

    An η above 1 can make σ² exceed 1 − α_{t−1}; `posterior` and `generative` then refuse the σ.
    """
    batch = _batch(alpha_t, alpha_prev, eta)
    a, p = _alphas(alpha_t, alpha_prev, batch)
    return _vector("eta", eta, batch) * sqrt((1 - p) / (1 - a)) * sigma_hat(a, p)


def sigma_hat(alpha_t: Coefficient, alpha_prev: Coefficient) -> Tensor:
    """`σ̂_t = √(1 − α_t/α_{t−1})`, DDPM's larger deviation, float64, 0-dim or `[B]`.

    Only the noise has this deviation: the mean keeps the direction term of `sigma(…, eta=1)`.
    """
    a, p = _alphas(alpha_t, alpha_prev, _batch(alpha_t, alpha_prev))
    return sqrt(1 - a / p)


def posterior(
    x_t: Tensor, x_0: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> Gaussian:
    """q_σ(x_{t−1} | x_t, x_0) of eq. 7; needs α_t < α_{t−1} and σ² ≤ 1 − α_{t−1}."""
    _check_states("x_t", x_t, "x_0", x_0)
    a, p, s = _step(x_t, alpha_t, alpha_prev, sigma)
    mean = sqrt(p) * x_0 + _direction(p, s) * (x_t - sqrt(a) * x_0) / sqrt(1 - a)
    return Gaussian(mean.to(x_t.dtype), s * s)


def forward_kernel(
    x_prev: Tensor, x_0: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> Gaussian:
    """q_σ(x_t | x_{t−1}, x_0) ∝ q_σ(x_{t−1} | x_t, x_0)·q(x_t | x_0) (eq. 8), for α_{t−1} < 1.

    By eq. 7 and lemma 1, (x_{t−1}, x_t) given x_0 is jointly Gaussian with variances 1 − α_{t−1}
    and 1 − α_t and covariance c = √(1 − α_{t−1} − σ²)·√(1 − α_t). Conditioned on x_{t−1}:

        mean = √α_t·x_0 + c/(1 − α_{t−1})·(x_{t−1} − √α_{t−1}·x_0)
        variance = 1 − α_t − c²/(1 − α_{t−1}) = σ²·(1 − α_t)/(1 − α_{t−1})
    """
    _check_states("x_prev", x_prev, "x_0", x_0)
    a, p, s = _step(x_prev, alpha_t, alpha_prev, sigma)
    _refuse(p == 1, "alpha_prev: expected a value below 1 (from x_0 use marginal)", alpha_prev=p)
    covariance = _direction(p, s) * sqrt(1 - a)
    mean = sqrt(a) * x_0 + covariance / (1 - p) * (x_prev - sqrt(p) * x_0)
    return Gaussian(mean.to(x_prev.dtype), s * s * (1 - a) / (1 - p))


def predicted_x_0(x_t: Tensor, epsilon: Tensor, alpha_t: Coefficient) -> Tensor:
    """f_θ(x_t) = (x_t − √(1 − α_t)·ε_θ)/√α_t of eq. 9, shaped and typed like `x_t`; α_t > 0."""
    _check_states("x_t", x_t, "epsilon", epsilon)
    a = _column(_vector("alpha_t", alpha_t, len(x_t), 1.0), x_t)
    _refuse(a == 0, "alpha_t: expected a value above 0 to predict x_0 from epsilon", alpha_t=a)
    return ((x_t - sqrt(1 - a) * epsilon) / sqrt(a)).to(x_t.dtype)


def generative(
    x_t: Tensor, epsilon: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> Gaussian:
    """p_θ(x_{t−1} | x_t) of eq. 10, given the model's `epsilon` at x_t.

    It is `posterior` at the predicted x_0 where α_{t−1} < 1, and N(f_θ(x_1), σ_1²·I), for any σ_1,
    where α_{t−1} = 1. (The last step of `fastddim.sample` returns that mean and adds no noise.)
    """
    _check_states("x_t", x_t, "epsilon", epsilon)
    _, p = _alphas(alpha_t, alpha_prev, len(x_t))
    s = _vector("sigma", sigma, len(x_t))
    x_0 = predicted_x_0(x_t.double(), epsilon, alpha_t)
    mean = posterior(x_t.double(), x_0, alpha_t, alpha_prev, _direction_sigma(p, s)).mean
    return Gaussian(mean.to(x_t.dtype), _column(s * s, x_t))


def training_loss(
    model: Model,
    x_0: Tensor,
    schedule: Schedule,
    t: int | Tensor,
    epsilon: Tensor,
    gamma: Coefficient = 1.0,
) -> Tensor:
    """mean_b γ_t·‖ε_θ(√α_t·x_0 + √(1 − α_t)·ε, t) − ε‖²: the terms of L_γ (eq. 5) at `t`.

    The norm is the paper's, a sum over the elements of a sample. Divide the loss by their number
    for a mean squared error. The sum over all t estimates L_γ; for uniform t, the mean estimates
    L_γ/T. The result is float64, 0-dim.

    Args:
        model: called as `model(x_t, t)` with x_t = `schedule.add_noise(x_0, t, epsilon)` and t
            int64 `[B]`; of 2C channels the first half is used.
        x_0: clean data `[B, …]`, B ≥ 1.
        t: timestep in [0, T), a number or an integer tensor `[B]`.
        epsilon: standard normal noise shaped like `x_0`.
        gamma: weights ≥ 0, a number or a tensor `[T]` such as `gamma` gives; by default L_1.
    """
    check_model(model)
    _check_schedule(schedule)
    _check_states("x_0", x_0, "epsilon", epsilon)
    batch = check_int("batch of x_0", len(x_0), 1, 2**31)
    index = check_timestep("t", t, batch, schedule.T).expand(batch)
    weights = _vector("gamma", gamma, schedule.T).expand(schedule.T)[index]
    x_t = schedule.add_noise(x_0, index, epsilon)
    result = output_tensor(model(x_t, index.to(x_0.device)))
    output = check_model_output("model output", result, x_t, guided=False)
    estimate = output if output.shape == x_0.shape else output[:, : x_0.shape[1]]
    squares = (estimate.double() - epsilon.double()).square().reshape(batch, -1).sum(1)
    return (weights.to(x_0.device) * squares).mean()


def gamma(schedule: Schedule, sigma: Coefficient) -> Tensor:
    """γ of theorem 1, float64 `[T]`: J_σ = L_γ + C, where C does not depend on the model.

    The terms of J_σ that depend on the model are KL(q_σ(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t))
    for the paper's t > 1 and −log p_θ(x_0 | x_1) for t = 1. The two Gaussians have the same
    variance σ_t², so each term is ‖difference of means‖²/(2σ_t²), plus a constant at t = 1. By eq.
    7 and 10 the means differ by (√α_{t−1} − √α_t·√(1 − α_{t−1} − σ_t²)/√(1 − α_t))·(f_θ − x_0), or
    by f_θ − x_0 at t = 1. By eq. 9, f_θ − x_0 = √((1 − α_t)/α_t)·(ε − ε_θ).

    Args:
        schedule: α of every t; for a sub-sequence, `Schedule.from_alphas_cumprod` of its own α.
        sigma: σ of every t, a number or a tensor `[T]`. It is above 0 (eq. 16 gives 0 at t = 0,
            which the theorem excludes) and, for t ≥ 1, σ² ≤ 1 − α_{t−1}.
    """
    _check_schedule(schedule)
    a = schedule.alphas_cumprod
    _refuse(a == 0, "schedule: expected alphas_cumprod above 0", alphas_cumprod=a)
    p = torch.cat([a.new_ones(1), a[:-1]])
    s = _vector("sigma", sigma, schedule.T).expand_as(a)
    _refuse(s == 0, "sigma: expected values above 0", sigma=s)
    apart = sqrt(p * (1 - a) / a) - _direction(p, _direction_sigma(p, s))
    return apart * apart / (2 * s * s)


def _direction(p: Tensor, s: Tensor) -> Tensor:
    """√(1 − α_{t−1} − σ²)."""
    rest = 1 - p - s * s
    _refuse(rest < -_ROUNDING, "sigma: expected sigma**2 <= 1 - alpha_prev", sigma=s, alpha_prev=p)
    return sqrt(rest.clamp_min(0))


def _direction_sigma(p: Tensor, s: Tensor) -> Tensor:
    """σ in the mean of eq. 10: 0 at α_{t−1} = 1, where the mean is f_θ."""
    return torch.where(p == 1, 0.0, s)


def _step(
    x: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> list[Tensor]:
    """[α_t, α_{t−1}, σ_t], each shaped to broadcast against `x`."""
    a, p = _alphas(alpha_t, alpha_prev, len(x))
    return [_column(v, x) for v in (a, p, _vector("sigma", sigma, len(x)))]


def _alphas(alpha_t: Coefficient, alpha_prev: Coefficient, batch: int | None) -> list[Tensor]:
    a, p = _vector("alpha_t", alpha_t, batch, 1.0), _vector("alpha_prev", alpha_prev, batch, 1.0)
    _refuse(p <= a, "alpha_prev: expected a value above alpha_t", alpha_prev=p, alpha_t=a)
    return [a, p]


def _batch(*coefficients: Coefficient) -> int | None:
    return next((len(v) for v in coefficients if isinstance(v, Tensor) and v.ndim == 1), None)


def _vector(name: str, value: Coefficient, batch: int | None, high: float = math.inf) -> Tensor:
    """float64 on the CPU, 0-dim or `[batch]`, inside [0, high]."""
    value = value.cpu() if isinstance(value, Tensor) else value
    checked = with_derivatives(check_coefficient(name, value, batch, 0.0, high), value)
    return torch.as_tensor(checked, dtype=torch.float64)


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """`[1 or B, 1, …]`; with dimensions, it makes torch compute in float64 for every dtype of x."""
    return vector.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def _check_states(x_name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    check_state(x_name, x)
    check_like(other_name, other, x_name, x)


def _check_schedule(schedule: Schedule) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: expected a fastddim.Schedule, got {type(schedule).__name__}")


def _refuse(bad: Tensor, expected: str, **given: Tensor) -> None:
    """Raise a ValueError with the `given` values at the first place where `bad` holds, unless a
    transform of `torch.func` hides the values.
    """
    if bare(bad) and bool(bad.any()):
        i = int(bad.flatten().nonzero()[0])
        got = [f"{name} = {v.expand_as(bad).flatten()[i].item()}" for name, v in given.items()]
        where = f" at index {i}" if bad.numel() > 1 else ""
        raise ValueError(f"{expected}, got {', '.join(got)}{where}")
