"""The interpreter of PTX and the stand-in for the CUDA runtime.

Arithmetic is compared with unbounded integers and exact fractions, so that it agrees with the ISA
to the bit. Each check of memory and barriers has a kernel, compiled by nvcc, that breaks its rule.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gpucheck.machine_code import nvcc

from .support.environment import needs_compiler
from .support.gpuless import ptx
from .support.gpuless.gpu import FakeGpu
from .support.gpuless.toolchain import compile_ptx, compile_shared, needs_nvcc

GPULESS = Path(__file__).parent / "support" / "gpuless"
KERNELS, LAUNCHERS = GPULESS / "kernels.cu", GPULESS / "launchers.cu"
HEADER = ".version 8.7\n.target sm_90\n.address_size 64\n"


# Single instructions.


def evaluate(
    body: str, sources: dict[str, np.ndarray], result: str, declarations: str = ""
) -> np.ndarray:
    """What `body` leaves in register d, of PTX type `result`, for each element of its sources."""
    return run_statements(body, sources, result, declarations)[0]


def run_statements(
    body: str, sources: dict[str, np.ndarray], result: str, declarations: str = ""
) -> tuple[np.ndarray, ptx.Launch]:
    """`body` in one thread for each element of its sources, registers named by their keys."""
    count = len(next(iter(sources.values())))
    bits = {name: values.view(f"u{values.itemsize}") for name, values in sources.items()}
    size = int(result.lstrip("bfus")) // 8
    out = np.zeros(count, f"u{size}")
    loads = "\n".join(
        f"""
        ld.param.u64 address, [p_{name}];
        mad.wide.u32 address, i, {values.itemsize}, address;
        ld.global.b{8 * values.itemsize} {name}, [address];"""
        for name, values in bits.items()
    )
    text = f"""{HEADER}
    .visible .entry f(.param .u64 p_out{"".join(f", .param .u64 p_{name}" for name in bits)}) {{
        .reg .pred beyond;
        .reg .b64 address;
        .reg .b32 i, block, tid;
        .reg .b{8 * size} d;
        {"".join(f".reg .b{8 * v.itemsize} {name};" for name, v in bits.items())}
        {declarations}
        mov.u32 block, %ctaid.x;
        mov.u32 tid, %tid.x;
        mad.lo.u32 i, block, 256, tid;
        setp.ge.u32 beyond, i, {count};
        @beyond ret;
        {loads}
        {body}
        ld.param.u64 address, [p_out];
        mad.wide.u32 address, i, {size}, address;
        st.global.b{8 * size} [address], d;
        ret;
    }}"""
    memory = ptx.Memory()
    memory.add(out.ctypes.data, out.nbytes, "out")
    for name, values in bits.items():
        memory.add(values.ctypes.data, values.nbytes, name, writable=False)
    arguments = [out.ctypes.data, *(v.ctypes.data for v in bits.values())]
    grid = (-(-count // 256), 1, 1)
    launch = ptx.run(ptx.parse(text), "f", grid, (256, 1, 1), arguments, memory)
    return out, launch


def combinations(*columns: Iterable[int | float], dtypes: Sequence[str]) -> dict[str, np.ndarray]:
    """Registers a, b, … that run through every combination."""
    rows = list(itertools.product(*columns))
    return {
        name: np.array([row[i] for row in rows], dtypes[i])
        for i, name in zip(range(len(columns)), "abc", strict=False)
    }


def integers(type: str) -> list[int]:
    """Edges of an integer type, and a few numbers between them."""
    bits = int(type[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if type[0] == "s" else (0, 2**bits)
    generator = np.random.default_rng(bits)
    some = generator.integers(low, high - 1, 6, endpoint=True, dtype=numpy_name(type))
    edges = {low, low + 1, low + 2, high - 1, high - 2, high // 2, high // 2 - 1, 0, 1, 3, 7}
    return sorted(edges | {int(v) for v in some})


def numpy_name(type: str) -> str:
    return ("i" if type[0] == "s" else "u") + str(int(type[1:]) // 8)


def wrapped(value: int, type: str) -> int:
    return value % 2 ** int(type[1:])


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


WORDS = ("u32", "s32", "u64", "s64")
HALVES_AND_WORDS = ("u16", "s16", *WORDS)
BINARY: dict[str, tuple[tuple[str, ...], Callable[[int, int, int], int]]] = {
    "add": (HALVES_AND_WORDS, lambda a, b, bits: a + b),
    "sub": (HALVES_AND_WORDS, lambda a, b, bits: a - b),
    "mul.lo": (HALVES_AND_WORDS, lambda a, b, bits: a * b),
    "mul.hi": (HALVES_AND_WORDS, lambda a, b, bits: a * b >> bits),
    "min": (HALVES_AND_WORDS, lambda a, b, bits: min(a, b)),
    "max": (HALVES_AND_WORDS, lambda a, b, bits: max(a, b)),
}


@pytest.mark.parametrize(
    ("operation", "type"), [(name, type) for name, (types, _) in BINARY.items() for type in types]
)
def test_integer_arithmetic(operation: str, type: str) -> None:
    bits = int(type[1:])
    values = integers(type)
    dtype = numpy_name(type)
    sources = combinations(values, values, dtypes=[dtype] * 2)
    out = evaluate(f"{operation}.{type} d, a, b;", sources, type)
    compute = BINARY[operation][1]
    expected = [wrapped(compute(a, b, bits), type) for a, b in itertools.product(values, values)]
    assert out.tolist() == expected


@pytest.mark.parametrize("type", ["u16", "s16", "u32", "s32"])
def test_wide_product(type: str) -> None:
    values = integers(type)
    wide = f"{type[0]}{2 * int(type[1:])}"
    dtype = numpy_name(type)
    sources = combinations(values, values, dtypes=[dtype] * 2)
    out = evaluate(f"mul.wide.{type} d, a, b;", sources, wide)
    assert out.tolist() == [wrapped(a * b, wide) for a, b in itertools.product(values, values)]


@pytest.mark.parametrize("type", HALVES_AND_WORDS)
def test_division(type: str) -> None:
    values = integers(type)
    divisors = [v for v in values if v]
    dtype = numpy_name(type)
    sources = combinations(values, divisors, dtypes=[dtype] * 2)
    pairs = list(itertools.product(values, divisors))
    quotients = evaluate(f"div.{type} d, a, b;", sources, type)
    assert quotients.tolist() == [wrapped(truncated_quotient(a, b), type) for a, b in pairs]
    remainders = evaluate(f"rem.{type} d, a, b;", sources, type)
    expected = [wrapped(a - b * truncated_quotient(a, b), type) for a, b in pairs]
    assert remainders.tolist() == expected


def test_integer_division_by_zero_is_refused() -> None:
    sources = {"a": np.array([1], "u4"), "b": np.array([0], "u4")}
    with pytest.raises(ptx.PtxError, match="division by zero"):
        evaluate("div.u32 d, a, b;", sources, "u32")


def test_carry_chains() -> None:
    """128-bit arithmetic from words, as compilers build it."""
    generator = np.random.default_rng(1)
    edges = np.array([0, 1, 2**32 - 1, 2**63, 2**64 - 1, 2**64 - 2**32], "u8")
    a, b = (
        np.concatenate([generator.integers(0, 2**64, 300, dtype="u8"), values])
        for values in np.array(list(itertools.product(edges, edges)), "u8").T
    )
    halves = """
        mov.b64 {a0, a1}, a; mov.b64 {b0, b1}, b;
    """
    declarations = ".reg .b32 a0, a1, b0, b1, r0, r1, r2, r3;"
    total = evaluate(
        halves + "add.cc.u32 r0, a0, b0; addc.u32 r1, a1, b1; mov.b64 d, {r0, r1};",
        {"a": a, "b": b},
        "u64",
        declarations,
    )
    assert total.tolist() == [(int(x) + int(y)) % 2**64 for x, y in zip(a, b, strict=True)]
    difference = evaluate(
        halves + "sub.cc.u32 r0, a0, b0; subc.u32 r1, a1, b1; mov.b64 d, {r0, r1};",
        {"a": a, "b": b},
        "u64",
        declarations,
    )
    assert difference.tolist() == [(int(x) - int(y)) % 2**64 for x, y in zip(a, b, strict=True)]
    # What leaves the second word, into a third.
    out = evaluate(
        halves
        + "add.cc.u32 r0, a0, b0; addc.cc.u32 r1, a1, b1; addc.u32 r2, 0, 0;"
        + "sub.cc.u32 r0, a0, b0; subc.cc.u32 r1, a1, b1; subc.u32 r3, 0, 0; mov.b64 d, {r2, r3};",
        {"a": a, "b": b},
        "u64",
        declarations,
    )
    for word, x, y in zip(out.tolist(), a.tolist(), b.tolist(), strict=True):
        assert word == (x + y >> 64) + (2**64 - 2**32 if x < y else 0)
    product = """
        mul.lo.u32 r0, a0, b0;
        mul.hi.u32 r1, a0, b0;
        mad.lo.cc.u32 r1, a0, b1, r1;
        madc.hi.u32 r2, a0, b1, 0;
        mad.lo.cc.u32 r1, a1, b0, r1;
        madc.hi.cc.u32 r2, a1, b0, r2;
        addc.u32 r3, 0, 0;
        mad.lo.cc.u32 r2, a1, b1, r2;
        madc.hi.u32 r3, a1, b1, r3;
    """
    for pair, shift in (("{r0, r1}", 0), ("{r2, r3}", 64)):
        body = halves + product + f"mov.b64 d, {pair};"
        out = evaluate(body, {"a": a, "b": b}, "u64", declarations)
        expected = [(int(x) * int(y) >> shift) % 2**64 for x, y in zip(a, b, strict=True)]
        assert out.tolist() == expected


AMOUNTS = (0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 2**32 - 1)


@pytest.mark.parametrize("type", ["b16", "b32", "b64", "s16", "s32", "s64", "u32", "u64"])
def test_shifts(type: str) -> None:
    bits = int(type[1:])
    values = integers(type)
    dtype = numpy_name(type)
    sources = combinations(values, AMOUNTS, dtypes=[dtype, "u4"])
    pairs = list(itertools.product(values, AMOUNTS))
    right = evaluate(f"shr.{type} d, a, b;", sources, type)
    assert right.tolist() == [wrapped(a >> n, type) if n < bits else wrapped(-(a < 0), type)
                              for a, n in pairs]  # fmt: skip
    if type[0] == "b":
        left = evaluate(f"shl.{type} d, a, b;", sources, type)
        assert left.tolist() == [wrapped(a << n, type) if n < bits else 0 for a, n in pairs]


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(direction: str, mode: str) -> None:
    words = [0, 1, 0x80000001, 0xDEADBEEF, 2**32 - 1]
    sources = combinations(words, words, AMOUNTS, dtypes=["u4"] * 3)
    out = evaluate(f"shf.{direction}.{mode}.b32 d, a, b, c;", sources, "b32")
    expected = []
    for low, high, n in itertools.product(words, words, AMOUNTS):
        amount = n % 32 if mode == "wrap" else min(n, 32)
        word = high << 32 | low
        moved = word << amount >> 32 if direction == "l" else word >> amount
        expected.append(moved % 2**32)
    assert out.tolist() == expected


def test_bitwise_operations() -> None:
    words = [0, 1, 0xF0F0F0F0, 0xDEADBEEF, 2**32 - 1]
    sources = combinations(words, words, words, dtypes=["u4"] * 3)
    a, b, c = sources["a"], sources["b"], sources["c"]
    assert (evaluate("and.b32 d, a, b;", sources, "b32") == (a & b)).all()
    assert (evaluate("or.b32 d, a, b;", sources, "b32") == (a | b)).all()
    assert (evaluate("xor.b32 d, a, b;", sources, "b32") == (a ^ b)).all()
    assert (evaluate("not.b32 d, a;", sources, "b32") == ~a).all()
    # Tables of the ISA's own examples: the operation applied to 0xF0, 0xCC and 0xAA.
    for compute in (
        lambda x, y, z: x & y | z,
        lambda x, y, z: x ^ y ^ z,
        lambda x, y, z: (x & ~y) | (y & z),
    ):
        table = compute(0xF0, 0xCC, 0xAA) & 0xFF
        out = evaluate(f"lop3.b32 d, a, b, c, {table};", sources, "b32")
        assert (out == compute(a, b, c)).all()


def test_byte_permutation() -> None:
    words = [0x33221100, 0x8899AABB, 0xF07F80FF]
    selectors = [0x3210, 0x7654, 0x0123, 0x5410, 0xFEDC, 0xBA98, 0x7B3F]
    sources = combinations(words, words, selectors, dtypes=["u4"] * 3)
    out = evaluate("prmt.b32 d, a, b, c;", sources, "b32")
    expected = []
    for a, b, selector in itertools.product(words, words, selectors):
        octets = (b << 32 | a).to_bytes(8, "little")
        result = 0
        for place in range(4):
            choice = selector >> 4 * place & 15
            octet = octets[choice & 7]
            if choice & 8:
                octet = 255 if octet & 128 else 0
            result |= octet << 8 * place
        expected.append(result)
    assert out.tolist() == expected


@pytest.mark.parametrize("type", WORDS)
def test_bit_fields(type: str) -> None:
    """The pseudocode of the ISA, bit by bit."""
    bits = int(type[1:])
    values = integers(f"u{bits}")
    places = (0, 1, 5, 31, 32, 40, 63, 64, 255)
    sources = combinations(values, places, places, dtypes=[f"u{bits // 8}", "u4", "u4"])
    out = evaluate(f"bfe.{type} d, a, b, c;", sources, type)
    inserted = evaluate(f"bfi.b{bits} d, a, {0x5A5A5A5A}, b, c;", sources, f"b{bits}")
    for i, (value, start, length) in enumerate(itertools.product(values, places, places)):
        sign_place = min(start + length - 1, bits - 1)
        sign = value >> sign_place & 1 if type[0] == "s" and length else 0
        field = sum(
            (value >> start + k & 1 if k < length and start + k < bits else sign) << k
            for k in range(bits)
        )
        assert int(out[i]) == field, (value, start, length)
        expected = 0x5A5A5A5A
        for k in range(length):
            if start + k < bits:
                expected = expected & ~(1 << start + k) | (value >> k & 1) << start + k
        assert int(inserted[i]) == expected, (value, start, length)


def test_sign() -> None:
    for type in ("s16", "s32", "s64"):
        values = integers(type)
        sources = combinations(values, dtypes=[f"i{int(type[1:]) // 8}"])
        assert evaluate(f"neg.{type} d, a;", sources, type).tolist() == [
            wrapped(-v, type) for v in values
        ]
        assert evaluate(f"abs.{type} d, a;", sources, type).tolist() == [
            wrapped(abs(v), type) for v in values
        ]


# Floats, against exact fractions.


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
    """Finite results whose product alone is beyond the range, and the reverse."""
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
    """Around every kind of number of the narrow type: itself, ties, and beside ties."""
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
    """The first source is the upper half; NaN becomes the canonical one."""
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
    """Saturating; NaN becomes what the ISA's text on `cvt` says."""
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


