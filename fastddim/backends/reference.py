"""The backend `reference`: the formulas of the module `fastddim.reference`, on any device.

Every other backend is compared with this one. The operators of `fastddim.ops` run it where nothing
is compiled for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim import ops, philox, reference
from fastddim.derivatives import composed
from fastddim.philox import Keys
from fastddim.plan import Rescaling

PRIORITY = 0

_library = torch.library.Library("fastddim", "IMPL")


def unavailable(device: torch.device) -> str | None:
    return None


@torch.library.impl(_library, "advance", "CompositeExplicitAutograd")
def advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    """See `fastddim.backends.Backend.advance`."""
    counters.add_(1)
    torch.index_select(timesteps, 0, counters[: len(t)], out=t)


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """See `fastddim.backends.Backend.normal_out`."""
    out.copy_(philox.normal(keys, out.shape[1:], stream))


def rescale_rows(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    rescaling: Rescaling,
    out: Tensor,
) -> None:
    """See `fastddim.backends.Backend.rescale_rows`."""
    rows = reference.rows_in(table, row)
    out.copy_(reference.rescaled_rows(x, model_output, rows, rescaling))


@torch.library.impl(_library, "normal_out", "CompositeExplicitAutograd")
def _normal_out(seed: Tensor, step: Tensor, sample: Tensor, stream: int, out: Tensor) -> None:
    normal_out(Keys(seed, step, sample), stream, out)


@torch.library.impl(_library, "fit_rows", "CompositeExplicitAutograd")
def _rescale_rows(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    rescale: float,
    ratio: float,
    limit: float,
    out: Tensor,
) -> None:
    rescale_rows(x, model_output, table, row, Rescaling(rescale, ratio, limit), out)


@torch.library.impl(_library, "update_out", "CompositeExplicitAutograd")
def _update_out(*operands: Any) -> None:
    inputs, outputs = ops.split_operands(operands)
    new = composed(inputs)
    outputs.out.copy_(new.x_prev)
    if outputs.x_0 is not None:
        outputs.x_0.copy_(new.x_0)
    if outputs.epsilon is not None:
        outputs.epsilon.copy_(new.epsilon)
    if outputs.model_input is not None:
        batch = inputs.x.shape[0]
        for first in range(0, outputs.model_input.shape[0], max(batch, 1)):
            outputs.model_input[first : first + batch].copy_(new.x_prev)


def _update(*inputs: Any) -> tuple[Tensor, Tensor]:
    return composed(ops.Inputs(*inputs))[:2]


update = ops.update_through(_update)
update_out = ops.update_out_through(_update_out, differentiable=True)


@torch.library.impl(_library, "backward_out", "CompositeExplicitAutograd")
def _backward_out(
    grad_x_prev: Tensor | None,
    grad_x_0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    mask: Tensor | None,
    grad_x: Tensor,
    grad_model_output: Tensor,
) -> None:
    rows = reference.rows_in(table, row)
    grads = reference.gradients(grad_x_prev, grad_x_0, x, model_output, rows, mask)
    grad_x.copy_(grads[0])
    grad_model_output.copy_(grads[1])
