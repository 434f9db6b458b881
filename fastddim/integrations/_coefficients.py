"""Coefficients of the steps of diffusers' schedulers, computed with its operations and its dtype.

diffusers itself is not imported: a config is a mapping, and ᾱ a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastddim.integrations._shared import each
from fastddim.plan import (
    Rescaling,
    Row,
    Scales,
    Update,
    prediction_coefficients,
    row_of,
    settled,
)

# Stands in for 1/0, so that no infinity is subtracted from another before the clip.
_HUGE = 1e30

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
"""The variances of DDPM that do not depend on the model."""


def ddim_row(
    config: Mapping[str, Any], a: Tensor, p: Tensor, eta: float = 0.0, rederive_eps: bool = False
) -> Row:
    """The coefficients of DDIM's steps (arXiv 2010.02502, eq. 12 and 16) from ᾱ = a to ᾱ = p.

    Args:
        a, p: ᾱ `[R]`, floating point.
        rederive_eps: `use_clipped_model_output` of diffusers.
    """
    update = Update(
        eta=eta,
        prediction=config["prediction_type"],
        clip=limits(config)[0],
        rederive_eps=rederive_eps,
    )
    return row_of(scales(a, p, eta), update)


def ancestral_row(config: Mapping[str, Any], a: Tensor, p: Tensor) -> Row:
    """The coefficients of DDPM's steps (arXiv 2006.11239, eq. 7) from ᾱ = a to ᾱ = p.

    The noise coefficients apply to steps that add noise; diffusers adds none at t = 0.

    Args:
        a, p: ᾱ `[R]`, floating point.
    """
    k0, kx, variance, large = posterior(a, p)
    cx, cm, _, _ = prediction_coefficients(
        roots(a).double(), roots(1 - a).double(), config["prediction_type"]
    )
    clip, _ = limits(config)
    return Row(
        cx=cx,
        cm=cm,
        r=float("inf") if clip is None else clip,
        k0=k0.double(),
        kx=kx.double(),
        km=0.0,
        pn=_fixed_deviation(config["variance_type"], variance, large).double(),
        g=1.0,
    )


def posterior(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of x_0 and x_t in the posterior mean, and the smaller and the larger variance
    (arXiv 2006.11239, eq. 7 and section 3.2).
    """
    ratio = a / p
    large = 1 - ratio
    k0 = roots(p) * large / (1 - a)
    kx = roots(ratio) * (1 - p) / (1 - a)
    variance = ((1 - p) / (1 - a) * large).clamp(min=1e-20)
    return k0, kx, variance, large


def _fixed_deviation(variance_type: str, variance: Tensor, large: Tensor) -> Tensor:
    """Standard deviation of the noise of each timestep; 1 if the noise is scaled elsewhere."""
    if variance_type == "fixed_small":
        return roots(variance)
    if variance_type == "fixed_small_log":
        return each(lambda v: torch.exp(0.5 * torch.log(v)), variance)
    if variance_type == "fixed_large":
        return roots(large)
    if variance_type == "fixed_large_log":
        return roots(each(torch.log, large))
    return torch.ones_like(variance)


def finite(row: Row) -> Row:
    """The row with a huge number instead of 1/0."""
    return Row(
        *(
            v.nan_to_num(nan=float("nan"), posinf=_HUGE, neginf=-_HUGE)
            if isinstance(v, Tensor)
            else v
            for v in row
        )
    )


def roots(values: Tensor) -> Tensor:
    """Square roots, which diffusers writes as a power of 0.5."""
    return each(torch.sqrt, values)


def scales(a: Tensor, p: Tensor, eta: float = 0.0) -> Scales:
    """Roots of steps from ᾱ = a to ᾱ = p, computed in the dtype of a and widened to float64."""
    signal, next_signal = roots(torch.stack([a, p]))
    sigma, direction = roots(torch.stack([1 - a, 1 - p]))
    noise = torch.zeros_like(a)
    if eta > 0:
        noise = eta * roots((1 - p) / (1 - a) * (1 - a / p))
        direction = roots(settled(1 - p - noise**2))
    return Scales(*(v.double() for v in (signal, sigma, next_signal, direction, noise)))


def valid(config: Any) -> bool:
    """Tell whether a config has rows; if not, diffusers raises the error."""
    thresholded = not config.get("thresholding") or 0 < config["dynamic_thresholding_ratio"] <= 1
    return thresholded and config["prediction_type"] in _PREDICTION_TYPES


def limits(config: Any) -> tuple[float | None, Rescaling | None]:
    """The clip and the rescaling of a config; at least one of them is None."""
    if config.get("thresholding"):
        return None, Rescaling(
            0.0, config["dynamic_thresholding_ratio"], config["sample_max_value"]
        )
    return (config.get("clip_sample_range", 1.0) if config["clip_sample"] else None), None
