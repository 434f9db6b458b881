"""The specification: one DDIM update in eager PyTorch, and the rescaling of its rows by the data.

    name here   paper (arXiv 2010.02502)                        where
    x           x_{τ_i}                                         eq. 12
    m           model output: ε_θ, or x_0, or v                 eq. 9 for ε_θ
    x0          "predicted x_0", f_θ(x)                         eq. 9
    k0, kx, km  √ᾱ_prev on x0, √(1 − ᾱ_prev − σ²) on ε_θ, both  eq. 12
                written as coefficients of x0, x and m
    pn, noise   σ, z                                            eq. 12, 16
    g           classifier-free guidance scale                  arXiv 2207.12598
    e0, ex, em  ε_θ, or eps re-derived, as coefficients of      eq. 9
                x0, x and m
    ph          extrapolation from the eps of the step before   eq. 14, by two-step Adams–Bashforth

`plan.coefficient_row` derives the coefficients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.plan import Rescaling, Row


class Updated(NamedTuple):
    """The results of one update, each shaped like the state.

    Attributes:
        x_prev: the new state, in the dtype of the state.
        x_0: predicted x_0 after the clamp, in the dtype of the state.
        epsilon: in the dtype that is computed in.
    """

    x_prev: Tensor
    x_0: Tensor
    epsilon: Tensor


def rows_in(table: Tensor, row: Tensor | None) -> Tensor:
    """The rows `[1 or B, K]` of a table `[R, K]` that `row` names; without `row`, the first one."""
    return table[:1] if row is None else table.index_select(0, row)


def update(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    noise: Tensor | None,
    history: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_0) of `updated`."""
    return updated(x, model_output, rows, noise, history, mask, known)[:2]


def updated(
    x: Tensor,  # [B, …]
    model_output: Tensor,  # [B or 2B, C or 2C, …]
    rows: Tensor,  # [1 or B, K], float64 or float32
    noise: Tensor | None,  # [B, …]
    history: Tensor | None = None,  # [B, …], epsilon of the step before
    mask: Tensor | None = None,  # [B, …], weight of `known` in the result
    known: Tensor | None = None,  # [B, …]
) -> Updated:
    """One update.

    2B model outputs are guided: unconditional first, conditional second. Of 2C channels (learned
    variance) the first half is used. The arithmetic is float32 (float64 for a float64 state),
    rounded once at the end. A noise coefficient of 0 leaves the noise unread.
    """
    row = _columns(rows, x)
    state, m = x.to(row.cx.dtype), _model_output(x, model_output, row)
    x0 = _clamped(row.cx * state + row.cm * m, row.r)
    x_prev = row.k0 * x0 + row.kx * state + row.km * m
    if history is not None:
        x_prev = x_prev + row.ph * history.to(m.dtype)
    if noise is not None:
        x_prev = torch.where(row.pn != 0, x_prev + row.pn * noise.to(m.dtype), x_prev)
    if mask is not None and known is not None:
        x_prev = x_prev + mask.to(m.dtype) * (known.to(m.dtype) - x_prev)
    epsilon = row.e0 * x0 + (row.ex * state + row.em * m)
    return Updated(x_prev.to(x.dtype), x0.to(x.dtype), epsilon)


