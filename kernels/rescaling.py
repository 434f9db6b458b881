"""Rows that take factors from the data: csrc/cpu/fit.h in Triton, one program a sample.

Nothing of the size of a sample is kept: each pass works the values out anew from x and the model
output. Sums are taken in the order of the CPU's, and counts do not depend on an order, so the bits
are those of the C++ kernel. `launch_rescaling` prepares the kernel's arguments.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Triton knows the type of an argument by this name alone.
from triton.language import float64

from fastddim.plan import Row

from .update import (
    _ROW_FIELDS,
    coefficients_at,
    in_compute_precision,
    read_step,
    row_at,
    unclipped_x_0,
)
from .views import Span, further

_CX, _CM, _R, _KM, _EM = (
    tl.constexpr(Row._fields.index(name)) for name in ("cx", "cm", "r", "km", "em")
)

THREADS = 256
"""The threads of a program; each keeps one of the sums."""

_SUMS = tl.constexpr(256)
"""Element i of a sample goes to sum i % 256."""
_HALVINGS = tl.constexpr(8)
_UNROLLED = tl.constexpr(4)

_TILE = tl.constexpr(1024)
_CHUNK = tl.constexpr(63 * 1024)
"""Elements that are counted before fields of 16 bits could overflow."""
_DIGIT = tl.constexpr(4)
"""Bits of an order statistic that one pass finds."""
_DIGITS = tl.constexpr(16)
_LOWER_BYTES = tl.constexpr(0x00FF00FF00FF00FF)


class Data(NamedTuple):
    """The tensors that factors are taken from, as views inside a kernel."""

    x: Any
    model_output: Any


class Prediction(NamedTuple):
    """The fields of a row that x_0 takes, inside a kernel."""

    cx: Any
    cm: Any
    g: Any


class Samples(NamedTuple):
    """The data that the passes over a sample read, inside a kernel."""

    tensors: Any
    conditional: Any
    """Elements from the first to the second of two stacked batches; None where there is one."""
    sizes: Any
    sample: Any
    end: Any
    """The number of elements of a sample."""


@triton.jit
def span_at(samples, first, TILE: tl.constexpr):
    element = first + tl.arange(0, TILE)
    return Span(samples.sizes, samples.sample, element, element < samples.end)


@triton.jit
def outputs(inputs, row):
    """The conditional and the guided model output in float64, from what `read_step` has read."""
    _, m = in_compute_precision(inputs, row)
    return inputs[2].to(m.dtype).to(tl.float64), m.to(tl.float64)


@triton.jit
def first_of(view, samples):
    """Element 0 of the sample, if it has any."""
    at = view.data + samples.sample * view.sample_stride
    return tl.load(at, mask=samples.end > 0, other=0.0)


@triton.jit
def first_outputs(samples, row):
    x, output = samples.tensors
    conditional = further(output, samples.conditional)
    inputs = (first_of(x, samples), first_of(output, samples), first_of(conditional, samples))
    return outputs(inputs, row)


@triton.jit
def add(sums, squares, values, shift, inside):
    d = tl.where(inside, values - shift, 0.0)
    return sums + d, squares + d * d


@triton.jit
def split(four):
    """The numbers that `tl.join` has joined twice."""
    a_b, c_d = tl.split(four)
    a, b = tl.split(a_b)
    c, d = tl.split(c_d)
    return a, b, c, d


@triton.jit
def totals(sums):
    """Four totals: the upper half of the sums is added to the lower one until one is left."""
    for halving in tl.static_range(_HALVINGS):
        sums = tl.sum(tl.reshape(sums, [2, _SUMS >> (halving + 1), 2, 2]), axis=0)
    return split(tl.reshape(sums, [2, 2]))


@triton.jit
def squared_deviations(total, of_squares, end):
    """The sum of squared deviations of all values from their mean, by their sums."""
    return of_squares - total * total / end.to(tl.float64)


@triton.jit
def rescaling_factor(samples, row, rescale, WIDE: tl.constexpr):
    """The factor of guidance rescale for the model output."""
    shift, shift_of_guided = first_outputs(samples, row)
    sums = tl.zeros([_SUMS], tl.float64)
    squares, sums_of_guided, squares_of_guided = sums, sums, sums
    for first in range(0, samples.end, _UNROLLED * _SUMS):
        for i in tl.static_range(_UNROLLED):
            span = span_at(samples, first + i * _SUMS, _SUMS)
            inputs = read_step(samples.tensors, samples.conditional, span, WIDE)
            conditional, m = outputs(inputs, row)
            sums, squares = add(sums, squares, conditional, shift, span.inside)
            sums_of_guided, squares_of_guided = add(
                sums_of_guided, squares_of_guided, m, shift_of_guided, span.inside
            )
    every = tl.join(tl.join(sums, squares), tl.join(sums_of_guided, squares_of_guided))
    a, b, c, d = totals(every)
    ratio = tl.sqrt(squared_deviations(a, b, samples.end) / squared_deviations(c, d, samples.end))
    ratio = tl.where(ratio - ratio == 0, ratio, 1.0)
    return (rescale * ratio + (1.0 - rescale)).to(row.cx.dtype)


@triton.jit
def magnitudes(samples, row, span, WIDE: tl.constexpr):
    """|x_0| as its bits, which have the order of the values."""
    inputs = read_step(samples.tensors, samples.conditional, span, WIDE)
    x, m = in_compute_precision(inputs, row)
    x_0 = unclipped_x_0(row, x, m)
    if x_0.dtype == tl.float64:
        return x_0.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x_0.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def counts_of_digits(samples, row, prefix, shift, WIDE: tl.constexpr):
    """The numbers of magnitudes with the digits of `prefix`, by the value of the next digit.

    A thread counts in bytes, 8 of them to a word. Words are added up in fields of 16 bits.
    """
    digits = tl.arange(0, _DIGITS)
    counts = tl.zeros([_DIGITS], tl.int64)
    for chunk in range(0, samples.end, _CHUNK):
        small = tl.zeros([_TILE], tl.int64)
        large = tl.zeros([_TILE], tl.int64)
        for first in range(chunk, tl.minimum(chunk + _CHUNK, samples.end), _TILE):
            span = span_at(samples, first, _TILE)
            head = magnitudes(samples, row, span, WIDE) >> shift
            found = span.inside & ((head >> _DIGIT) == prefix)
            one = tl.where(found, tl.full([], 1, tl.int64) << ((head & 7) * 8).to(tl.int64), 0)
            small += tl.where(head & 8 == 0, one, 0)
            large += tl.where(head & 8 == 0, 0, one)
        even = tl.join(small & _LOWER_BYTES, large & _LOWER_BYTES)
        odd = tl.join((small >> 8) & _LOWER_BYTES, (large >> 8) & _LOWER_BYTES)
        a, b, c, d = split(tl.sum(tl.join(even, odd), axis=0))
        fields = tl.where(digits & 1 == 0, tl.where(digits < 8, a, b), tl.where(digits < 8, c, d))
        counts += (fields >> ((digits & 6) * 8).to(tl.int64)) & 0xFFFF
    return counts


@triton.jit
def order_statistics(samples, row, rank, WIDE: tl.constexpr):
    """Order statistic `rank` (from 0) of |x_0|, the next one and the largest, as their bits.

    Radix selection: each pass counts the next digit of the values that share the digits found so
    far.
    """
    word: tl.constexpr = tl.int64 if row.cx.dtype == tl.float64 else tl.int32
    most: tl.constexpr = 0x7FFFFFFFFFFFFFFF if row.cx.dtype == tl.float64 else 0x7FFFFFFF
    passes: tl.constexpr = 16 if row.cx.dtype == tl.float64 else 8
    digits = tl.arange(0, _DIGITS)
    prefix = tl.zeros([], word)
    equal = tl.zeros([], tl.int64)
    for i in range(passes):
        counts = counts_of_digits(samples, row, prefix, (passes - 1 - i) * _DIGIT, WIDE)
        digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32))
        rank -= tl.sum(tl.where(digits < digit, counts, 0))
        equal = tl.sum(tl.where(digits == digit, counts, 0))
        prefix = (prefix << _DIGIT) | digit.to(word)
    largest = tl.zeros([_TILE], word)
    above = tl.full([_TILE], most, word)
    for first in range(0, samples.end, _TILE):
        span = span_at(samples, first, _TILE)
        values = magnitudes(samples, row, span, WIDE)
        largest = tl.maximum(largest, tl.where(span.inside, values, 0))
        above = tl.minimum(above, tl.where(span.inside & (values > prefix), values, most))
    nearest = tl.min(above)
    following = tl.where((rank + 1 >= equal) & (nearest < most), nearest, prefix)
    return prefix, following, tl.max(largest)


@triton.jit
def threshold(samples, row, rank, fraction, limit, WIDE: tl.constexpr):
    """The quantile of |x_0|, between 1 and the limit; NaN where any element is NaN."""
    compute: tl.constexpr = row.cx.dtype
    infinite: tl.constexpr = 0x7FF0000000000000 if compute == tl.float64 else 0x7F800000
    low, high, largest = order_statistics(samples, row, rank, WIDE)
    low = low.to(compute, bitcast=True)
    high = high.to(compute, bitcast=True)
    s = low + (high - low) * fraction.to(compute)
    s = tl.where((s < 1) | (samples.end == 0), 1.0, s)
    s = tl.where(s.to(tl.float64) > limit, limit.to(compute), s)
    return tl.where(largest > infinite, float("nan"), s)


@triton.jit
def quotient(a, b):
    """a / b rounded to nearest, which Triton's `/` of float32 is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def copy_other_fields(fields, at):
    """Copy the fields without a factor before the passes, which frees their registers."""
    i = tl.arange(0, 16)
    others = (i < _ROW_FIELDS) & (i != _CX) & (i != _CM) & (i != _R) & (i != _KM) & (i != _EM)
    tl.store(at + i, tl.load(fields + i, mask=others), mask=others)


