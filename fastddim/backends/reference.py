"""Eager PyTorch, on any device: what every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddim import philox, reference
from fastddim.philox import Keys
from fastddim.plan import Fit

PRIORITY = 0


def unavailable(device: torch.device) -> str | None:
    return None


def advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    """See `fastddim.backends.Backend.advance`."""
    counters.add_(1)
    torch.index_select(timesteps, 0, counters[: len(t)], out=t)


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """See `fastddim.backends.Backend.normal_out`."""
    out.copy_(philox.normal(keys, out.shape[1:], stream))


def update(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    noise: Tensor | None,
    keys: Keys | None,
    history: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fastddim.backends.Backend.update`."""
    inputs = (x, model_output, table, row, noise, keys, history, mask, known)
    return _updated(*inputs)[:2]


def update_out(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    noise: Tensor | None,
    keys: Keys | None,
    history: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    out: Tensor,
    x_0: Tensor | None,
    model_input: Tensor | None,
    epsilon: Tensor | None = None,
) -> None:
    """See `fastddim.backends.Backend.update_out`."""
    new = _updated(x, model_output, table, row, noise, keys, history, mask, known)
    out.copy_(new.x_prev)
    if x_0 is not None:
        x_0.copy_(new.x_0)
    if epsilon is not None:
        epsilon.copy_(new.epsilon)
    if model_input is not None:
        batch = x.shape[0]
        for first in range(0, model_input.shape[0], max(batch, 1)):
            model_input[first : first + batch].copy_(new.x_prev)


def fit_rows(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, fit: Fit, out: Tensor
) -> None:
    """See `fastddim.backends.Backend.fit_rows`."""
    out.copy_(reference.fitted_rows(x, model_output, table.index_select(0, row), fit))


def _updated(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    noise: Tensor | None,
    keys: Keys | None,
    history: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
) -> reference.Updated:
    if keys is not None:
        noise = philox.normal(keys, x.shape[1:], philox.STEP_NOISE)
    rows = table.index_select(0, row)
    return reference.updated(x, model_output, rows, noise, history, mask, known)
