"""`ddim` of stable-diffusion-webui, which no registry has: written out here."""

from __future__ import annotations

import types

import numpy as np
import torch


class WebuiModel:
    """A model with epsilon, and ᾱ in the attribute of the webui's models."""

    def __init__(self, alphas_cumprod):
        inner = types.SimpleNamespace(alphas_cumprod=alphas_cumprod)
        self.inner_model = types.SimpleNamespace(inner_model=inner)

    def __call__(self, x, t, scale=1.0):
        assert t.shape == x.shape[:1]
        t = t.reshape(-1, *[1] * (x.ndim - 1)) / 1000
        return torch.tanh(x * (0.5 + t)) * scale


def peer_webui(model, x, timesteps, extra_args=None, callback=None, disable=None, eta=0.0):
    alphas = model.inner_model.inner_model.alphas_cumprod[timesteps]
    before = torch.cat([alphas[:1], alphas[:-1]]).double()
    # It divides arrays of NumPy by tensors, which Tensor does by way of the reciprocal.
    variances = (1 - before) * (1 - alphas).reciprocal() * (1 - alphas / before)
    sigmas = eta * np.sqrt(variances.numpy())
    deviations = torch.sqrt(1 - alphas)
    dtype = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(x.shape[0], dtype=dtype)
    for i, index in enumerate(range(len(timesteps) - 1, 0, -1)):
        a, p, sigma, deviation = (
            v[index].item() * ones for v in (alphas, before, sigmas, deviations)
        )
        epsilon = model(x, x.new_ones(x.shape[0]) * timesteps[index], **(extra_args or {}))
        root, next_root, direction = a.sqrt(), p.sqrt(), (1 - p - sigma**2).sqrt()
        root, next_root, direction, sigma, deviation = (
            v.reshape(-1, *[1] * (x.ndim - 1))
            for v in (root, next_root, direction, sigma, deviation)
        )
        x_0 = (x - deviation * epsilon) / root
        x = next_root * x_0 + direction * epsilon + sigma * torch.randn_like(x)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": 0, "sigma_hat": 0, "denoised": x_0})
    return x