# What is refused.

REFUSED = [
    "foo.b32 d, a;",
    "add.rn.bogus.f32 d, a, b;",
    "add.f32 d, a, b;",
    "mul.ftz.f32 d, a, b;",
    "fma.rz.f32 d, a, b, b;",
    "add.rn.rz.f32 d, a, b;",
    "sqrt.approx.f32 d, a;",
    "sqrt.approx.ftz.f32 d, a;",
    "rsqrt.approx.f32 d, a;",
    "ex2.approx.ftz.f32 d, a;",
    "lg2.approx.f32 d, a;",
    "sin.approx.f32 d, a;",
    "rcp.approx.f32 d, a;",
    "div.full.f32 d, a, b;",
    "div.approx.f32 d, a, b;",
    "add.rn.f16 d, a, b;",
    "add.sat.s32 d, a, b;",
    "cvt.rz.f16.f32 h, a;",
    "cvt.f16.f32 h, a;",
    "cvt.s32.f32 d, a;",
    "cvt.rn.relu.bf16.f32 h, a;",
    "cvt.sat.u8.u32 h, a;",
    "min.relu.f32 d, a, b;",
    "max.xorsign.f32 d, a, b;",
    "setp.lt.b32 p, a, b;",
    "setp.lo.s32 p, a, b;",
    "setp.ltu.u32 p, a, b;",
    "mul.u32 d, a, b;",
    "mul.wide.u64 x, x, x;",
    "shf.l.b32 d, a, b, a;",
    "prmt.f4e.b32 d, a, b, a;",
    "shfl.idx.b32 d, a, 0, 31;",
    "ldmatrix.sync.aligned.m8n8.x2.b8 {d, a}, [x];",
    "stmatrix.sync.aligned.m8n8.x2.b16 [x], {d, a};",
    "vote.sync.any.pred p, p, -1;",
    "atom.global.add.u32 d, [x], a;",
    "red.global.add.u32 [x], a;",
    "ld.global.acquire.gpu.b32 d, [x];",
    "ld.global.relaxed.sys.b32 d, [x];",
    "ld.global.v3.b32 {d, a, b}, [x];",
    "ld.global.nc.cs.ca.b32 d, [x];",
    "ld.global.v2.b32 d, [x];",
    "ld.global.L3::evict.b32 d, [x];",
    "ld.global.L2::cache_hint.b32 d, [x];",
    "st.const.b32 [x], d;",
    "st.param.b32 [x], d;",
    "st.global.nc.b32 [x], d;",
    "cp.async.ca.shared.global [x], [x], 4;",
    "call.uni f, ();",
    "membar.gl;",
    "bar.sync 1;",
    "bar.arrive 0, 64;",
    "bar.warp.sync -1;",
    "trap;",
    "brkpt;",
    "bra elsewhere;",
    "add.u32 d, a;",
    "add.u32 d, a, b, a;",
    "add.u64 x, x, a;",
    "ld.global.f32 x, [x];",
    "add.u32 d, a, nowhere;",
    "add.u32 d, a, 0x100000000;",
    "mov.f32 d, 0d3FF0000000000000;",
    "add.u32 3, a, b;",
    "add.u32 d, a, p;",
    "@a mov.u32 d, 1;",
    "mov.u32 d, %clock;",
    "mov.u32 d, %smid;",
    "ld.param.b32 d, [p_out+8];",
    "ld.param.b64 x, [p_out+4];",
]


