"""The gradients of an update: csrc/cpu/kernel.h in Triton, in one pass over memory.

`launch_backward` prepares the kernel's arguments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .update import (
    coefficients_at,
    in_compute_precision,
    read_step,
    row_at,
    unclipped_x_0,
)
from .views import QUAD, further, locate, part, read, write

_QUAD = tl.constexpr(QUAD)


class Tensors(NamedTuple):
    """The tensors of a backward pass, `[B or 2B, C or 2C, …]`, as views inside a kernel."""

    grad_x_prev: Any
    grad_x_0: Any
    x: Any
    model_output: Any
    mask: Any
    grad_x: Any
    grad_model_output: Any


@triton.jit
def gradient_of(view, like, span, WIDE: tl.constexpr):
    """The gradient of a result, 0 where it has none."""
    if view is None:
        return tl.zeros_like(like)
    else:
        return read(view, span, WIDE).to(like.dtype)


@triton.jit
def write_gradients(tensors, conditional, second_gradient, row, span, WIDE: tl.constexpr):
    """Write the gradients of an update, which is affine where the clip does not act."""
    x, m = in_compute_precision(read_step(tensors, conditional, span, WIDE), row)
    x_0 = unclipped_x_0(row, x, m)
    of_x_prev = gradient_of(tensors.grad_x_prev, x, span, WIDE)
    if tensors.mask is not None:
        of_x_prev -= read(tensors.mask, span, WIDE).to(x.dtype) * of_x_prev
    of_x_0 = row.k0 * of_x_prev + gradient_of(tensors.grad_x_0, x, span, WIDE)
    # Both comparisons are false for NaN.
    of_x_0 = tl.where((x_0 >= -row.r) & (x_0 <= row.r), of_x_0, 0.0)
    of_m = row.cm * of_x_0 + row.km * of_x_prev
    write(tensors.grad_x, row.cx * of_x_0 + row.kx * of_x_prev, span, WIDE)
    if second_gradient is None:
        write(tensors.grad_model_output, of_m, span, WIDE)
    else:
        of_conditional = row.g * of_m
        write(tensors.grad_model_output, of_m - of_conditional, span, WIDE)
        write(further(tensors.grad_model_output, second_gradient), of_conditional, span, WIDE)


@triton.jit
def backward_kernel(
    tensors,
    # Elements from the first to the second of two stacked batches; None where there is one.
    conditional,
    second_gradient,
    table,
    row,
    sizes,
    count,
    PER_SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    sample, first = locate(SAMPLES, TILE)
    fields = coefficients_at(row_at(table, row, sample, PER_SAMPLE))
    for i in tl.static_range(1 if VECTOR > 1 else _QUAD):
        span = part(sizes, sample, first, count, i, False, TILE, VECTOR)
        write_gradients(tensors, conditional, second_gradient, fields, span, WIDE)
