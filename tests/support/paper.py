"""The papers' formulas written out in NumPy float64 and in Python's integers.

Nothing here uses the package's own arithmetic, so that agreement means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

# Unit roundoff of a rounding to nearest.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def column(value: Any, like: np.ndarray) -> np.ndarray:
    """A number, or `[B]` shaped to broadcast over `[B, …]`, in float64."""
    array = np.asarray(value, dtype=np.float64)
    return array.reshape(array.shape + (1,) * (like.ndim - 1)) if array.ndim else array


def ddim_step(
    x: np.ndarray,
    m: np.ndarray,
    a: Any,
    p: Any,
    *,
    eta: Any = 0.0,
    variance: str = "small",
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = False,
    z: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(x_prev, x_0): equations 9, 12 and 16 and appendix D.3 of arXiv 2010.02502 as printed."""
    a, p, eta = (column(v, x) for v in (a, p, eta))
    if prediction == "epsilon":
        eps = m
        x_0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    elif prediction == "sample":
        x_0 = m
        eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    elif prediction == "score":
        # ∇ log p_t(x) of x = √ā·x_0 + √(1−ā)·ε is −ε/√(1−ā) (arXiv 2011.13456).
        eps = -np.sqrt(1 - a) * m
        x_0 = (x + (1 - a) * m) / np.sqrt(a)
    else:
        # v = √ā·ε − √(1−ā)·x_0 (arXiv 2202.00512), solved together with x = √ā·x_0 + √(1−ā)·ε.
        x_0 = np.sqrt(a) * x - np.sqrt(1 - a) * m
        eps = np.sqrt(a) * m + np.sqrt(1 - a) * x
    if clip is not None:
        x_0 = np.minimum(np.maximum(x_0, -clip), clip)
    if rederive_eps:
        eps = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    sigma = eta * np.sqrt((1 - p) / (1 - a)) * np.sqrt(np.maximum(1 - a / p, 0.0))
    noise = sigma if variance == "small" else eta * np.sqrt(1 - a / p) * (p < 1)
    direction = np.sqrt(np.maximum(1 - p - sigma**2, 0.0))
    return np.sqrt(p) * x_0 + direction * eps + noise * z, x_0


def guided(output: np.ndarray, scale: Any) -> np.ndarray:
    """u + g·(c − u) of a doubled output, unconditional half first (arXiv 2207.12598)."""
    u, c = np.split(output, 2)
    return u + column(scale, u) * (c - u)


def ddim_sample(
    model: Callable[[np.ndarray, int], np.ndarray],
    x: np.ndarray,
    timesteps: Sequence[int],
    alphas_cumprod: np.ndarray,
    noise: np.ndarray | None = None,
    **update: Any,
) -> np.ndarray:
    """Eq. 12 along `timesteps`, ᾱ = 1 after the last; `noise` is `[S, B, …]`."""
    for s, t in enumerate(timesteps):
        p = alphas_cumprod[timesteps[s + 1]] if s + 1 < len(timesteps) else 1.0
        z = 0.0 if noise is None else noise[s]
        x, _ = ddim_step(x, model(x, t), alphas_cumprod[t], p, z=z, **update)
    return x


def linear_alphas(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """ᾱ of DDPM's linear β, one factor at a time."""
    alphas, product = [], 1.0
    for i in range(T):
        product *= 1.0 - (start + (end - start) * i / max(T - 1, 1))
        alphas.append(product)
    return np.array(alphas)


def philox_words(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as in Salmon et al. (SC 2011), in unbounded Python integers."""
    c = list(counter)
    k = list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0], c[1], c[2], c[3]


def uniform_of(word: int) -> np.float32:
    """u = r·2⁻³² + 2⁻³³ with every operation rounded to float32."""
    return np.float32(np.float32(word) * np.float32(2.0**-32)) + np.float32(2.0**-33)


def normals_of(words: Sequence[int]) -> list[float]:
    """Box–Muller in float64 on the float32 uniforms of four words."""
    u = [float(uniform_of(w)) for w in words]
    z = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius = math.sqrt(-2 * math.log(first))
        z += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    return z
