"""Tables of the steps of diffusers, with one row for each timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddim.integrations._coefficients import finite
from fastddim.plan import Rescaling, Row, stack_row
from fastddim.steptable import StepTable


class SignedTable(StepTable):
    """A table of rows made from `doubled`, for t in [−T, T)."""

    @staticmethod
    def position(count: int, row: int) -> int:
        half = count // 2
        if not -half <= row < half:
            raise IndexError(
                f"timestep: expected an index of alphas_cumprod, in [{-half}, {half}), got {row}"
            )
        return row % count


def signed_table(row: Row, rescaling: Rescaling | None = None) -> SignedTable:
    """Make a table of rows for t in [−T, T), with a huge number instead of 1/0."""
    return SignedTable(stack_row(finite(row)), rescaling=rescaling)


def doubled(at_t: Tensor, before: Tensor, past_the_end: Tensor) -> tuple[Tensor, Tensor]:
    """(ᾱ_t, ᾱ_prev) for t in [−T, T), so that indexing by a negative t is right too. Such a t reads
    ᾱ from the end and has no timestep before it.
    """
    return torch.cat([at_t, at_t]), torch.cat([before, past_the_end.expand_as(before)])


def strided(alphas: Tensor, stride: int, past_the_end: Tensor) -> Tensor:
    """ᾱ of the timestep that is one stride before each."""
    before = torch.arange(len(alphas), device="cpu") - stride
    return torch.where(before >= 0, alphas[before.clamp(min=0)], past_the_end)
