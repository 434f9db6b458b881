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
the first state. A wrong type raises TypeError and a wrong shape or value ValueError; both name the
argument. Where values are limited, NaN is out of range.

Timesteps count from 0, the paper's from 1: t = 0 is its t = 1. `t ≥ 1` steps from
`alphas_cumprod[t]` to `alphas_cumprod[t − 1]`, t = 0 to `alpha_prev = 1`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim.adapter import Model, output_tensor
from fastddim.plan import Coefficient
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.validation import (
    check_coefficient,
    check_like,
    check_model_output,
    check_state,
    check_timestep,
)

# σ² = 1 − α_{t−1} may come out of eq. 16 a few units of 2⁻⁵³ too large.
_ROUNDING = 1e-15


class Gaussian(NamedTuple):
    """N(mean, variance·I)."""

    mean: Tensor  # [B, …]
    variance: Tensor  # [1 or B, 1, …], float64


def marginal(x_0: Tensor, alpha_t: Coefficient) -> Gaussian:
    """q(x_t | x_0) = N(√α_t·x_0, (1 − α_t)·I), for every σ (lemma 1)."""
    check_state("x_0", x_0)
    a = _column("alpha_t", alpha_t, x_0, 1.0)
    return Gaussian((a.sqrt() * x_0).to(x_0.dtype), 1 - a)


def sigma(alpha_t: Coefficient, alpha_prev: Coefficient, eta: Coefficient) -> Tensor:
    """σ_t(η) of eq. 16, float64, 0-dim or `[B]`; η = 1 is DDPM's, η = 0 is DDIM's.

    An η above 1 can make σ² exceed 1 − α_{t−1}; `posterior` and `generative` then refuse the σ.
    """
    batch = _batch(alpha_t, alpha_prev, eta)
    a, p = _decreasing(
        _vector("alpha_t", alpha_t, batch, 1.0), _vector("alpha_prev", alpha_prev, batch, 1.0)
    )
    return _vector("eta", eta, batch) * ((1 - p) / (1 - a)).sqrt() * (1 - a / p).sqrt()


def sigma_hat(alpha_t: Coefficient, alpha_prev: Coefficient) -> Tensor:
    """σ̂_t = √(1 − α_t/α_{t−1}), DDPM's larger deviation, float64, 0-dim or `[B]`.

    It is for the noise alone: the mean keeps the direction term of `sigma(…, eta=1)`.
    """
    batch = _batch(alpha_t, alpha_prev)
    a, p = _decreasing(
        _vector("alpha_t", alpha_t, batch, 1.0), _vector("alpha_prev", alpha_prev, batch, 1.0)
    )
    return (1 - a / p).sqrt()


