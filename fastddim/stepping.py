"""The call of a single step: checks its tensors, keys its noise and makes its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastddim import philox
from fastddim.loop.noise import check_generators, draw
from fastddim.options import NoiseSource, Seed
from fastddim.single import PreparedStep
from fastddim.steptable import rescaled, rescaled_differentiably
from fastddim.transforms import check_unfollowed, tracked
from fastddim.validation import (
    check_like,
    check_model_output,
    check_noise,
    check_overlap,
    check_same_dtype,
)

GivenNoise: TypeAlias = Tensor | torch.Generator | Sequence[torch.Generator]


def take(
    step: PreparedStep,
    x_t: Tensor,
    model_output: Tensor,
    *,
    seed: Seed | None,
    sample_offset: int,
    step_index: int | Tensor,
    noise: NoiseSource,
    out: Tensor | None,
    return_x0: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Take a step for `fastddim.step`, which has the same arguments.

    Args:
        step: all that the step needs besides its tensors.
        x_t: the state, already checked, as is `return_x0`.

    Raises:
        TypeError, ValueError, RuntimeError: see `fastddim.step`.
    """
    backend, table, row, rescaling, noisy, guided, table_tracked, in_graph = step
    batch = x_t.shape[0]
    check_model_output("model_output", model_output, x_t, guided=guided)
    keys = None
    if noise is not None:
        noise = _step_noise(noise, x_t) if noisy else None
    elif noisy:
        keys = philox.make_keys(
            seed, batch, sample_offset=sample_offset, step_index=step_index, device=x_t.device
        )
    if out is not None:
        check_unfollowed("out", x_t, model_output, noise, table)
        check_like("out", out, "x_t", x_t)
        check_same_dtype("out", out, x_t.dtype)
        check_overlap("out", out, "x_t", x_t)
        check_overlap("out", out, "model_output", model_output)
    differentiable = out is None and (table_tracked or tracked(x_t, model_output, noise))
    if rescaling is not None and differentiable:
        backend, table, row = rescaled_differentiably(x_t, model_output, table, row, rescaling)
    elif rescaling is not None:
        table, row = rescaled(backend, x_t, model_output, table, row, rescaling)
    # In a graph, compilers can move an operator only if it returns its results.
    if differentiable or (in_graph and out is None):
        x_prev, x_0 = backend.update(x_t, model_output, table, row, noise=noise, keys=keys)
        return (x_prev, x_0) if return_x0 else x_prev
    x_prev = torch.empty_like(x_t) if out is None else out
    predicted = torch.empty_like(x_t) if return_x0 else None
    backend.update_out(
        x_t,
        model_output,
        table,
        row,
        noise=noise,
        keys=keys,
        out=x_prev,
        x_0=predicted,
        model_input=None,
    )
    # Autograd does not notice an operator that writes into its arguments.
    if out is not None and not in_graph:
        increment_version(out)
    return x_prev if predicted is None else (x_prev, predicted)


def _step_noise(noise: GivenNoise, x_t: Tensor) -> Tensor:
    if isinstance(noise, Tensor):
        return check_noise("noise", noise, x_t)
    if not isinstance(noise, torch.Generator):
        check_generators("noise", noise, x_t.shape[0])
    return draw(noise, x_t)