@pytest.mark.parametrize("statement", REFUSED)
def test_refused(statement: str) -> None:
    """Whatever is not implemented is an error, also in code that no thread reaches."""
    declarations = ".reg .pred p; .reg .b64 x; .reg .b16 h;"
    sources = {"a": np.ones(1, "u4"), "b": np.ones(1, "u4")}
    body = f"setp.ne.u32 p, a, a; @!p bra over; {statement} over: mov.u32 d, 7;"
    assert evaluate(body.replace(statement, ""), sources, "b32", declarations)[0] == 7
    with pytest.raises(ptx.PtxError):
        evaluate(body, sources, "b32", declarations)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (".visible .entry f() .maxclusterrank 2 { ret; }", "maxclusterrank"),
        (".func g() { ret; }", "unsupported statement"),
        (".visible .entry f(.param .texref t) { ret; }", "texref"),
        (".visible .entry f() { .reg .b128 %q; ret; }", "b128"),
        (".visible .entry f() { add.u32 ", "braces"),
        (".extern .global .b32 x;", "extern"),
        (".visible .entry f() { nothing }", "syntax"),
    ],
)
def test_refused_modules(text: str, reason: str) -> None:
    with pytest.raises(ptx.PtxError, match=reason):
        ptx.run(ptx.parse(HEADER + text), "f", (1, 1, 1), (1, 1, 1), [], ptx.Memory())


