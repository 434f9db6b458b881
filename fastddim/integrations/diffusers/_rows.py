"""Coefficients of steps by the operations of diffusers, one row for each timestep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.integrations._shared import each
from fastddim.plan import Rescaling, Row, Scales, settled, stack_row
from fastddim.steptable import StepTable

# In the place of 1/0, so that infinity is not taken from infinity before the clip.
_HUGE = 1e30

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class SignedTable(StepTable):
    """Rows made from `doubled`, which are those of t in [−T, T)."""

    @staticmethod
    def position(count: int, row: int) -> int:
        half = count // 2
        if not -half <= row < half:
            raise IndexError(
                f"timestep: expected an index of alphas_cumprod, in [{-half}, {half}), got {row}"
            )
        return row % count


def signed_table(row: Row, rescaling: Rescaling | None = None) -> SignedTable:
    """Make a table of rows for t in [−T, T), with a huge number in the place of 1/0."""
    finite = Row(
        *(
            v.nan_to_num(nan=float("nan"), posinf=_HUGE, neginf=-_HUGE)
            if isinstance(v, Tensor)
            else v
            for v in row
        )
    )
    return SignedTable(stack_row(finite), rescaling=rescaling)


def doubled(at_t: Tensor, before: Tensor, past_the_end: Tensor) -> tuple[Tensor, Tensor]:
    """(ᾱ_t, ᾱ_prev) for t in [−T, T), so that indexing by t is right for a negative t as well,
    which reads ᾱ from the end and has nothing before it.
    """
    return torch.cat([at_t, at_t]), torch.cat([before, past_the_end.expand_as(before)])


def strided(alphas: Tensor, stride: int, past_the_end: Tensor) -> Tensor:
    """ᾱ of the timestep a stride before each."""
    before = torch.arange(len(alphas), device="cpu") - stride
    return torch.where(before >= 0, alphas[before.clamp(min=0)], past_the_end)


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
    """Return True for a config that has rows; diffusers raises the error for one that has none."""
    thresholded = not config.get("thresholding") or 0 < config["dynamic_thresholding_ratio"] <= 1
    return thresholded and config["prediction_type"] in _PREDICTION_TYPES


def limits(config: Any) -> tuple[float | None, Rescaling | None]:
    """The clip and the rescaling of a config, at most one of which is not None."""
    if config.get("thresholding"):
        return None, Rescaling(
            0.0, config["dynamic_thresholding_ratio"], config["sample_max_value"]
        )
    return (config["clip_sample_range"] if config["clip_sample"] else None), None