@triton.jit
def rescaling_kernel(
    tensors,
    conditional,
    table,
    row,
    out,
    sizes,
    count,
    rescale: float64,
    # The quantile: an order statistic, and the part of the way to the next one.
    rank,
    fraction: float64,
    limit: float64,
    RESCALES: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    samples = Samples(tensors, conditional, sizes, sample, tl.cast(count, tl.int64))
    fields = row_at(table, row, sample, PER_SAMPLE)
    at = out + sample * _ROW_FIELDS
    copy_other_fields(fields, at)
    given = coefficients_at(fields)
    cx, cm, r, km, em = given.cx, given.cm, given.r, given.km, given.em
    if RESCALES:
        factor = rescaling_factor(samples, given, tl.full([], rescale, tl.float64), WIDE)
        cm *= factor
        km *= factor
        em *= factor
    tl.store(at + _KM, km)
    tl.store(at + _EM, em)
    if THRESHOLDS:
        s = threshold(
            samples,
            Prediction(cx, cm, given.g),
            tl.cast(rank, tl.int64),
            tl.full([], fraction, tl.float64),
            tl.full([], limit, tl.float64),
            WIDE,
        )
        cx = quotient(cx, s)
        cm = quotient(cm, s)
        r = tl.full([], 1.0, r.dtype)
    tl.store(at + _CX, cx)
    tl.store(at + _CM, cm)
    tl.store(at + _R, r)