def test_running_past_the_end_and_endless_loops_are_refused() -> None:
    for body, reason in (("{ mov.u32 %r, 1; }", "past the end"), ("again: bra again;", "steps")):
        text = f"{HEADER}.visible .entry f() {{ .reg .b32 %r; {body} }}"
        with pytest.raises(ptx.PtxError, match=reason):
            ptx.run(ptx.parse(text), "f", (1, 1, 1), (1, 1, 1), [], ptx.Memory(), max_steps=100)


def test_scopes() -> None:
    """Registers and labels declared between braces hide those around them, and end with them."""
    body = """
        mov.u32 t, 1;
        {
            .reg .b32 t;
            mov.u32 t, 10;
            bra over;
            mov.u32 t, 20;
            over:
            {
                .reg .b32 t;
                mov.u32 t, 100;
            }
            mov.u32 d, t;
        }
        {
            .reg .b64 t;
            bra over;
            add.u32 d, d, 1000;
            over:
            cvt.u64.u32 t, d;
        }
        add.u32 d, d, t;"""
    out = evaluate(body, {"a": np.zeros(1, "u4")}, "b32", ".reg .b32 t;")
    assert out[0] == 11


def test_registers_start_poisoned() -> None:
    """What was never written is NaN, so that reading it shows."""
    out = evaluate("mov.f32 d, t;", {"a": np.zeros(4, "u4")}, "f32", ".reg .f32 t;")
    assert np.isnan(out.view("f4")).all()


