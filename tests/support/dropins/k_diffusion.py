"""A denoiser and levels of noise as k-diffusion has them."""

from __future__ import annotations

import torch

LINEAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def denoiser(x, sigma, shift=0.0):
    assert sigma.shape == x.shape[:1]
    sigma = sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + sigma**2) + shift) * 0.9


def levels(dtype, last=0.0):
    return torch.cat([torch.logspace(1.2, -1.5, 12, dtype=torch.float64), torch.tensor([last])]).to(
        dtype
    )