def posterior(
    x_t: Tensor, x_0: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> Gaussian:
    """q_σ(x_{t−1} | x_t, x_0) of eq. 7; needs α_t < α_{t−1} and σ² ≤ 1 − α_{t−1}."""
    a, p, s = _step(x_t, "x_0", x_0, alpha_t, alpha_prev, sigma)
    mean = _posterior_mean(x_t, x_0, a, p, _direction(p, s))
    return Gaussian(mean.to(x_t.dtype), s**2)


def forward_kernel(
    x_prev: Tensor, x_0: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> Gaussian:
    """q_σ(x_t | x_{t−1}, x_0) ∝ q_σ(x_{t−1} | x_t, x_0)·q(x_t | x_0) (eq. 8), for α_{t−1} < 1.

    By eq. 7 and lemma 1, (x_{t−1}, x_t) given x_0 is jointly Gaussian with variances 1 − α_{t−1}
    and 1 − α_t and covariance c = √(1 − α_{t−1} − σ²)·√(1 − α_t). Conditioned on x_{t−1}:

        mean = √α_t·x_0 + c/(1 − α_{t−1})·(x_{t−1} − √α_{t−1}·x_0)
        variance = 1 − α_t − c²/(1 − α_{t−1}) = σ²·(1 − α_t)/(1 − α_{t−1})
    """
    a, p, s = _step(x_prev, "x_0", x_0, alpha_t, alpha_prev, sigma)
    _refuse(p == 1, "alpha_prev: expected a value below 1 (from x_0 use marginal)", alpha_prev=p)
    covariance = _direction(p, s) * (1 - a).sqrt()
    mean = a.sqrt() * x_0 + covariance / (1 - p) * (x_prev - p.sqrt() * x_0)
    return Gaussian(mean.to(x_prev.dtype), s**2 * (1 - a) / (1 - p))


def predicted_x_0(x_t: Tensor, epsilon: Tensor, alpha_t: Coefficient) -> Tensor:
    """f_θ(x_t) = (x_t − √(1 − α_t)·ε_θ)/√α_t of eq. 9, shaped and typed like `x_t`; α_t > 0."""
    check_state("x_t", x_t)
    check_like("epsilon", epsilon, "x_t", x_t)
    a = _column("alpha_t", alpha_t, x_t, 1.0)
    return _predicted_x_0(x_t, epsilon, a).to(x_t.dtype)


def generative(
    x_t: Tensor, epsilon: Tensor, alpha_t: Coefficient, alpha_prev: Coefficient, sigma: Coefficient
) -> Gaussian:
    """p_θ(x_{t−1} | x_t) of eq. 10, given the model's `epsilon` at x_t.

    It is `posterior` at the predicted x_0 where α_{t−1} < 1, and N(f_θ(x_1), σ_1²·I), for any σ_1,
    where α_{t−1} = 1. (The last step of `fastddim.sample` returns that mean and adds no noise.)
    """
    a, p, s = _step(x_t, "epsilon", epsilon, alpha_t, alpha_prev, sigma)
    mean = _posterior_mean(
        x_t, _predicted_x_0(x_t, epsilon, a), a, p, _generative_direction(p, s)
    )
    return Gaussian(mean.to(x_t.dtype), s**2)


def training_loss(
    model: Model,
    x_0: Tensor,
    schedule: Schedule,
    t: int | Tensor,
    epsilon: Tensor,
    gamma: Tensor | None = None,
) -> Tensor:
    """mean_b γ_t·‖ε_θ(√α_t·x_0 + √(1 − α_t)·ε, t) − ε‖²: the terms of L_γ (eq. 5) at `t`.

    The norm is the paper's, a sum over the elements of a sample: divide by their number for a mean
    squared error. Summed over all t it estimates L_γ; with t uniform, L_γ/T.

    Args:
        model: called as `model(x_t, t)` with t int64 `[B]`; of 2C channels the first half is used.
        x_0: clean data `[B, …]`.
        t: timestep in [0, T), a number or an integer tensor `[B]`.
        epsilon: standard normal noise shaped like `x_0`.
        gamma: weights `[T]`, as `gamma` gives them; by default 1 (L_1).

    Returns:
        0-dim tensor, float64 for a float64 `x_0` and float32 otherwise, with its gradient.
    """
    x_t = schedule.add_noise(x_0, t, epsilon)
    index = check_timestep("t", t, x_0.shape[0], schedule.T)
    weight = torch.ones(schedule.T) if gamma is None else _weights(gamma, schedule.T)
    timesteps = index.to(x_0.device).expand(x_0.shape[0])
    output = check_model_output(
        "model output", output_tensor(model(x_t, timesteps)), x_t, guided=False
    )
    if output.shape != x_0.shape:
        output = output[:, : x_0.shape[1]]
    dtype = compute_dtype(x_0.dtype)
    squares = (output.to(dtype) - epsilon.to(dtype)).square().reshape(x_0.shape[0], -1).sum(1)
    return (weight[index].to(squares) * squares).mean()


def gamma(schedule: Schedule, sigmas: Coefficient) -> Tensor:
    """γ of theorem 1, float64 `[T]`: J_σ = L_γ + C, where C does not depend on the model.

    The terms of J_σ that see the model are KL(q_σ(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) for the
    paper's t > 1 and −log p_θ(x_0 | x_1) for t = 1. The two Gaussians have the same variance σ_t²,
    so that each is, up to a constant, ‖difference of means‖²/(2σ_t²). By eq. 7 and 10 the means
    differ by (√α_{t−1} − √α_t·√(1 − α_{t−1} − σ_t²)/√(1 − α_t))·(f_θ − x_0), by 1·(f_θ − x_0) at
    t = 1, and by eq. 9 ‖f_θ − x_0‖² = (1 − α_t)/α_t·‖ε_θ − ε‖².

    For a sub-sequence of timesteps pass a schedule of those:
    `Schedule.from_alphas_cumprod(schedule.alphas_cumprod[tau])`.

    Args:
        schedule: α of t = 0 … T − 1.
        sigmas: σ of t = 0 … T − 1, a number or a tensor `[T]`. All above 0 (eq. 16 gives σ = 0 at
            t = 0, which the theorem excludes), and σ² ≤ 1 − α_{t−1} for t ≥ 1.
    """
    a = schedule.alphas_cumprod
    _refuse(a == 0, "schedule: expected alphas_cumprod above 0", alphas_cumprod=a)
    p = torch.cat([a.new_ones(1), a[:-1]])
    s = _vector("sigmas", sigmas, schedule.T).expand(schedule.T).to(a.device)
    _refuse(s == 0, "sigmas: expected values above 0", sigmas=s)
    return ((p * (1 - a) / a).sqrt() - _generative_direction(p, s, "sigmas")) ** 2 / (2 * s**2)


def _posterior_mean(x_t: Tensor, x_0: Tensor, a: Tensor, p: Tensor, direction: Tensor) -> Tensor:
    return p.sqrt() * x_0 + direction * (x_t - a.sqrt() * x_0) / (1 - a).sqrt()


def _predicted_x_0(x_t: Tensor, epsilon: Tensor, a: Tensor) -> Tensor:
    _refuse(a == 0, "alpha_t: expected a value above 0 to predict x_0 from epsilon", alpha_t=a)
    return (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()


def _generative_direction(p: Tensor, s: Tensor, name: str = "sigma") -> Tensor:
    """That of eq. 7, which at α_{t−1} = 1 and σ = 0 is the point x_0: the mean of eq. 10 at t = 1."""
    return _direction(p, torch.where(p == 1, 0.0, s), name)


def _direction(p: Tensor, s: Tensor, name: str = "sigma") -> Tensor:
    """√(1 − α_{t−1} − σ²)."""
    square = 1 - p - s**2
    _refuse(
        square < -_ROUNDING,
        f"{name}: expected {name}**2 <= 1 - alpha_prev",
        **{name: s, "alpha_prev": p},
    )
    return square.clamp_min(0).sqrt()


def _step(
    x: Tensor,
    other_name: str,
    other: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    sigma: Coefficient,
) -> tuple[Tensor, Tensor, Tensor]:
    pass