@pytest.mark.parametrize("count", [512, 600])
def test_predicated_lanes_keep_their_value(count: int) -> None:
    """And what turned them off does not count as executed."""
    a = np.arange(count, dtype="u4")
    body = """
        mov.u32 d, a;
        mov.u32 copy, d;
        and.b32 t, a, 3;
        setp.eq.u32 p, t, 2;
        @p mov.b32 d, 7;
        @!p add.u32 copy, copy, 1;
        add.u32 d, d, copy;"""
    out, launch = run_statements(body, {"a": a}, "b32", ".reg .b32 t, copy; .reg .pred p;")
    assert out.tolist() == [7 + i if i % 4 == 2 else i + i + 1 for i in range(count)]
    assert launch.executed["mov.b32"] == count // 4
    assert launch.executed["st.global.b32"] == count


# Whole kernels, compiled by nvcc.


@pytest.fixture(scope="module")
def module() -> ptx.Module:
    if nvcc() is None:
        pytest.skip("there is no nvcc")
    return ptx.parse(compile_ptx(KERNELS, "sm_90", "-fmad=false"))


@pytest.fixture(scope="module")
def launched_text() -> str:
    if nvcc() is None:
        pytest.skip("there is no nvcc")
    return compile_ptx(LAUNCHERS, "sm_90", "-fmad=false")


@pytest.fixture(scope="module")
def launched(launched_text: str) -> ptx.Module:
    return ptx.parse(launched_text)


def start(
    module: ptx.Module,
    name: str,
    *tensors: torch.Tensor,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (64, 1, 1),
    shared_bytes: int = 0,
) -> ptx.Launch:
    """A kernel on tensors, the last of which it may write."""
    memory = ptx.Memory()
    for i, tensor in enumerate(tensors):
        memory.add_tensor(tensor, f"tensor {i}", writable=i == len(tensors) - 1)
    pointers = [tensor.data_ptr() for tensor in tensors]
    return ptx.run(module, name, grid, block, pointers, memory, shared_bytes)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two_writers", r"race: thread \d+ overwrites what thread \d+ wrote"),
        ("read_after_write", "reads what thread"),
        ("write_after_read", "overwrites what"),
        ("a_byte_of_a_word", "overwrites what thread"),
        ("a_byte_of_what_was_read", "overwrites what thread 0 read"),
        ("written_by_the_last_reader", "overwrites what others read"),
        ("reads_back_through_nc", "non-coherent"),
        ("divergent_barrier", "divergent barrier"),
        ("barrier_after_exit", "divergent barrier"),
        ("two_barriers", "divergent barrier"),
        ("shared_without_barrier", "reads what thread"),
        ("beyond_shared", "out of bounds of 256 bytes of shared memory"),
    ],
)
def test_broken_rules(module: ptx.Module, name: str, reason: str) -> None:
    with pytest.raises(ptx.PtxError, match=reason):
        start(module, name, torch.zeros(65))


def test_races_between_blocks(module: ptx.Module) -> None:
    """Also where the blocks do not run in the same wave."""
    assert start(module, "two_blocks_write", torch.zeros(64)).executed["ret"] == 64
    for blocks in (2, 1000):
        with pytest.raises(ptx.PtxError, match="race"):
            start(module, "two_blocks_write", torch.zeros(64), grid=(blocks, 1, 1))


def test_what_is_no_race(module: ptx.Module) -> None:
    out = torch.zeros(64, dtype=torch.uint8)
    start(module, "neighbouring_bytes", out)
    assert out.tolist() == list(range(64))
    values = torch.arange(64.0)
    start(module, "in_place", values)
    assert values.tolist() == [i + 1.0 for i in range(64)]


def test_store_into_read_only_memory(module: ptx.Module) -> None:
    values = torch.zeros(64)
    memory = ptx.Memory()
    memory.add_tensor(values, "values", writable=False)
    with pytest.raises(ptx.PtxError, match="store into values, which is read-only"):
        ptx.run(module, "in_place", (1, 1, 1), (64, 1, 1), [values.data_ptr()], memory)
    assert values.tolist() == [0.0] * 64


