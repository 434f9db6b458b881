"""The specification: one DDIM update in eager PyTorch.

name here   paper (arXiv 2010.02502)                        where
x           x_{τ_i}                                         eq. 12
m           model output: ε_θ, or x_0, or v                 eq. 9 for ε_θ
x0          "predicted x_0", f_θ(x)                         eq. 9
k0, kx, km  √ᾱ_prev on x0, √(1 − ᾱ_prev − σ²) on ε_θ, both  eq. 12
            written as coefficients of x0, x and m
pn, noise   σ, z                                            eq. 12, 16
g           classifier-free guidance scale                  arXiv 2207.12598

`plan.coefficient_row` derives the coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update(
    x: Tensor,  # [B, …]
    model_output: Tensor,  # [B or 2B, C or 2C, …]
    rows: Tensor,  # [1 or B, K], float64 or float32
    noise: Tensor | None,  # [B, …]
    history: Tensor | None = None,  # [B, …], an earlier model output
    mask: Tensor | None = None,  # [B, …], weight of `known` in the result
    known: Tensor | None = None,  # [B, …]
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_0), each with the shape and dtype of `x`.

    2B model outputs are guided: unconditional first, conditional second. Of 2C channels (learned
    variance) the first half is used. The arithmetic is float32 (float64 for a float64 state),
    rounded once at the end. A noise coefficient of 0 leaves the noise unread.
    """
    dtype = compute_dtype(x.dtype)
    # The order is that of `plan.Row`.
    columns = rows.to(dtype).reshape(rows.shape + (1,) * (x.ndim - 1)).unbind(1)
    cx, cm, r, k0, kx, km, pn, g, ph = columns
    m = model_output.to(dtype)
    if x.ndim > 1 and m.shape[1] != x.shape[1]:
        m = m[:, : x.shape[1]]
    if m.shape[0] != x.shape[0]:
        unconditional, conditional = m.chunk(2)
        m = unconditional + g * (conditional - unconditional)
    state = x.to(dtype)
    x0 = (cx * state + cm * m).clamp(-r, r)
    x_prev = k0 * x0 + kx * state + km * m
    if history is not None:
        x_prev = x_prev + ph * history.to(dtype)
    if noise is not None:
        x_prev = torch.where(pn != 0, x_prev + pn * noise.to(dtype), x_prev)
    if mask is not None and known is not None:
        x_prev = x_prev + mask.to(dtype) * (known.to(dtype) - x_prev)
    return x_prev.to(x.dtype), x0.to(x.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a state of `dtype` is computed in, and what its coefficients are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
