"""Interpolation between latents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastddim.validation import check_like, check_same_dtype, check_state


def slerp(z_0: Tensor, z_1: Tensor, weight: float | Sequence[float] | Tensor) -> Tensor:
    """Spherical interpolation between latents (arXiv 2010.02502, eq. 67), the angle taken per
    sample.

    Args:
        z_0, z_1: latents `[B, …]` of one shape, dtype and device.
        weight: α, a number or `[n]` numbers: 0 gives `z_0` and 1 gives `z_1`.

    Returns:
        `[B, …]` for a number, `[n, B, …]` for `[n]` (`.flatten(0, 1)` makes it a batch for
        `sample`), in the dtype of `z_0`. Latents that are parallel, or of which one is zero, are
        interpolated on the straight line between them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """
    check_state("z_0", z_0)
    check_like("z_1", z_1, "z_0", z_0)
    check_same_dtype("z_1", z_1, z_0.dtype)
    weights = _slerp_weights(weight).to(z_0.device)
    first, second = z_0.double().flatten(1), z_1.double().flatten(1)
    theta = _angle(first, second)
    alpha = weights.reshape(-1, 1, 1)
    sine = theta.sin()
    zero = (first == 0).all(1, keepdim=True) | (second == 0).all(1, keepdim=True)
    straight = zero | (sine < 1e-9)
    sine = torch.where(straight, 1.0, sine)
    w_0 = torch.where(straight, 1 - alpha, ((1 - alpha) * theta).sin() / sine)
    w_1 = torch.where(straight, alpha, (alpha * theta).sin() / sine)
    mixed = (w_0 * first + w_1 * second).to(z_0.dtype)
    return mixed.reshape(*weights.shape, *z_0.shape)


def _slerp_weights(weight: float | Sequence[float] | Tensor) -> Tensor:
    try:
        # NumPy first: torch would round Python floats to float32.
        weights = weight if isinstance(weight, Tensor) else torch.from_numpy(np.array(weight))
    except (TypeError, ValueError) as error:
        raise TypeError(f"weight: expected a number or [n] of them, got {weight!r}") from error
    if weights.is_complex() or weights.dtype == torch.bool:
        raise TypeError(f"weight: expected real numbers, got dtype {weights.dtype}")
    if weights.ndim > 1:
        raise ValueError(f"weight: expected a number or [n], got shape {tuple(weights.shape)}")
    if weights.device.type == "cpu" and not bool(weights.isfinite().all()):
        raise ValueError(f"weight: expected finite numbers, got {weights.tolist()}")
    return weights.double()


def _angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle between the rows of two matrices, `[B, 1]`; exact to rounding near 0 and π (Kahan)."""
    a, b = (torch.nn.functional.normalize(v, dim=1, eps=1e-300) for v in (first, second))
    return 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
