"""`functions/denoising.py` of ermongroup/ddim, which no registry has: written out here."""

from __future__ import annotations

import torch

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def alpha(b, t):
    """ᾱ of timestep t, 1 at t = −1."""
    return torch.cat([torch.zeros(1, dtype=b.dtype), b]).neg().add(1).cumprod(0)[t + 1]


def peer_generalized(x, seq, model, b, **kwargs):
    states, predictions = [x], []
    for t, after in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=False):
        # [1, …]: a tensor with dimensions, which promotes.
        a, p = (alpha(b, s).reshape((1,) * x.ndim) for s in (t, after))
        epsilon = model(states[-1], torch.full((x.shape[0],), float(t)))
        predictions.append((states[-1] - (1 - a).sqrt() * epsilon) / a.sqrt())
        sigma = kwargs.get("eta", 0) * ((1 - a / p) * (1 - p) / (1 - a)).sqrt()
        direction = (1 - p - sigma**2).sqrt() * epsilon
        states.append(p.sqrt() * predictions[-1] + sigma * torch.randn_like(x) + direction)
    return states, predictions


def peer_ddpm(x, seq, model, b):
    states, predictions = [x], []
    for t, after in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=False):
        a, p = (alpha(b, s).reshape((1,) * x.ndim) for s in (t, after))
        x, beta = states[-1], 1 - a / p
        epsilon = model(x, torch.full((x.shape[0],), float(t)))
        x_0 = ((1 / a).sqrt() * x - (1 / a - 1).sqrt() * epsilon).clamp(-1, 1)
        mean = (p.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - p) * x) / (1 - a)
        noise = torch.randn_like(x)
        predictions.append(x_0)
        states.append(mean + (t != 0) * torch.exp(0.5 * beta.log()) * noise)
    return states, predictions


def model(x, t):
    assert t.dtype == torch.float32
    time = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.tanh(x * (0.3 + time)) + 0.2 * time