def gradients(
    grad_x_prev: Tensor | None,
    grad_x_0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the model output, from those of x_prev and x_0; None stands for 0.

    The other arguments are those of `updated`. No gradient flows through an x_0 that the clip has
    changed, or to channels that are not read.
    """
    row = _columns(rows, x)
    state, m = x.to(row.cx.dtype), _model_output(x, model_output, row)
    x0 = row.cx * state + row.cm * m
    of_x_prev, of_x0 = (
        torch.zeros_like(x0) if grad is None else grad.to(x0.dtype)
        for grad in (grad_x_prev, grad_x_0)
    )
    if mask is not None:
        of_x_prev = of_x_prev - mask.to(x0.dtype) * of_x_prev
    inside = (x0 >= -row.r) & (x0 <= row.r)
    of_x0 = torch.where(inside, row.k0 * of_x_prev + of_x0, 0.0)
    of_x = row.cx * of_x0 + row.kx * of_x_prev
    of_m = row.cm * of_x0 + row.km * of_x_prev
    if model_output.shape[0] != x.shape[0]:
        of_m = torch.cat([of_m - row.g * of_m, row.g * of_m])
    if of_m.shape != model_output.shape:
        of_m = torch.cat([of_m, torch.zeros_like(of_m)], dim=1)
    return of_x.to(x.dtype), of_m.to(model_output.dtype)


def rescaled_rows(x: Tensor, model_output: Tensor, rows: Tensor, rescaling: Rescaling) -> Tensor:
    """Rows `[B, K]` for these data, in the dtype that the update computes in.

    `rescale` φ multiplies the guided model output by φ·σ_c/σ + 1 − φ, where σ_c and σ are the
    standard deviations of the conditional and of the guided output of a sample (arXiv 2305.08891,
    section 3.4). `ratio` and `limit` are those of dynamic thresholding (arXiv 2205.11487, section
    2.3): with s the quantile `ratio` of |x_0| of a sample, but at least 1 and at most `limit`, x_0
    is clamped to [−s, s] and divided by s. Both rescalings are factors of coefficients, so the
    update takes one pass.

    The compiled kernels compute the deviations in float64, in an order of sums that csrc/fitting.h
    specifies, and so agree with one another to the bit. PyTorch's own sums come close to theirs.
    """
    row = _columns(rows, x)
    state, m = x.to(row.cx.dtype), _model_output(x, model_output, row)
    if rescaling.rescale > 0:
        conditional = _read_channels(x, model_output)[x.shape[0] :].to(m.dtype)
        ratio = _deviation(conditional) / _deviation(m)
        factor = rescaling.rescale * torch.where(ratio.isfinite(), ratio, 1.0) + (
            1 - rescaling.rescale
        )
        row = row._replace(cm=row.cm * factor, km=row.km * factor, em=row.em * factor)
    if rescaling.ratio > 0:
        s = _threshold(row.cx * state + row.cm * m, rescaling).reshape(-1, *[1] * (x.ndim - 1))
        row = row._replace(cx=row.cx / s, cm=row.cm / s, r=torch.ones_like(s))
    batch = x.shape[0]
    return torch.stack([column.reshape(-1).expand(batch) for column in row], dim=1)


def _columns(rows: Tensor, x: Tensor) -> Any:
    """A `Row` of tensors in the dtype that is computed in, each shaped to be multiplied with x."""
    columns = rows.to(compute_dtype(x.dtype)).reshape(rows.shape + (1,) * (x.ndim - 1))
    return Row(*columns.unbind(1))


def _read_channels(x: Tensor, model_output: Tensor) -> Tensor:
    if x.ndim > 1 and model_output.shape[1] != x.shape[1]:
        return model_output[:, : x.shape[1]]
    return model_output


def _model_output(x: Tensor, model_output: Tensor, row: Any) -> Tensor:
    m = _read_channels(x, model_output).to(compute_dtype(x.dtype))
    if m.shape[0] == x.shape[0]:
        return m
    unconditional, conditional = m.chunk(2)
    guided: Tensor = unconditional + row.g * (conditional - unconditional)
    return guided


def _clamped(x0: Tensor, limit: Tensor) -> Tensor:
    """x0 in [−limit, limit], or NaN; the derivative is 1 where x0 already equals a limit.

    The derivative of `torch.clamp` by tensors differs there from one version to the next.
    """
    floored = torch.where(x0 < -limit, -limit, x0)
    return torch.where(floored > limit, limit, floored)


def _deviation(m: Tensor) -> Tensor:
    """The standard deviation of each sample, without bias."""
    samples = m.flatten(1)
    several = samples.shape[0] > 0 and samples.shape[1] > 1
    deviation = samples.std(dim=1) if several else m.new_ones(m.shape[0])
    return deviation.reshape(-1, *[1] * (m.ndim - 1))


def _threshold(x_0: Tensor, rescaling: Rescaling) -> Tensor:
    """s of each sample, or NaN if any of its elements is NaN."""
    magnitudes = x_0.abs().flatten(1)
    count = magnitudes.shape[1]
    if magnitudes.numel() == 0:
        return magnitudes.new_ones(magnitudes.shape[0])
    position = rescaling.ratio * (count - 1)
    k = math.floor(position)
    # Counted from the largest value, since the ratio is close to 1.
    largest = magnitudes.topk(count - k, dim=1).values
    low, high = largest[:, -1], largest[:, -min(2, count - k)]
    quantile = low + (high - low) * (position - k)
    s = quantile.clamp(1.0, rescaling.limit)
    return torch.where(magnitudes.isnan().any(dim=1), math.nan, s)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a state of `dtype` is computed and its coefficients are stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32
