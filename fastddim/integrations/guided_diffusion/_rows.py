"""Coefficients of steps, from the arrays of a `GaussianDiffusion`, one row for each timestep."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastddim.plan import Row


def row_down(diffusion: Any, kind: str, clip: float | None, eta: float) -> Row:
    p = _narrow(diffusion.alphas_cumprod_prev)
    return _row(diffusion, p, _deviation(diffusion, eta), kind, clip)


def row_up(diffusion: Any, kind: str, clip: float | None) -> Row:
    p = _narrow(diffusion.alphas_cumprod_next)
    return _row(diffusion, p, torch.zeros_like(p), kind, clip)


def concluding_row(diffusion: Any, eta: float) -> Row:
    """A step down that takes epsilon as the state and x_0 as the model output."""
    p, sigma = _narrow(diffusion.alphas_cumprod_prev), _deviation(diffusion, eta)
    return Row(
        cx=0.0,
        cm=1.0,
        r=math.inf,
        k0=(p**0.5).double(),
        kx=((1 - p - sigma**2) ** 0.5).double(),
        km=0.0,
        pn=sigma.double(),
        g=1.0,
    )


def _deviation(diffusion: Any, eta: float) -> Tensor:
    # The roots of whole vectors, since the original has a coefficient for each element of x.
    a, p = _narrow(diffusion.alphas_cumprod), _narrow(diffusion.alphas_cumprod_prev)
    return eta * ((1 - p) / (1 - a)) ** 0.5 * (1 - a / p) ** 0.5


def _row(diffusion: Any, p: Tensor, sigma: Tensor, kind: str, clip: float | None) -> Row:
    """A step to ᾱ = p, with eps = (x/√ᾱ − x_0)/√(1/ᾱ − 1)."""
    x_scale, eps_scale = _scales(diffusion)
    direction = ((1 - p - sigma**2) ** 0.5).double() / eps_scale
    cx, cm = _prediction(diffusion, kind)
    return Row(
        cx=cx,
        cm=cm,
        r=math.inf if clip is None else clip,
        k0=(p**0.5).double() - direction,
        kx=direction * x_scale,
        km=0.0,
        pn=sigma.double(),
        g=1.0,
    )


def predicting_row(diffusion: Any, kind: str) -> Row:
    """A step whose new state is x_0."""
    cx, cm = _prediction(diffusion, kind)
    return Row(cx=cx, cm=cm, r=math.inf, k0=1.0, kx=0.0, km=0.0, pn=0.0, g=1.0)


def conditioning_row(diffusion: Any, kind: str, clip: float | None) -> Row:
    """A step that moves x_0 along a gradient, which takes the place of the noise: reducing eps by
    √(1 − ᾱ) times the gradient adds √(1/ᾱ − 1)·√(1 − ᾱ) times the gradient to x_0.
    """
    deviation = ((1 - _narrow(diffusion.alphas_cumprod)) ** 0.5).double()
    _, eps_scale = _scales(diffusion)
    return predicting_row(diffusion, kind)._replace(
        r=math.inf if clip is None else clip, pn=eps_scale * deviation
    )


def _prediction(diffusion: Any, kind: str) -> tuple[Tensor, Tensor]:
    """(cx, cm): x_0 = cx·x + cm·m."""
    x_scale, eps_scale = _scales(diffusion)
    if kind == "EPSILON":
        return x_scale, -eps_scale
    if kind == "START_X":
        return torch.zeros_like(x_scale), torch.ones_like(x_scale)
    # The mean of q(x_{t−1} | x_t, x_0) (arXiv 2006.11239, eq. 7), solved for x_0.
    of_x_0, of_x = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
    return -_narrow(of_x / of_x_0).double(), _narrow(1 / of_x_0).double()


def _scales(diffusion: Any) -> tuple[Tensor, Tensor]:
    """1/√ᾱ and √(1/ᾱ − 1)."""
    x_scale = _narrow(diffusion.sqrt_recip_alphas_cumprod).double()
    return x_scale, _narrow(diffusion.sqrt_recipm1_alphas_cumprod).double()


def _narrow(values: Any) -> Tensor:
    """Float32, to which the original rounds each of its float64 arrays before use."""
    return torch.as_tensor(values, device="cpu").float()
