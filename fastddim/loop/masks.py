"""Checks of masks and known data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastddim.tracing import in_program
from fastddim.validation import check_like, check_mask, readable


def check_known(
    mask: Tensor | None, known: Tensor | None, state: Tensor, clean: bool | Tensor
) -> tuple[Tensor, Tensor]:
    """The mask and the known data, checked; neither can be without the other.

    Args:
        clean: whether ᾱ is 1 before the first step.
    """
    if known is None:
        raise ValueError("known: expected data with mask, got None")
    if mask is None:
        raise ValueError("mask: expected a weight of known, got None")
    check_like("known", known, "the state", state)
    check_mask("mask", mask, state)
    if clean:
        raise ValueError("mask: expected None where the first alpha_cumprod is 1, got a tensor")
    return mask if mask.dtype == torch.bool else _weights(mask), known


def _weights(mask: Tensor) -> Tensor:
    """The mask, with NaN for values outside [0, 1] where they cannot be looked at.

    Such a weight would multiply the error of every step. A look at one on an accelerator would wait
    for the device, and a program gets other masks than the one that it is traced with.
    """
    if in_program() or not readable(mask):
        return torch.where((mask >= 0) & (mask <= 1), mask, math.nan)
    if mask.numel():
        low, high = (end.item() for end in mask.double().aminmax())
        if math.isnan(low):
            raise ValueError("mask: expected values in [0, 1], got NaN")
        if low < 0 or high > 1:
            raise ValueError(
                f"mask: expected values in [0, 1], got values from {low:g} to {high:g}"
            )
    return mask
