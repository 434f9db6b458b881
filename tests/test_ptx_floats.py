"""The interpreter of PTX: instructions on floats, and conversions, against exact fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

from .support.gpuless.statements import (
    HALVES_AND_WORDS,
    WORDS,
    combinations,
    evaluate,
    integers,
    numpy_name,
    wrapped,
)


class Format(NamedTuple):
    dtype: str
    type: str
    precision: int
    lowest: int  # exponent of the least significant bit of the subnormals
    highest: int  # numbers are below 2**highest

    @property
    def bits(self) -> int:
        return 8 * int(self.dtype[1:])


F16 = Format("f2", "f16", 11, -24, 16)
F32 = Format("f4", "f32", 24, -149, 128)
F64 = Format("f8", "f64", 53, -1074, 1024)
BF16 = Format("u2", "bf16", 8, -133, 128)


def rounded(x: Fraction, to: Format) -> Fraction | float:
    """x rounded to nearest, ties to even; ±inf beyond the range."""
    if x == 0:
        return x
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - to.precision + 1, to.lowest)
    result = round(magnitude / unit) * unit
    sign = 1 if x > 0 else -1
    return sign * (math.inf if result >= Fraction(2) ** to.highest else result)


def value_of(bits: int, of: Format) -> Fraction | float:
    """A finite number exactly; inf or nan as a float."""
    fraction_bits = of.precision - 1
    exponent_bits = of.bits - of.precision
    sign = -1 if bits >> of.bits - 1 else 1
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction = bits & (1 << fraction_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        return math.nan if fraction else sign * math.inf
    significand = fraction + (1 << fraction_bits if exponent else 0)
    return sign * significand * Fraction(2) ** (of.lowest + max(exponent - 1, 0))


def assert_rounded(out: np.ndarray, exact: Sequence[Fraction], to: Format) -> None:
    for i, (bits, x) in enumerate(zip(out.tolist(), exact, strict=True)):
        assert value_of(bits, to) == rounded(x, to), (i, hex(bits), float(x))


def numbers(of: Format, count: int, seed: int) -> np.ndarray:
    """Finite numbers of all magnitudes, subnormals and the extremes among them."""
    generator = np.random.default_rng(seed)
    word = f"u{of.bits // 8}"
    bits = generator.integers(0, 2**of.bits, count, dtype=word)
    one = 2 ** (of.bits - of.precision - 1) - 1 << of.precision - 1
    # Half of them near 1, where sums and products interfere.
    near = (bits >> 4 & (1 << of.precision - 1) - 1) + np.array(one, word)
    near = near + (generator.integers(-3, 4, count) << of.precision - 1).astype(word)
    near |= bits & np.array(1 << of.bits - 1, word)
    values = np.where(np.arange(count) % 2 == 0, bits, near).astype(word).view(of.dtype)
    edges = np.array([1, 2, 3, (1 << of.precision - 1) - 1, 1 << of.precision - 1], word)
    largest = np.array([np.finfo(of.dtype).max, 1.0, 2.0, 1.5], of.dtype)
    edges = np.concatenate([edges.view(of.dtype), largest])
    values[: 2 * len(edges)] = np.concatenate([edges, -edges])
    return np.where(np.isfinite(values), values, np.array(1.25, of.dtype))


def exact(values: np.ndarray) -> list[Fraction]:
    return [Fraction(float(v)) for v in values]


def hard_triples(of: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors and addends where a wrong rounding shows: cancellation, ties, ends of the range."""
    a, b, c = (numbers(of, 600, seed) for seed in (1, 2, 3))
    b = np.roll(b, 17)
    with np.errstate(all="ignore"):
        product = a * b
        half_unit = np.ldexp(product, -of.precision).astype(of.dtype)
        tiny = np.array(2.0**-of.precision, of.dtype) * half_unit
        smallest = np.nextafter(np.zeros_like(a), product)
        # A product just past a tie of the sum, and exactly on one.
        power = np.exp2(np.round(np.log2(np.abs(product) + 1e-30)) + of.precision).astype(of.dtype)
        addends = [c, -product, np.nextafter(-product, c), half_unit, -half_unit + tiny, smallest,
                   power, -power, np.roll(c, 5) * a]  # fmt: skip
    triples = [(a, b, addend) for addend in addends]
    # Products just below a tie of the sum, by less than twice the precision shows: an odd addend
    # must stay, and rounding to that precision first would move it.
    unit = np.array(2.0 ** (1 - of.precision), of.dtype)
    steps = np.arange(1, 200).astype(of.dtype)
    triples.append((1 + steps * unit, 1 - steps * unit, np.full_like(steps, 2.0**of.precision + 2)))
    triples.append((1 + steps * unit, 1 + steps * unit, np.full_like(steps, -1)))
    # The same below the smallest normal number, where ties lie elsewhere.
    low = -((1 - of.lowest) // 2)
    factors = (1 + steps * unit, 1 - steps * unit)
    scaled = [
        np.ldexp(f, e).astype(of.dtype)
        for f, e in zip(factors, (low, of.lowest - 1 - low), strict=True)
    ]
    odd_subnormal = np.array(2.0 ** (of.lowest + of.precision - 2) + 2.0**of.lowest, of.dtype)
    triples.append((*scaled, np.full_like(steps, odd_subnormal)))
    triples.append((*scaled, np.zeros_like(steps)))
    # Factors at opposite ends of the range.
    end = of.highest - 26
    far = [np.ldexp(f, e).astype(of.dtype) for f, e in zip(factors, (end, -end // 3), strict=True)]
    triples.append((*far, steps))
    # Products below the subnormals.
    root = np.array(2.0 ** (of.lowest // 2), of.dtype)
    triples.append((steps * root, (1 + steps * unit) * root / 2, smallest[:199]))
    columns = [np.concatenate(column) for column in zip(*triples, strict=True)]
    finite = np.isfinite(columns[2])
    return columns[0][finite], columns[1][finite], columns[2][finite]


@pytest.mark.parametrize("of", [F32, F64], ids=["f32", "f64"])
def test_fma(of: Format) -> None:
    a, b, c = hard_triples(of)
    out = evaluate(f"fma.rn.{of.type} d, a, b, c;", {"a": a, "b": b, "c": c}, of.type)
    products = [x * y for x, y in zip(exact(a), exact(b), strict=True)]
    sums = [x + y for x, y in zip(products, exact(c), strict=True)]
    assert_rounded(out, sums, of)
    # The cases are hard: other ways to round differ on many of them.
    with np.errstate(all="ignore"):
        twice = (a * b + c).view(out.dtype)
        wide = (a.astype("f8") * b + c).astype(of.dtype).view(out.dtype)
    assert np.mean(twice != out) > 0.1
    assert (wide != out).sum() > 10


def test_fma_of_doubles_without_overflow_in_between() -> None:
    """A product beyond the range is no overflow of a fused multiply-add with a finite result, and
    the reverse.
    """
    a = np.array([2.0**1000, 2.0**1023, -(2.0**1000), 2.0**1000, 2.0**-1000, 2.0**-600])
    b = np.array([2.0**30, 2.0, 2.0**30, 2.0**23, 2.0**-80, 2.0**-474])
    c = np.array([-(2.0**1023), -(2.0**1023), 2.0**1023, 2.0**1023, 2.0**-1074, -(2.0**-1074)])
    out = evaluate("fma.rn.f64 d, a, b, c;", {"a": a, "b": b, "c": c}, "f64")
    products = [x * y for x, y in zip(exact(a), exact(b), strict=True)]
    assert_rounded(out, [x + y for x, y in zip(products, exact(c), strict=True)], F64)


@pytest.mark.parametrize("of", [F32, F64], ids=["f32", "f64"])
def test_fma_of_zeros_infinities_and_nan(of: Format) -> None:
    inf, nan, top = math.inf, math.nan, float(np.finfo(of.dtype).max)
    cases = [
        (0.0, 1.0, 0.0, 0.0), (-0.0, 1.0, -0.0, -0.0), (0.0, -1.0, 0.0, 0.0),
        (1.0, 1.0, -1.0, 0.0), (-1.0, 1.0, 1.0, 0.0), (inf, 1.0, 1.0, inf),
        (inf, 0.0, 1.0, nan), (inf, 1.0, -inf, nan), (top, top, -inf, -inf),
        (-top, top, inf, inf), (nan, 1.0, 1.0, nan), (1.0, 1.0, nan, nan), (top, 2.0, 0.0, inf),
        (-top, 2.0, 0.0, -inf), (top, 1.0, top, inf),
    ]  # fmt: skip
    a, b, c, expected = (np.array(column, of.dtype) for column in zip(*cases, strict=True))
    out = evaluate(f"fma.rn.{of.type} d, a, b, c;", {"a": a, "b": b, "c": c}, of.type)
    np.testing.assert_array_equal(out.view(of.dtype), expected)
    signed = ~np.isnan(expected)
    assert (np.signbit(out.view(of.dtype)) == np.signbit(expected))[signed].all()


def square_root(x: Fraction) -> Fraction:
    """√x to 2⁻⁸⁰⁰ of its size, and off any tie that the root itself is off."""
    scale = 4 ** max(1000, x.denominator.bit_length())
    scaled = x * scale
    root = math.isqrt(scaled.numerator // scaled.denominator)
    return Fraction(2 * root + (root * root != scaled), 2 * math.isqrt(scale))


FLOAT_OPERATIONS: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "sqrt": square_root,
}


@pytest.mark.parametrize("of", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("operation", FLOAT_OPERATIONS)
def test_float_arithmetic(operation: str, of: Format) -> None:
    a, b = numbers(of, 400, 1), np.roll(numbers(of, 400, 2), 9)
    if operation == "sqrt":
        a = np.abs(a)
    unary = operation in ("rcp", "sqrt")
    sources = {"a": a} if unary else {"a": a, "b": b}
    body = f"{operation}.rn.{of.type} {', '.join(['d', *sources])};"
    out = evaluate(body, sources, of.type)
    compute = FLOAT_OPERATIONS[operation]
    results = [compute(*values) for values in zip(*map(exact, sources.values()), strict=True)]
    assert_rounded(out, results, of)


def test_reciprocal_roots_are_as_far_off_as_they_may_be() -> None:
    a = np.arange(2**23, 2**25, 1001, dtype=np.float32)
    out = evaluate("rsqrt.approx.ftz.f32 d, a;", {"a": a}, "f32").view("f4")
    error = np.abs(out * np.sqrt(a.astype("f8")) - 1)
    assert 2.0**-23.1 < error.max() <= 2.0**-22.9
    assert (error > 2.0**-24).mean() > 0.3
    ends = np.array([0.0, -0.0, 2.0**-149, math.inf, 4 * a[7], a[7]], "f4")
    out = evaluate("rsqrt.approx.ftz.f32 d, a;", {"a": ends}, "f32").view("f4")
    assert out[:4].tolist() == [math.inf, -math.inf, math.inf, 0.0]
    # What matters are the significand and the parity of the exponent.
    assert out[5] == 2 * out[4]


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma", "div", "sqrt"])
def test_flushing_subnormals(operation: str) -> None:
    """`.ftz`: subnormal operands and results are zeros of their sign."""
    tiny = np.array([2.0**-149, 2.0**-127, -(2.0**-130), 2.0**-126, -(2.0**-126), 1.5, -0.0], "f4")
    a, b, c = (m.reshape(-1) for m in np.meshgrid(tiny, tiny, tiny, indexing="ij"))
    a, b = np.abs(a) if operation == "sqrt" else a, np.where(operation == "div", 1.5, b)
    b = b.astype("f4")
    sources = {"a": a, "b": b, "c": c}
    names = {"fma": "a, b, c", "sqrt": "a"}.get(operation, "a, b")
    out = evaluate(f"{operation}.rn.ftz.f32 d, {names};", sources, "f32").view("f4")

    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)

    plain = evaluate(
        f"{operation}.rn.f32 d, {names};", {k: flushed(v) for k, v in sources.items()}, "f32"
    )
    expected = flushed(plain.view("f4"))
    assert (out.view("u4") == expected.view("u4")).all()
    assert (np.abs(out[out != 0]) >= 2.0**-126).all()


def test_saturation() -> None:
    a = np.array([-1.0, -0.0, 0.25, 0.75, 1.0, 2.0, math.inf, -math.inf, math.nan], "f4")
    out = evaluate("add.rn.sat.f32 d, a, 0f00000000;", {"a": a}, "f32").view("f4")
    assert out.tolist() == [0.0, 0.0, 0.25, 0.75, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert not np.signbit(out).any()


def test_packed_pairs() -> None:
    """`f32x2` is two operations on the halves, exactly."""
    a, b, c = (v[: len(v) // 2 * 2] for v in hard_triples(F32))
    pairs = {"a": a.view("u8"), "b": b.view("u8"), "c": c.view("u8")}
    single = {"a": a, "b": b, "c": c}
    for operation, names in (("fma", "a, b, c"), ("mul", "a, b"), ("add", "a, c"), ("sub", "a, c")):
        for suffix in ("rn", "rn.ftz"):
            packed = evaluate(f"{operation}.{suffix}.f32x2 d, {names};", pairs, "b64").view("u4")
            scalar = evaluate(f"{operation}.{suffix}.f32 d, {names};", single, "f32")
            nan = np.isnan(scalar.view("f4"))
            assert (packed == scalar)[~nan].all()
            assert np.isnan(packed.view("f4"))[nan].all()


@pytest.mark.parametrize("half", [F16, BF16], ids=["f16", "bf16"])
def test_mixed_arithmetic(half: Format) -> None:
    """Half-precision operands of sm_100's float32 instructions are widened exactly."""
    bits = np.arange(0, 2**16, 37).astype("u2")
    bits = bits[[isinstance(value_of(int(v), half), Fraction) for v in bits]]
    other = np.roll(bits, 11)
    c = np.resize(numbers(F32, 500, 4), len(bits))
    sources = {"a": bits, "b": other, "c": c}
    x, y = ([Fraction(value_of(int(v), half)) for v in column] for column in (bits, other))
    z = exact(c)
    out = evaluate(f"add.rn.f32.{half.type} d, a, c;", sources, "f32")
    assert_rounded(out, [p + q for p, q in zip(x, z, strict=True)], F32)
    out = evaluate(f"sub.rn.f32.{half.type} d, a, c;", sources, "f32")
    assert_rounded(out, [p - q for p, q in zip(x, z, strict=True)], F32)
    out = evaluate(f"fma.rn.f32.{half.type} d, a, b, c;", sources, "f32")
    assert_rounded(out, [p * q + r for p, q, r in zip(x, y, z, strict=True)], F32)


SPECIAL = [-math.inf, -1.5, -0.0, 0.0, 2.0**-149, 1.5, math.inf, math.nan]


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_minimum_and_maximum(type: str) -> None:
    dtype = f"f{int(type[1:]) // 8}"
    sources = combinations(SPECIAL, SPECIAL, dtypes=[dtype] * 2)
    pairs = list(zip(sources["a"].tolist(), sources["b"].tolist(), strict=True))
    for name, sign in (("max", 1), ("min", -1)):
        out = evaluate(f"{name}.{type} d, a, b;", sources, type).view(dtype)
        nan_out = evaluate(f"{name}.NaN.{type} d, a, b;", sources, type).view(dtype)
        for (a, b), got, got_nan in zip(pairs, out.tolist(), nan_out.tolist(), strict=True):
            ordered = sorted((a, b), key=lambda v: (sign * v, sign * math.copysign(1, v)))
            known = [v for v in ordered if not math.isnan(v)]
            expected = known[-1] if known else math.nan
            assert repr(got).lstrip("-" if math.isnan(got) else "") == repr(expected), (a, b)
            assert math.isnan(got_nan) if len(known) < 2 else repr(got_nan) == repr(expected)


def test_minimum_by_magnitude_and_sign() -> None:
    """`min.xorsign.abs`, which Triton uses to clamp symmetrically."""
    sources = combinations([-3.0, -1.0, 0.5, 2.0], [-1.0, 1.0, 2.5], dtypes=["f4", "f4"])
    out = evaluate("min.xorsign.abs.f32 d, a, b;", sources, "f32").view("f4")
    expected = [
        math.copysign(1, a) * math.copysign(1, b) * min(abs(a), abs(b))
        for a, b in zip(sources["a"].tolist(), sources["b"].tolist(), strict=True)
    ]
    assert out.tolist() == expected


def test_three_operands() -> None:
    sources = combinations([1.0, 5.0], [3.0, 2.0], [4.0, math.nan], dtypes=["f4"] * 3)
    columns = [v.tolist() for v in sources.values()]
    out = evaluate("max.f32 d, a, b, c;", sources, "f32").view("f4").tolist()
    assert out == [max(v for v in row if not math.isnan(v)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("of", [F32, F64], ids=["f32", "f64"])
def test_sign_of_floats(of: Format) -> None:
    a = np.array(SPECIAL, of.dtype)
    b = np.array([1.0, -1.0] * 4, of.dtype)
    sources = {"a": a, "b": b}
    word = f"u{of.bits // 8}"
    assert (evaluate(f"neg.{of.type} d, a;", sources, of.type) == (-a).view(word)).all()
    assert (evaluate(f"abs.{of.type} d, a;", sources, of.type) == np.abs(a).view(word)).all()
    out = evaluate(f"copysign.{of.type} d, b, a;", sources, of.type)
    assert (out == np.copysign(a, b).view(word)).all()


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_float_comparisons(type: str) -> None:
    dtype = f"f{int(type[1:]) // 8}"
    sources = combinations(SPECIAL, SPECIAL, dtypes=[dtype] * 2)
    pairs = list(zip(sources["a"].tolist(), sources["b"].tolist(), strict=True))

    def unordered(a: float, b: float) -> bool:
        return math.isnan(a) or math.isnan(b)

    for name in (*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"):
        body = f"setp.{name}.{type} p, a, b; selp.b32 d, 1, 0, p;"
        out = evaluate(body, sources, "b32", ".reg .pred p;")
        for (a, b), got in zip(pairs, out.tolist(), strict=True):
            if name in ("num", "nan"):
                expected = unordered(a, b) == (name == "nan")
            elif unordered(a, b):
                expected = name.endswith("u")
            else:
                expected = bool(eval(f"a {ORDERED[name[:2]]} b"))
            assert got == expected, (name, a, b)


@pytest.mark.parametrize("type", ["s16", "u16", *WORDS, "b32"])
def test_integer_comparisons(type: str) -> None:
    values = integers(type)
    dtype = numpy_name(type)
    sources = combinations(values, values, dtypes=[dtype] * 2)
    names = {n: s for n, s in ORDERED.items() if type[0] != "b" or n in ("eq", "ne")}
    if type[0] == "u":
        names |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
    for name, symbol in names.items():
        body = f"setp.{name}.{type} p, a, b; selp.b32 d, 1, 0, p;"
        out = evaluate(body, sources, "b32", ".reg .pred p;")
        assert out.tolist() == [
            int(eval(f"a {symbol} b")) for a, b in itertools.product(values, values)
        ]


def test_combined_predicates() -> None:
    sources = combinations([0, 1], [0, 1], [0, 1], dtypes=["u4"] * 3)
    columns = list(zip(*(v.tolist() for v in sources.values()), strict=True))
    for name, compute in (("and", min), ("or", max), ("xor", lambda x, y: x ^ y)):
        body = f"""
            setp.ne.u32 r, c, 0;
            setp.lt.{name}.u32 p|q, a, b, !r;
            selp.b32 t, 2, 0, q;
            @p add.u32 t, t, 1;
            mov.u32 d, t;"""
        out = evaluate(body, sources, "b32", ".reg .pred p, q, r; .reg .b32 t;")
        expected = [
            compute(int(a < b), 1 - c) + 2 * compute(int(a >= b), 1 - c) for a, b, c in columns
        ]
        assert out.tolist() == expected


# Conversions.


@pytest.mark.parametrize("source", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("half", [F16, BF16], ids=["f16", "bf16"])
def test_narrowing_to_halves(half: Format, source: Format) -> None:
    """Narrowing to halves is right around every kind of number of the narrow type: itself, ties,
    and next to ties.
    """
    bits = np.concatenate([np.arange(0, 2**15, 97), np.arange(5), 2**15 - 2**10 + np.arange(-9, 0)])
    values = [value_of(int(v), half) for v in bits]
    values = [v for v in values if isinstance(v, Fraction)]
    following = [rounded(v + Fraction(2) ** half.lowest, half) for v in values]
    points: list[float] = []
    for v, w in zip(values, following, strict=True):
        middle = float(v + Fraction(2) ** (half.lowest - 1)) if v == w else float((v + w) / 2)
        dtype = np.dtype(source.dtype).type
        points += [float(v), middle, float(np.nextafter(dtype(middle), dtype(math.inf)))]
        points += [float(np.nextafter(dtype(middle), dtype(0)))]
    a = np.array([*points, *(-p for p in points), *numbers(source, 500, 5)], source.dtype)
    out = evaluate(f"cvt.rn.{half.type}.{source.type} d, a;", {"a": a}, "b16")
    assert_rounded(out, exact(a), half)
    if source is F32:
        torch_dtype = torch.float16 if half is F16 else torch.bfloat16
        expected = torch.from_numpy(a).to(torch_dtype).view(torch.int16).numpy().view("u2")
        assert (out == expected).all()


@pytest.mark.parametrize("half", [F16, BF16], ids=["f16", "bf16"])
def test_halves_are_widened_exactly(half: Format) -> None:
    bits = np.arange(2**16).astype("u2")
    out = evaluate(f"cvt.f32.{half.type} d, a;", {"a": bits}, "f32").view("f4")
    dtype = torch.float16 if half is F16 else torch.bfloat16
    expected = torch.from_numpy(bits.view("i2")).view(dtype).float().numpy()
    np.testing.assert_array_equal(out, expected)
    assert (np.signbit(out) == (bits >= 2**15))[~np.isnan(out)].all()


@pytest.mark.parametrize("half", [F16, BF16], ids=["f16", "bf16"])
def test_narrowing_two_at_once(half: Format) -> None:
    """Narrowing of two at once: the first source is the upper half, and NaN becomes the canonical
    one.
    """
    a, b = numbers(F32, 300, 6), numbers(F32, 300, 7)
    a[0], b[1] = math.nan, math.nan
    sources = {"a": a, "b": b}
    pairs = evaluate(f"cvt.rn.{half.type}x2.f32 d, a, b;", sources, "b32")
    for values, halves in ((a, pairs >> 16), (b, pairs & 0xFFFF)):
        single = evaluate(f"cvt.rn.{half.type}.f32 d, a;", {"a": values}, "b16")
        assert (single == halves).all()
        assert (halves[np.isnan(values)] == 0x7FFF).all()
        assert np.isnan(values).sum() == 1


def test_narrowing_to_float32() -> None:
    a = np.concatenate([numbers(F64, 300, 8), numbers(F32, 300, 9).astype("f8") * (1 + 2.0**-25)])
    assert_rounded(evaluate("cvt.rn.f32.f64 d, a;", {"a": a}, "f32"), exact(a), F32)
    narrow = numbers(F32, 300, 9)
    wide = evaluate("cvt.f64.f32 d, a;", {"a": narrow}, "f64").view("f8")
    assert (wide == narrow).all()


@pytest.mark.parametrize("to", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("type", HALVES_AND_WORDS)
def test_integers_to_floats(type: str, to: Format) -> None:
    bits = int(type[1:])
    dtype = numpy_name(type)
    generator = np.random.default_rng(3)
    limits = np.iinfo(dtype)
    values = generator.integers(limits.min, limits.max, 300, endpoint=True, dtype=dtype)
    powers = [2**k + d for k in range(bits - 1) for d in (-1, 0, 1)]
    ties = [2**k + 2 ** (k - to.precision) + d for k in range(to.precision + 1, bits - 1)
            for d in (-1, 0, 1)]  # fmt: skip
    values = np.concatenate([values, np.array([limits.min, limits.max, *powers, *ties], dtype)])
    out = evaluate(f"cvt.rn.{to.type}.{type} d, a;", {"a": values}, to.type)
    assert_rounded(out, [Fraction(int(v)) for v in values], to)


ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "rni": round,
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


@pytest.mark.parametrize("source", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_floats_to_integers(mode: str, source: Format) -> None:
    """Floats become integers with saturation; NaN becomes the value in the ISA's text on `cvt`."""
    edges = [s * v for v in (0.0, 0.5, 1.5, 2.5, 2.0**31, 2.0**32, 2.0**63, 2.0**64, 1e30, math.inf)
             for s in (1, -1)]  # fmt: skip
    near = np.array(edges[:-2], source.dtype)
    with np.errstate(over="ignore"):
        beside = [np.nextafter(near, np.array(s * math.inf, source.dtype)) for s in (1, -1)]
    some = numbers(source, 200, 10)
    a = np.concatenate([np.array(edges, source.dtype), *beside, some, [math.nan]])
    a = a.astype(source.dtype)
    for type in HALVES_AND_WORDS:
        bits = int(type[1:])
        low, high = (
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if type[0] == "s" else (0, 2**bits - 1)
        )
        out = evaluate(f"cvt.{mode}.{type}.{source.type} d, a;", {"a": a}, type)
        for x, got in zip(a.tolist(), out.tolist(), strict=True):
            if math.isnan(x):
                expected = 1 << bits - 1 if bits == 64 or source is F64 else 0
            elif math.isinf(x):
                expected = high if x > 0 else low
            else:
                expected = min(max(ROUNDINGS[mode](Fraction(x)), low), high)
            assert got == wrapped(expected, type), (type, x)


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_rounding_to_integral_floats(mode: str) -> None:
    a = np.concatenate(
        [np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**23 + 1], "f4"), numbers(F32, 99, 11)]
    )
    out = evaluate(f"cvt.{mode}.f32.f32 d, a;", {"a": a}, "f32").view("f4")
    assert out.tolist() == [float(ROUNDINGS[mode](Fraction(x))) for x in a.tolist()]


def test_integer_widths() -> None:
    values = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 2**31, 2**32 - 1], "u4")
    sources = {"a": values}
    signed = values.view("i4").astype("i8").view("u8")
    assert (evaluate("cvt.s64.s32 d, a;", sources, "s64") == signed).all()
    assert (evaluate("cvt.u64.u32 d, a;", sources, "u64") == values).all()
    octets = values.astype("u1").view("i1").astype("i4").view("u4")
    assert (evaluate("cvt.s32.s8 d, a;", sources, "s32") == octets).all()
    assert (evaluate("cvt.u16.u32 d, a;", sources, "u16") == values.astype("u2")).all()
    # A register wider than the type is filled, by the sign where there is one.
    assert (evaluate("cvt.s8.s32 d, a;", sources, "s32") == octets).all()
    assert (evaluate("cvt.u8.u32 d, a;", sources, "s32") == values.astype("u1")).all()
    place = "ld.param.u64 address, [p_a]; mad.wide.u32 address, i, 4, address;"
    assert (evaluate(place + "ld.global.s8 d, [address];", sources, "s32") == octets).all()
    narrow = values.astype("u1")
    assert (evaluate(place + "ld.global.u8 d, [address];", sources, "s32") == narrow).all()


def test_vectors_of_parts() -> None:
    a = np.array([0x0123456789ABCDEF], "u8")
    declarations = ".reg .b16 w, x, y, z; .reg .b32 lo, hi;"
    body = "mov.b64 {w, x, y, z}, a; mov.b64 d, {z, y, x, w};"
    assert evaluate(body, {"a": a}, "b64", declarations)[0] == 0xCDEF89AB45670123
    body = "mov.b64 {_, hi}, a; mov.b32 {w, x}, hi; mov.b32 lo, {x, w}; cvt.u64.u32 d, lo;"
    assert evaluate(body, {"a": a}, "b64", declarations)[0] == 0x45670123
