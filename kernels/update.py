"""The kernels: an update, the noise alone, and the counters of a loop.

The update is csrc/formula.h in Triton, in one pass over memory. Every fused multiply-add is written
out and contraction is off, so the bits are those of the C++ kernel. The numbers that change from
step to step (coefficients, seed, step and sample index) are read from device memory: one captured
graph then serves all steps. `launch` prepares the kernels' arguments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastddim.philox import STEP_NOISE
from fastddim.plan import Row

from .noise import normals, normals_of_quads, quads
from .views import QUAD, further, locate, narrowed, part, pointers, read, write

_ROW_FIELDS = tl.constexpr(len(Row._fields))
_PN = tl.constexpr(Row._fields.index("pn"))
_STEP_NOISE = tl.constexpr(STEP_NOISE)
_QUAD = tl.constexpr(QUAD)


class Tensors(NamedTuple):
    """The tensors of an update, `[B or 2B, C or 2C, …]`, as views inside a kernel."""

    x: Any
    model_output: Any
    noise: Any
    history: Any
    mask: Any
    known: Any
    out: Any
    x_0: Any
    model_input: Any
    epsilon: Any


@triton.jit
def row_at(table, row, sample, PER_SAMPLE: tl.constexpr):
    """The row of a sample; the first one where there are no indices."""
    if row is not None:
        if PER_SAMPLE:
            row += sample
        table += tl.load(row) * _ROW_FIELDS
    return table


@triton.jit
def coefficients_at(fields):
    return Row(
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3),
        tl.load(fields + 4),
        tl.load(fields + 5),
        tl.load(fields + 6),
        tl.load(fields + 7),
        tl.load(fields + 8),
        tl.load(fields + 9),
        tl.load(fields + 10),
        tl.load(fields + 11),
    )


@triton.jit
def read_step(tensors, conditional, span, WIDE: tl.constexpr):
    """State, model output and conditional model output, if there is one, in their own dtypes."""
    x = read(tensors.x, span, WIDE)
    m = read(tensors.model_output, span, WIDE)
    if conditional is None:
        return x, m
    else:
        return x, m, read(further(tensors.model_output, conditional), span, WIDE)


@triton.jit
def in_compute_precision(inputs, row):
    """State and guided model output in the dtype of the row, from what `read_step` has read."""
    compute: tl.constexpr = row.cx.dtype
    x = inputs[0].to(compute)
    m = inputs[1].to(compute)
    if len(inputs) == 3:
        m = tl.fma(row.g, inputs[2].to(compute) - m, m)
    return x, m


@triton.jit
def unclipped_x_0(row, x, m):
    return tl.fma(row.cx, x, row.cm * m)


@triton.jit
def write_step(inputs, z, tensors, second_input, row, span, WIDE: tl.constexpr):
    """The update of csrc/formula.h; `z` is the noise that was drawn, or None."""
    compute: tl.constexpr = row.cx.dtype
    x, m = in_compute_precision(inputs, row)
    x_0 = unclipped_x_0(row, x, m)
    # NaN stays NaN, and a limit of NaN has no effect. Triton's unary minus would be 0 - limit.
    limit = tl.where(row.r == row.r, row.r, float("inf"))
    x_0 = tl.maximum(x_0, limit * -1.0, propagate_nan=tl.PropagateNan.ALL)
    x_0 = tl.minimum(x_0, limit, propagate_nan=tl.PropagateNan.ALL)
    x_prev = tl.fma(row.k0, x_0, tl.fma(row.kx, x, row.km * m))
    if tensors.history is not None:
        x_prev = tl.fma(row.ph, read(tensors.history, span, WIDE).to(compute), x_prev)
    if tensors.epsilon is not None:
        epsilon = tl.fma(row.e0, x_0, tl.fma(row.ex, x, row.em * m))
        write(tensors.epsilon, epsilon, span, WIDE)
    if tensors.noise is not None:
        # Noise with coefficient 0 is not read, since it may be NaN.
        noisy = span.inside & (row.pn != 0)
        z = tl.load(pointers(tensors.noise, span, WIDE), mask=noisy, other=0.0)
    if z is not None:
        x_prev = tl.where(row.pn != 0, tl.fma(row.pn, z.to(compute), x_prev), x_prev)
    if tensors.mask is not None:
        weight = read(tensors.mask, span, WIDE).to(compute)
        known = read(tensors.known, span, WIDE).to(compute)
        x_prev = tl.fma(weight, known - x_prev, x_prev)

    write(tensors.out, x_prev, span, WIDE)
    if tensors.x_0 is not None:
        write(tensors.x_0, x_0, span, WIDE)
    if tensors.model_input is not None:
        state = narrowed(x_prev, tensors.out)
        write(tensors.model_input, state, span, WIDE)
        if second_input is not None:
            write(further(tensors.model_input, second_input), state, span, WIDE)


@triton.jit
def update_kernel(
    tensors,
    # Elements from the first to the second of two stacked batches; None where there is one.
    conditional,
    second_input,
    keys,
    table,
    row,
    sizes,
    count,
    PER_SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    sample, first = locate(SAMPLES, TILE)
    fields = row_at(table, row, sample, PER_SAMPLE)
    noisy = tl.load(fields + _PN) != 0
    if VECTOR > 1:
        span = part(sizes, sample, first, count, 0, False, TILE, VECTOR)
        # Read first: the data arrive while noise is drawn.
        inputs = read_step(tensors, conditional, span, WIDE)
        coefficients = coefficients_at(fields)
        z = None
        if keys is not None:
            z = tl.zeros([TILE], tl.float32)
            if noisy:
                z = normals(keys, sample, first, _STEP_NOISE, TILE, VECTOR, NVIDIA)
        write_step(inputs, z, tensors, second_input, coefficients, span, WIDE)
    else:
        quad: tl.constexpr = TILE // _QUAD
        z = (None, None, None, None)
        if keys is not None:
            none = tl.zeros([quad], tl.float32)
            z = (none, none, none, none)
            if noisy:
                z = normals_of_quads(keys, sample, quads(first, TILE), _STEP_NOISE, NVIDIA)
        coefficients = coefficients_at(fields)
        for i in tl.static_range(_QUAD):
            span = part(sizes, sample, first, count, i, keys is not None, TILE, VECTOR)
            inputs = read_step(tensors, conditional, span, WIDE)
            write_step(inputs, z[i], tensors, second_input, coefficients, span, WIDE)


@triton.jit
def normal_kernel(
    out,
    keys,
    sizes,
    count,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    sample, first = locate(SAMPLES, TILE)
    if VECTOR > 1:
        z = normals(keys, sample, first, STREAM, TILE, VECTOR, NVIDIA)
        write(out, z, part(sizes, sample, first, count, 0, True, TILE, VECTOR), WIDE)
    else:
        z = normals_of_quads(keys, sample, quads(first, TILE), STREAM, NVIDIA)
        for i in tl.static_range(_QUAD):
            write(out, z[i], part(sizes, sample, first, count, i, True, TILE, VECTOR), WIDE)


@triton.jit(do_not_specialize=["count", "t_count"])
def advance_kernel(counters, timesteps, t, count, t_count, TILE: tl.constexpr):
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        counter = tl.load(counters + index, mask=index < count) + 1
        tl.store(counters + index, counter, mask=index < count)
        filled = index < t_count
        tl.store(t + index, tl.load(timesteps + counter, mask=filled), mask=filled)