@pytest.mark.parametrize("short", ["in", "out"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_bounds_are_exact_to_the_byte(module: ptx.Module, short: str, end: str) -> None:
    """Also with another region right beside, whose bytes are no part of this one."""
    block = torch.arange(640, dtype=torch.uint8)
    regions = {"in": block[64:192], "out": block[320:448]}
    before = block.clone()

    def run(cut: str | None) -> ptx.Launch:
        memory = ptx.Memory()
        for name, view in regions.items():
            shift = (1 if end == "first" else 0) if name == cut else 0
            size = len(view) - (name == cut)
            memory.add(view.data_ptr() + shift, size, name, writable=name == "out")
        pointers = [view.data_ptr() for view in regions.values()]
        return ptx.run(module, "copy_bytes", (2, 1, 1), (64, 1, 1), pointers, memory)

    assert run(None).bytes_read == {"in": 128}
    assert torch.equal(block[320:448], before[64:192])
    assert torch.equal(block[448:], before[448:])
    deed = "load" if short == "in" else "store"
    with pytest.raises(ptx.PtxError, match=rf"{deed} of 1 bytes at .* out of bounds.*of {short}"):
        run(short)


def test_a_wide_access_is_not_split_between_regions(module: ptx.Module) -> None:
    source, out = torch.arange(256.0), torch.zeros(256)
    memory = ptx.Memory()
    memory.add(source.data_ptr(), 1000, "first", writable=False)
    memory.add(source.data_ptr() + 1000, 24, "second", writable=False)
    memory.add_tensor(out, "out")
    pointers = [source.data_ptr(), out.data_ptr()]
    with pytest.raises(ptx.PtxError, match=r"load of 16 bytes .* out of bounds"):
        ptx.run(module, "copy_wide", (1, 1, 1), (64, 1, 1), pointers, memory)


def test_accesses_from_several_regions_at_once(module: ptx.Module) -> None:
    source, out = torch.arange(256.0), torch.zeros(256)
    memory = ptx.Memory()
    memory.add(source.data_ptr(), 512, "low", writable=False)
    memory.add(source.data_ptr() + 512, 512, "high", writable=False)
    memory.add_tensor(out, "out")
    pointers = [source.data_ptr(), out.data_ptr()]
    launch = ptx.run(module, "copy_wide", (1, 1, 1), (64, 1, 1), pointers, memory)
    assert torch.equal(out, source)
    assert launch.bytes_read == {"low": 512, "high": 512}
    assert launch.bytes_written == {"out": 1024}


@pytest.mark.parametrize("place", [0, 1])
def test_misaligned_vectors(module: ptx.Module, place: int) -> None:
    tensors = [torch.zeros(260), torch.zeros(260)]
    assert all(t.data_ptr() % 16 == 0 for t in tensors)
    start(module, "copy_wide", *tensors)
    tensors[place] = tensors[place][1:]
    with pytest.raises(ptx.PtxError, match="misaligned access of 16 bytes"):
        start(module, "copy_wide", *tensors)


def test_wild_pointers(module: ptx.Module) -> None:
    """Also those whose end wraps around the address space."""
    out = torch.zeros(64)
    memory = ptx.Memory()
    memory.add_tensor(out, "out")
    for pointer in (0, 2**64 - 64, 2**63, out.data_ptr() - 4, out.data_ptr() + 4096):
        with pytest.raises(ptx.PtxError, match="out of bounds"):
            ptx.run(module, "in_place", (1, 1, 1), (64, 1, 1), [pointer], memory)


def test_regions_must_not_overlap() -> None:
    memory = ptx.Memory()
    values = torch.zeros(8)
    memory.add_tensor(values[:4], "left")
    memory.add_tensor(values[4:], "right")
    with pytest.raises(ValueError, match="middle: expected a region of its own, overlaps left"):
        memory.add_tensor(values[3:5], "middle")


def test_strided_views_span_their_extent() -> None:
    base = torch.zeros(6, 10)
    view = base[1:4, 2:5]
    memory = ptx.Memory()
    memory.add_tensor(view, "view")
    (region,) = memory
    assert region.address == base.data_ptr() + 12 * 4
    assert region.size == (2 * 10 + 3) * 4
    memory.add_tensor(base[4, 6:6], "empty")
    assert len(list(memory)) == 1


def test_shared_memory_and_barriers(module: ptx.Module) -> None:
    """Blocks of several waves, each with rows of its own."""
    values = torch.randn(64 * 600)
    before = values.clone()
    start(module, "reverse", values, grid=(600, 1, 1))
    assert torch.equal(values.view(600, 64), before.view(600, 64).flip(1))


def test_barriers_in_loops(module: ptx.Module) -> None:
    values = torch.randint(-1000, 1000, (300 * 128,), dtype=torch.int32)
    sums = torch.zeros(300, dtype=torch.int32)
    start(module, "sum_of_block", values, sums, grid=(300, 1, 1), block=(128, 1, 1),
          shared_bytes=512)  # fmt: skip
    assert torch.equal(sums.long(), values.view(300, 128).long().sum(1))
    with pytest.raises(ptx.PtxError, match="out of bounds of 511 bytes"):
        start(module, "sum_of_block", values, sums, block=(128, 1, 1), shared_bytes=511)


def test_divergent_loops(module: ptx.Module) -> None:
    """Each thread leaves its loop at another time."""
    values = torch.arange(1, 513, dtype=torch.int32)
    out = torch.zeros(512, dtype=torch.int32)
    start(module, "steps_to_one", values, out, grid=(8, 1, 1))

    def steps(value: int) -> int:
        count = 0
        while value != 1:
            value, count = 3 * value + 1 if value % 2 else value // 2, count + 1
        return count

    assert out.tolist() == [steps(i) for i in range(1, 513)]


def test_variables_and_local_memory(module: ptx.Module) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    start(module, "variables", out, block=(6, 1, 1))
    assert out.tolist() == [42, 43, 45, 47, 51, 53]
    index = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6], dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int32)
    launch = start(module, "local_array", index, out, block=(8, 1, 1))
    assert any(".local" in opcode for opcode in launch.executed)
    assert out.tolist() == [int(index[v]) + i for i, v in enumerate(index.tolist())]


def test_coordinates(launched: ptx.Module) -> None:
    grid, block = (3, 4, 2), (5, 2, 3)
    out = torch.full((3 * 4 * 2 * 5 * 2 * 3,), -1, dtype=torch.int32)
    start(launched, "coordinates", out, grid=grid, block=block)
    expected = [
        bx + 10 * by + 100 * bz + 1000 * tx + 10000 * ty + 100000 * tz
        for bz, by, bx, tz, ty, tx in itertools.product(
            *map(range, (grid[2], grid[1], grid[0], block[2], block[1], block[0]))
        )
    ]
    assert out.tolist() == expected


