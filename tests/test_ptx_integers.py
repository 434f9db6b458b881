"""The interpreter of PTX: instructions on integers and bits, against Python's integers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from .support.gpuless import ptx
from .support.gpuless.statements import (
    HALVES_AND_WORDS,
    WORDS,
    combinations,
    evaluate,
    integers,
    numpy_name,
    wrapped,
)


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


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
