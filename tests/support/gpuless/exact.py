"""Correctly rounded arithmetic on NumPy scalars and arrays, as PTX specifies it.

NumPy itself rounds +, −, ×, ÷ and √ correctly. What it lacks is here: fused multiply-add, flushing
of subnormals, the minimum and maximum of IEEE 754-2019, and conversions that saturate or that yield
bfloat16. Payloads of NaN are not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

Array = Any
"""A NumPy array or scalar: a value that all threads share stays a scalar."""

_SMALLEST_NORMAL = np.float32(2.0**-126)
_HALF_NAN = np.uint16(0x7FFF)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def flushed(x: Array) -> Array:
    """float32 with subnormals made zeros of the same sign (`.ftz`)."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def saturated(x: Array) -> Array:
    """x clamped to [0, 1], NaN to 0 (`.sat`)."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.where(x > zero, np.where(x < one, x, one), zero)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(s, e) with s = RN(a + b) and a + b = s + e exactly (Knuth)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


def odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Round-to-odd of value + error, where value is that sum rounded to nearest.

    A second rounding of the result to a format two bits shorter, or more, is then correct (Boldo
    and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    word = value.view(np.int64)
    outward = (error > 0) == (value > 0)
    inexact_even = (error != 0) & (word & 1 == 0)
    return np.where(inexact_even, word + np.where(outward, 1, -1), word).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """RN(a·b + c) in float32."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    wide = np.asarray(product + addend)
    result = wide.astype(np.float32)
    # The product is exact in float64, so only the sum may have been rounded twice. That matters
    # where it lies on a tie of float32, or where float32 is subnormal and ties lie elsewhere.
    tie = (wide.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    suspect = tie | (np.abs(wide) < 2.0**-125)
    if not suspect.any():
        return result if result.ndim else result[()]
    product, addend = (np.broadcast_to(v, wide.shape)[suspect] for v in (product, addend))
    result[suspect] = odd(*two_sum(product, addend)).astype(np.float32)
    return result if result.ndim else result[()]


def fma64(a: Array, b: Array, c: Array) -> Array:
    """RN(a·b + c) in float64."""
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
    a, b, c = (np.broadcast_to(v, shape).reshape(-1) for v in (a, b, c))
    result = a * b + c
    finite = np.isfinite(a) & np.isfinite(b)
    # Where a·b overflows it must not meet an infinite c of the other sign.
    result = np.where(finite & ~np.isfinite(c), c, result)
    inexact = finite & np.isfinite(c) & (a != 0) & (b != 0)
    safe = inexact & _moderate(a, 400) & _moderate(b, 400) & ((c == 0) | _moderate(c, 900))
    result[safe] = _fma64_moderate(a[safe], b[safe], c[safe])
    for i in np.flatnonzero(inexact & ~safe):
        result[i] = _fma64_any(float(a[i]), float(b[i]), float(c[i]))
    return result.reshape(shape) if shape else result[0]


def _moderate(x: np.ndarray, exponent: int) -> np.ndarray:
    magnitude = np.abs(x)
    return (magnitude > 2.0**-exponent) & (magnitude < 2.0**exponent)


def _fma64_moderate(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The fused multiply-add by Boldo and Melquiond's algorithm, if no intermediate result
    overflows or is subnormal.
    """
    high, low = _two_product(a, b)
    addend, addend_error = two_sum(c, low)
    total, total_error = two_sum(high, addend)
    return total + odd(*two_sum(addend_error, total_error))


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, e) with p = RN(a·b) and a·b = p + e exactly (Dekker)."""
    p = a * b
    a_high, b_high = _high_half(a), _high_half(b)
    a_low, b_low = a - a_high, b - b_high
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _high_half(x: np.ndarray) -> np.ndarray:
    """The upper 26 bits of x (Veltkamp)."""
    scaled = x * (2.0**27 + 1)
    return scaled - (scaled - x)


def _fma64_any(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        # Division of Python's integers is correctly rounded, into the subnormals.
        magnitude = abs(exact.numerator) / exact.denominator
    except OverflowError:
        magnitude = math.inf
    return -magnitude if exact < 0 else magnitude


def minimum(a: Array, b: Array) -> Array:
    """The minimum with −0 < +0, and a number if the other is NaN."""
    return _extremum(a, b, a < b, np.bitwise_or)


def maximum(a: Array, b: Array) -> Array:
    return _extremum(a, b, a > b, np.bitwise_and)


def _extremum(a: Array, b: Array, first: Array, of_equals: Callable[..., Array]) -> Array:
    word = UNSIGNED[a.dtype.itemsize]
    # Equal numbers differ in the sign of zero alone.
    equals = of_equals(a.view(word), b.view(word)).view(a.dtype)
    ordered = np.where(first, a, np.where(a == b, equals, b))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, ordered))


def propagating(extremum: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """NaN if either operand is NaN (`.NaN`)."""

    def compute(a: Array, b: Array) -> Array:
        nan = a.dtype.type(np.nan)
        return np.where(np.isnan(a) | np.isnan(b), nan, extremum(a, b))

    return compute


def widened(x: Array, name: str) -> Array:
    """float32 of the bits of a `f16` or `bf16`."""
    if name == "f16":
        return x.view(np.float16).astype(np.float32)
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: Array, name: str) -> Array:
    """The bits of x, float32 or float64, rounded to nearest even to a `f16` or `bf16`."""
    bits = _f16_bits(x) if name == "f16" else _bf16_bits(x)
    return np.where(np.isnan(x), _HALF_NAN, bits)


def _f16_bits(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def _bf16_bits(x: Array) -> Array:
    if x.dtype == np.float64:
        x = _odd32(x)
    word = x.view(np.uint32)
    even = (word >> np.uint32(16)) & np.uint32(1)
    return ((word + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)


def _odd32(x: Array) -> Array:
    """float64 rounded to float32 to odd, so that a further rounding is correct."""
    nearest = x.astype(np.float32)
    back = nearest.astype(np.float64)
    word = nearest.view(np.int32)
    truncated = np.where(np.abs(back) > np.abs(x), word - 1, word)
    return np.where(back == x, word, truncated | 1).astype(np.int32).view(np.float32)


INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, mode: str, dtype: np.dtype) -> Array:
    """x rounded to an integer by `mode`, saturating; NaN as in the PTX ISA's text on `cvt`."""
    bits = 8 * dtype.itemsize
    integral = INTEGRAL[mode](x.astype(np.float64))
    limits = np.iinfo(dtype)
    # The largest integers of 64 bits are not exact in float64, but the powers of two above are.
    above = integral >= float(limits.max) if bits < 64 else integral >= float(limits.max + 1)
    below = integral <= float(limits.min)
    inside = np.where(above | below | np.isnan(x), 0.0, integral)
    upper_half = inside >= 2.0**63
    low = np.where(upper_half, inside - 2.0**63, inside).astype(np.int64).astype(np.uint64)
    value = (low + np.where(upper_half, np.uint64(2**63), np.uint64(0))).astype(dtype)
    value = np.where(above, dtype.type(limits.max), value)
    value = np.where(below, dtype.type(limits.min), value)
    wide = bits == 64 or x.dtype == np.float64
    nan = UNSIGNED[dtype.itemsize](1 << (bits - 1) if wide else 0).view(dtype)
    return np.where(np.isnan(x), nan, value)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of two integers of the same type."""
    size = a.dtype.itemsize
    if size < 8:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * size]
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    high = _multiply_high_unsigned(a.view(np.uint64), b.view(np.uint64))
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, b.view(np.uint64), zero)
        high = high - np.where(b < 0, a.view(np.uint64), zero)
    return high.view(a.dtype)


def _multiply_high_unsigned(a: Array, b: Array) -> Array:
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    middle_low = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (middle_low >> half)


def quotient(a: Array, b: Array) -> Array:
    """a / b rounded towards zero."""
    floor = a // b
    inexact = floor * b != a
    return np.where(inexact & ((a < 0) != (b < 0)), floor + a.dtype.type(1), floor)