def test_shuffles(module: ptx.Module) -> None:
    values = torch.randint(-(2**31), 2**31, (128,), dtype=torch.int32)
    out = torch.zeros(6, 128, dtype=torch.int32)
    start(module, "shuffles", values, out, grid=(2, 1, 1))
    warps, lane = values.view(4, 32), torch.arange(32)
    sources = [
        torch.full((32,), 5),
        (lane * 7) % 32,
        lane ^ 9,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane + 4 < 32, lane + 4, lane),
        lane // 8 * 8 + (lane + 1) % 8,
    ]
    for got, source in zip(out.view(6, 4, 32), sources, strict=True):
        assert torch.equal(got, warps[:, source])
    with pytest.raises(ptx.PtxError, match="divergent warp"):
        start(module, "shuffles_of_some", values, out)
    with pytest.raises(ptx.PtxError, match="shuffle of all threads"):
        start(module, "shuffles_by_mask", values, out)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 16), (128, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exchanges_of_triton(capability: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Layouts that change through shared memory, by vectors or by matrices."""
    pytest.importorskip("triton", reason="there is no Triton")
    from .support.gpuless.transpose import compiled

    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
    text, shared_bytes = compiled(capability, name, rows, columns)
    values = torch.randn(3, rows, columns, dtype=torch.float64).to(dtype)
    out = torch.zeros(3, columns, rows, dtype=dtype)
    memory = ptx.Memory()
    memory.add_tensor(values, "values", writable=False)
    memory.add_tensor(out, "out")
    module = ptx.parse(text)
    arguments = [values.data_ptr(), out.data_ptr()]
    arguments += [0] * (len(module.kernels["transpose"].parameters) - 2)
    launch = ptx.run(module, "transpose", (3, 1, 1), (128, 1, 1), arguments, memory, shared_bytes)
    assert torch.equal(out, values.mT)
    assert any("shared" in opcode for opcode in launch.executed)
    # The barrier between writing and reading is needed.
    broken = ptx.parse(text.replace("bar.sync", "// bar.sync"))
    with pytest.raises(ptx.PtxError, match="race"):
        ptx.run(broken, "transpose", (3, 1, 1), (128, 1, 1), arguments, memory, shared_bytes)


@needs_nvcc
def test_conversions_of_nvcc() -> None:
    """Old targets convert by other instructions than new ones."""
    values = torch.cat([torch.randn(60), torch.tensor([65504.0, 1e-7, math.inf, -0.0])])
    for arch in ("sm_80", "sm_90", "sm_120"):
        module = ptx.parse(compile_ptx(KERNELS, arch, "-fmad=false"))
        half, brain = torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.bfloat16)
        wide = torch.zeros(64, dtype=torch.float64)
        memory = ptx.Memory()
        for name, tensor in (("in", values), ("half", half), ("brain", brain), ("wide", wide)):
            memory.add_tensor(tensor, name, writable=name != "in")
        pointers = [t.data_ptr() for t in (values, half, brain, wide)]
        ptx.run(module, "narrow", (1, 1, 1), (64, 1, 1), pointers, memory)
        assert torch.equal(half, values.half())
        assert torch.equal(brain, values.bfloat16())
        assert torch.equal(wide, values.half().double() + values.bfloat16().double())


def test_executed_counts(launched: ptx.Module) -> None:
    values, out = torch.randn(96), torch.zeros(96)
    launch = start(launched, "fused", values, out, grid=(3, 1, 1), block=(32, 1, 1))
    assert launch.executed["fma.rn.f32"] == 96
    assert launch.executed["ret"] == 96
    assert launch.executed["st.global.f32"] == 96
    assert launch.bytes_read == {"tensor 0": 384}
    assert launch.bytes_written == {"tensor 1": 384}


def test_launch_bounds(module: ptx.Module) -> None:
    start(module, "at_most_64", torch.zeros(64))
    with pytest.raises(ptx.PtxError, match="expected at most 64 threads, got 65"):
        start(module, "at_most_64", torch.zeros(65), block=(65, 1, 1))


def test_arguments_are_checked(launched: ptx.Module) -> None:
    with pytest.raises(ptx.PtxError, match="expected 2 arguments, got 1"):
        start(launched, "fused", torch.zeros(64))
    sizes = [size for _, size in launched.kernels["large_parameter"].parameters]
    assert sizes == [4016, 8]
    with pytest.raises(ptx.PtxError, match="expected 4016 bytes, got 12"):
        ptx.run(launched, "large_parameter", (1, 1, 1), (64, 1, 1), [bytes(12), 0], ptx.Memory())
    with pytest.raises(ptx.PtxError, match="no such kernel"):
        start(launched, "missing", torch.zeros(64))


# Launches through the real launcher.


class Launcher(NamedTuple):
    gpu: FakeGpu
    library: ctypes.CDLL


@pytest.fixture(scope="module")
def launchers(
    launched_text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Launcher, Launcher]:
    """Two, so that each must find its own runtime."""
    made = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("launcher")
        gpu = FakeGpu(folder)
        library = compile_shared(LAUNCHERS, "sm_90", folder / "kernels.so", gpu, "-fmad=false")
        made.append(Launcher(gpu, gpu.load(library, launched_text)))
    return made[0], made[1]


@pytest.fixture
def launcher(launchers: tuple[Launcher, Launcher]) -> Iterator[Launcher]:
    for each in launchers:
        each.gpu.reset()
    yield launchers[0]
    assert launchers[1].gpu.launches == []


def launch_fused(
    launcher: Launcher,
    values: torch.Tensor,
    out: torch.Tensor,
    blocks: int = 2,
    threads: int = 32,
    shared: int = 0,
    stream: int = 0x77,
) -> int:
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
    rest = (ctypes.c_int64(shared), ctypes.c_void_p(stream))
    return launcher.library.launch_fused(*pointers, blocks, threads, *rest)


@needs_nvcc
@needs_compiler
def test_launch_through_the_runtime(launcher: Launcher) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    launcher.gpu.memory.add_tensor(values, "values", writable=False)
    launcher.gpu.memory.add_tensor(out, "out")
    assert launch_fused(launcher, values, out, shared=256) == 0
    expected = (values.double() * 3 + 1).float()
    assert torch.equal(out, expected)
    (launch,) = launcher.gpu.launches
    assert launch.name == "fused"
    assert launch.grid == (2, 1, 1)
    assert launch.block == (32, 1, 1)
    assert launch.shared_bytes == 256
    assert launch.stream == 0x77
    assert launch.stats.executed["fma.rn.f32"] == 64


@needs_nvcc
@needs_compiler
def test_a_violation_is_an_error_of_the_launch(launcher: Launcher) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    launcher.gpu.memory.add_tensor(values[:63], "values", writable=False)
    launcher.gpu.memory.add_tensor(out, "out")
    assert launch_fused(launcher, values, out) == 700
    assert "out of bounds" in str(launcher.gpu.error)
    assert launcher.gpu.launches == []
    launcher.library.error_text.restype = ctypes.c_char_p
    assert launcher.library.error_text(700) == b"an illegal memory access was encountered"
    # The error was reported once; the next launch is judged by itself.
    launcher.gpu.reset()
    launcher.gpu.memory.add_tensor(values, "values", writable=False)
    launcher.gpu.memory.add_tensor(out, "out")
    assert launch_fused(launcher, values, out) == 0


@needs_nvcc
@needs_compiler
def test_a_failure_of_the_interpreter_is_no_success(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(ptx, "run", broken)
    assert launch_fused(launcher, torch.zeros(64), torch.zeros(64)) == 999
    assert isinstance(launcher.gpu.error, ptx.PtxError)
    assert isinstance(launcher.gpu.error.__cause__, KeyError)


@needs_nvcc
@needs_compiler
def test_invalid_configurations(launcher: Launcher) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    assert launch_fused(launcher, values, out, blocks=0) == 9
    assert launch_fused(launcher, values, out, threads=0) == 9
    assert launch_fused(launcher, values, out, threads=1025) == 9
    assert launch_fused(launcher, values, out, shared=48 * 1024 + 1) == 1
    pointer = ctypes.c_void_p(out.data_ptr())
    for shape in ((1, 65536, 1, 1, 1, 1), (1, 1, 65536, 1, 1, 1), (1, 1, 1, 1, 1, 65),
                  (1, 1, 1, 32, 33, 1), (1, 1, 1, 65536, 65536, 1)):  # fmt: skip
        assert launcher.library.launch_grid(pointer, *shape) == 9
    assert launcher.gpu.launches == []
    assert launcher.gpu.error is None


@needs_nvcc
@needs_compiler
def test_large_parameters(launcher: Launcher) -> None:
    """A structure of 4016 bytes by value, indexed at run time."""

    class Large(ctypes.Structure):
        _fields_ = (
            ("values", ctypes.c_float * 1000),
            ("scale", ctypes.c_int64),
            ("last", ctypes.c_char),
        )

    large = Large((ctypes.c_float * 1000)(*range(1000)), 3, b"\x05")
    out = torch.zeros(64)
    launcher.gpu.memory.add_tensor(out, "out")
    code = launcher.library.launch_large(
        ctypes.byref(large), ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(1)
    )
    assert (code, launcher.gpu.error) == (0, None)
    assert out.tolist() == [i * 37 % 1000 * 3.0 + 5.0 for i in range(64)]


@needs_nvcc
@needs_compiler
def test_without_an_interpreter_there_is_no_driver(tmp_path: Path, launched_text: str) -> None:
    gpu = FakeGpu(tmp_path)
    library = gpu.load(
        compile_shared(LAUNCHERS, "sm_90", tmp_path / "kernels.so", gpu), launched_text
    )
    gpu.disconnect()
    assert launch_fused(Launcher(gpu, library), torch.zeros(64), torch.zeros(64)) == 35


@needs_nvcc
@needs_compiler
def test_the_runtime_offers_what_launchers_need_and_no_more(
    launchers: tuple[Launcher, Launcher],
) -> None:
    """Nothing to allocate, copy or wait with: a launcher that did would not link."""
    runtime = symbols("--defined-only", launchers[0].gpu.library)
    assert runtime - {"stand_in_set_callback", "FASTDDIM_STAND_IN"} == {
        "__cudaGetKernel",
        "__cudaLaunchKernel",
        "__cudaPopCallConfiguration",
        "__cudaPushCallConfiguration",
        "__cudaRegisterFatBinary",
        "__cudaRegisterFatBinaryEnd",
        "__cudaRegisterFunction",
        "__cudaUnregisterFatBinary",
        "cudaGetErrorString",
        "cudaGetLastError",
    }


def symbols(which: str, library: Path) -> set[str]:
    lines = subprocess.run(
        ["nm", "-D", which, str(library)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}
