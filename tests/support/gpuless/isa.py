"""The effect of each PTX opcode, after NVIDIA's "PTX ISA" 9.0.

`decode` turns one instruction into a function that executes it for some threads of a wave. Every
part of the opcode has to be taken by the builder of its first part: what is left over is refused,
so that no suffix is ever ignored.

Left out on purpose, and refused: the approximate operations (`.approx`, `.full`), whose results the
ISA leaves to the hardware, and float additions and multiplications without `.rn`, which ptxas may
fuse. There is one exception: `rsqrt.approx.ftz.f32` gives, in turns, the numbers that the ISA's
bound on its error allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from . import exact
from .exact import SIGNED, UNSIGNED, Array
from .memory import PtxError

Lanes = np.ndarray | None
"""Indices of threads of a wave; None for all of them."""


class Wave(Protocol):
    """The threads that an instruction is executed for."""

    registers: list[Array]

    def count(self, lanes: Lanes) -> int: ...

    def load(
        self, space: str, address: Array, width: int, count: int, lanes: Lanes, coherent: bool
    ) -> np.ndarray: ...

    def store(self, space: str, address: Array, words: np.ndarray, lanes: Lanes) -> None: ...

    def add(self, address: Array, values: np.ndarray, lanes: Lanes) -> None:
        """Atomic additions in shared memory."""
        ...

    def warps(self, lanes: Lanes) -> np.ndarray:
        """`[warps, 32]`, or an error where some threads of a warp are missing."""
        ...


Step = Callable[[Wave, Lanes], None]
Reader = Callable[[Wave, Lanes], Array]
Writer = Callable[[Wave, Lanes, Array], None]


@dataclass(frozen=True)
class Register:
    index: int
    width: int  # bytes; 0 for a predicate


@dataclass(frozen=True)
class Variable:
    name: str
    space: str
    address: int
    size: int


class Scope(Protocol):
    def find(self, name: str) -> Register | Variable | None: ...


BASES = {"global": 0, "const": 0, "shared": 1 << 56, "local": 2 << 56, "param": 3 << 56}
"""The spaces in generic addresses; host addresses are below 2^48."""

DTYPES = {
    **{f"{kind}{8 * size}": np.dtype(t) for kind in "bu" for size, t in UNSIGNED.items()},
    **{f"s{8 * size}": np.dtype(t) for size, t in SIGNED.items()},
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f32x2": np.dtype(np.uint64),
    "pred": np.dtype(np.bool_),
}
_INTEGERS = {name for name in DTYPES if name[0] in "bus" and name[1].isdigit() and name[1:] != "8"}
_HALVES = ("f16", "bf16")


@dataclass
class Instruction:
    """One statement, taken apart by the builder of its opcode."""

    text: str
    opcode: str
    operands: list[str]
    scope: Scope
    suffixes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.base, *self.suffixes = self.opcode.split(".")

    def flag(self, name: str) -> bool:
        found = name in self.suffixes
        if found:
            self.suffixes.remove(name)
        return found

    def one_of(self, *names: str) -> str | None:
        found = [name for name in names if name in self.suffixes]
        if len(found) > 1:
            raise PtxError(f"suffixes that exclude each other: {found}")
        return found[0] if found and self.flag(found[0]) else None

    def required(self, *names: str) -> str:
        name = self.one_of(*names)
        if name is None:
            raise PtxError(f"expected one of the suffixes {list(names)}")
        return name

    def type(self, *allowed: str) -> str:
        """The last suffix, a type."""
        if not self.suffixes or self.suffixes[-1] not in (allowed or DTYPES):
            raise PtxError("unsupported type")
        return self.suffixes.pop()

    def arity(self, *counts: int) -> None:
        if len(self.operands) not in counts:
            raise PtxError(f"expected {counts} operands, got {len(self.operands)}")

    def complete(self) -> None:
        if self.suffixes:
            raise PtxError(f"unsupported suffixes {self.suffixes}")

    def reader(self, operand: str, type: str, wider: bool = False) -> Reader:
        return reader(self.scope, operand, DTYPES[type], wider)

    def writer(self, operand: str, type: str, wider: bool = False) -> Writer:
        return writer(self.scope, operand, DTYPES[type], wider)

    def elementwise(
        self, result: str, sources: Sequence[str], compute: Callable[..., Array]
    ) -> Step:
        """`compute` on the operands after the first, read as `sources`, into the first."""
        self.arity(1 + len(sources))
        write = self.writer(self.operands[0], result)
        reads = [self.reader(o, t) for o, t in zip(self.operands[1:], sources, strict=True)]
        return applied(write, reads, compute)


def applied(write: Writer, reads: Sequence[Reader], compute: Callable[..., Array]) -> Step:
    def step(wave: Wave, lanes: Lanes) -> None:
        write(wave, lanes, compute(*[read(wave, lanes) for read in reads]))

    return step


_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9]\d*)U?")
_FLOAT_BITS = re.compile(r"0([fF])([0-9a-fA-F]{8})|0([dD])([0-9a-fA-F]{16})")
_DECIMAL = re.compile(r"-?\d+\.\d*(?:[eE][+-]?\d+)?")
_OFFSET = re.compile(r"\s*([\w$%.]+)\s*(?:([+-])\s*([+-]?\w+))?\s*")


def integer(text: str) -> int | None:
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    sign, digits = match.groups()
    octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
    value = int(digits, 8 if octal else 0)
    return -value if sign else value


def immediate(text: str, dtype: np.dtype) -> Array | None:
    """The value of a literal as a scalar of this dtype; None for other text."""
    size = dtype.itemsize
    match = _FLOAT_BITS.fullmatch(text)
    if match:
        digits = match[2] or match[4]
        if len(digits) != 2 * size:
            raise PtxError(f"expected a literal of {size} bytes, got {text}")
        return UNSIGNED[size](int(digits, 16)).view(dtype)
    if dtype.kind == "f":
        return dtype.type(float(text)) if _DECIMAL.fullmatch(text) else None
    value = integer(text)
    if value is None:
        return None
    if dtype == np.bool_:
        return np.bool_(value)
    if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
        raise PtxError(f"expected a literal of {size} bytes, got {text}")
    return UNSIGNED[size](value % (1 << 8 * size)).view(dtype)


def reader(scope: Scope, operand: str, dtype: np.dtype, wider: bool = False) -> Reader:
    """A register or constant as `dtype`; a wider register is cut where that is allowed."""
    match = _OFFSET.fullmatch(operand)
    found = scope.find(match[1]) if match else None
    if isinstance(found, Register) and match[2] is None:
        return _register_reader(found, dtype, wider)
    if isinstance(found, Variable):
        value = UNSIGNED[dtype.itemsize](found.address + _displacement(match)).view(dtype)
    else:
        value = immediate(operand, dtype)
    if value is None:
        raise PtxError(f"unknown operand {operand}")
    return lambda wave, lanes: value


def _displacement(match: re.Match[str]) -> int:
    if match[2] is None:
        return 0
    value = integer(match[3].lstrip("+"))
    if value is None:
        raise PtxError(f"unknown offset {match[3]}")
    return -value if match[2] == "-" else value


def _register_reader(register: Register, dtype: np.dtype, wider: bool) -> Reader:
    index = register.index
    if (register.width == 0) != (dtype == np.bool_):
        raise PtxError("a predicate where a value is expected, or the reverse")
    if register.width in (0, dtype.itemsize):

        def read(wave: Wave, lanes: Lanes) -> Array:
            value = wave.registers[index]
            return (value if lanes is None or not value.ndim else value[lanes]).view(dtype)

        return read
    if not wider or register.width < dtype.itemsize:
        raise PtxError(f"a register of {register.width} bytes as {dtype.itemsize}")
    low = UNSIGNED[dtype.itemsize]

    def read_low(wave: Wave, lanes: Lanes) -> Array:
        value = wave.registers[index]
        value = value if lanes is None or not value.ndim else value[lanes]
        return value.astype(low).view(dtype)

    return read_low


def writer(scope: Scope, operand: str, dtype: np.dtype, wider: bool = False) -> Writer:
    """A writer into a register; a wider register is filled by extension if that is allowed."""
    if operand == "_":
        return lambda wave, lanes, value: None
    register = scope.find(operand)
    if not isinstance(register, Register):
        raise PtxError(f"expected a register, got {operand}")
    if (register.width == 0) != (dtype == np.bool_):
        raise PtxError("a predicate where a value is expected, or the reverse")
    size = register.width or 1
    if size != dtype.itemsize and not (wider and size > dtype.itemsize):
        raise PtxError(f"a register of {size} bytes for {dtype.itemsize}")
    storage = UNSIGNED[size] if register.width else np.bool_
    index, narrow = register.index, size != dtype.itemsize
    if narrow and dtype.kind == "f":
        raise PtxError(f"a register of {size} bytes for a float of {dtype.itemsize}")

    def write(wave: Wave, lanes: Lanes, value: Array) -> None:
        if value.dtype.itemsize != dtype.itemsize:
            raise AssertionError(f"{value.dtype} computed where {dtype} is written")
        value = value.view(dtype)
        put(wave, index, lanes, value.astype(storage) if narrow else value.view(storage))

    return write


def put(wave: Wave, index: int, lanes: Lanes, value: Array) -> None:
    """Puts values into registers. An array is never changed in place, so that registers may share
    arrays.
    """
    if lanes is not None:
        before = wave.registers[index]
        after = before.copy() if before.ndim else np.full(wave.count(None), before)
        after[lanes] = value
        value = after
    wave.registers[index] = value


Builder = Callable[[Instruction], Step]
BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def decode(text: str, opcode: str, operands: list[str], scope: Scope) -> Step:
    instruction = Instruction(text, opcode, operands, scope)
    builder = BUILDERS.get(instruction.base)
    if builder is None:
        raise PtxError(f"unsupported opcode {instruction.base}")
    step = builder(instruction)
    instruction.complete()
    return step


# Arithmetic.


@opcode("add", "sub", "mul", "fma")
def _arithmetic(i: Instruction) -> Step:
    type = i.type(*_INTEGERS, "f32", "f64", "f32x2", *_HALVES)
    if type in _HALVES:
        return _mixed_arithmetic(i, type)
    if type[0] != "f":
        return _integer_arithmetic(i, type)
    if not i.flag("rn"):
        raise PtxError("without .rn ptxas may fuse it: compile with contraction turned off")
    compute = _float_function(i, type)
    if type == "f32x2":
        compute = _pairwise(compute)
    return i.elementwise(type, [type] * (3 if i.base == "fma" else 2), compute)


_FLOAT_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda x: x.dtype.type(1) / x,
    "neg": np.negative,
    "abs": np.abs,
}


def _float_function(i: Instruction, type: str) -> Callable[..., Array]:
    if i.base == "fma":
        function = exact.fma64 if type == "f64" else exact.fma32
    else:
        function = _FLOAT_FUNCTIONS[i.base]
    return _with_flags(i, type, function)


def _with_flags(i: Instruction, type: str, function: Callable[..., Array]) -> Callable[..., Array]:
    """Takes `.ftz` and `.sat` into account, which only float32 has."""
    if type == "f64":
        return function
    flush, saturate = i.flag("ftz"), i.flag("sat")
    if not flush and not saturate:
        return function

    def compute(*sources: Array) -> Array:
        result = function(*(exact.flushed(s) if flush else s for s in sources))
        result = exact.flushed(result) if flush else result
        return exact.saturated(result) if saturate else result

    return compute


def _pairwise(function: Callable[..., Array]) -> Callable[..., Array]:
    def compute(*sources: Array) -> Array:
        halves = zip(*(_split(s, 4, 2) for s in sources), strict=True)
        return _joined([function(*(h.view(np.float32) for h in half)) for half in halves], 8)

    return compute


def _split(value: Array, width: int, count: int) -> list[Array]:
    """The parts of a word, lowest first."""
    word = value.dtype.type
    return [(value >> word(8 * width * i)).astype(UNSIGNED[width]) for i in range(count)]


def _joined(parts: Sequence[Array], size: int) -> Array:
    word = UNSIGNED[size]
    total = word(0)
    for i, part in enumerate(parts):
        width = part.dtype.itemsize
        total = total | (part.view(UNSIGNED[width]).astype(word) << word(8 * width * i))
    return total


def _mixed_arithmetic(i: Instruction, half: str) -> Step:
    """`add.rn.f32.bf16 d, a, c`: the first operands are halves, the last one float32."""
    i.type("f32")
    i.required("rn")
    if i.base == "mul":
        raise PtxError("unsupported type")
    halves = 2 if i.base == "fma" else 1
    function = _float_function(i, "f32")

    def compute(*sources: Array) -> Array:
        return function(*(exact.widened(s, half) for s in sources[:halves]), sources[halves])

    return i.elementwise("f32", [half] * halves + ["f32"], compute)


def _integer_arithmetic(i: Instruction, type: str) -> Step:
    if i.base == "fma" or type[0] == "b":
        raise PtxError("unsupported type")
    if i.base == "mul":
        part = i.required("lo", "hi", "wide")
        return i.elementwise(_product_type(type, part), [type] * 2, _product(type, part))
    if i.flag("cc"):
        return _carrying(i, type, i.base, carry_in=False, carry_out=True)
    return i.elementwise(type, [type] * 2, _FLOAT_FUNCTIONS[i.base])


@opcode("addc", "subc")
def _add_with_carry(i: Instruction) -> Step:
    type = i.type("u32", "s32", "u64", "s64")
    return _carrying(i, type, i.base[:3], carry_in=True, carry_out=i.flag("cc"))


@opcode("mad", "madc")
def _multiply_add(i: Instruction) -> Step:
    type = i.type("u16", "s16", "u32", "s32", "u64", "s64")
    part = i.required("lo", "hi", "wide")
    result = _product_type(type, part)
    product = _product(type, part)
    carry_in, carry_out = i.base == "madc", i.flag("cc")
    if not carry_in and not carry_out:
        compute = lambda a, b, c: product(a, b) + c  # noqa: E731
        return i.elementwise(result, [type, type, result], compute)
    if part == "wide" or result[1:] == "16":
        raise PtxError("unsupported type")
    return _carrying(i, type, "add", carry_in, carry_out, product)


CARRY = 0
"""The register that holds the carry flag."""


def _carrying(
    i: Instruction,
    type: str,
    base: str,
    carry_in: bool,
    carry_out: bool,
    product: Callable[[Array, Array], Array] | None = None,
) -> Step:
    """Addition or subtraction with the carry flag, of a product if there is one."""
    i.arity(4 if product else 3)
    word = "u" + type[1:]
    write = i.writer(i.operands[0], word)
    reads = [i.reader(o, type) for o in i.operands[1:]]
    read_carry = _register_reader(Register(CARRY, 0), np.dtype(np.bool_), False)

    def step(wave: Wave, lanes: Lanes) -> None:
        sources = [read(wave, lanes) for read in reads]
        if product:
            sources = [product(*sources[:2]), sources[2]]
        a, b = (s.view(DTYPES[word]) for s in sources)
        carry = read_carry(wave, lanes) if carry_in else np.bool_(False)
        result, carried = _sum(a, b, carry) if base == "add" else _difference(a, b, carry)
        write(wave, lanes, result)
        if carry_out:
            put(wave, CARRY, lanes, carried)

    return step


def _sum(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    partial = a + b
    total = partial + carry.astype(a.dtype)
    return total, (partial < a) | (total < partial)


def _difference(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    partial = a - b
    return partial - borrow.astype(a.dtype), (a < b) | (borrow & (partial == 0))


def _product_type(type: str, part: str) -> str:
    wide = type[0] + str(2 * int(type[1:])) if part == "wide" else type
    if wide not in DTYPES:
        raise PtxError("unsupported type")
    return wide


def _product(type: str, part: str) -> Callable[[Array, Array], Array]:
    if part == "lo":
        return np.multiply
    if part == "hi":
        return exact.multiply_high
    wide = DTYPES[_product_type(type, part)]
    return lambda a, b: a.astype(wide) * b.astype(wide)


@opcode("div", "rem")
def _divide(i: Instruction) -> Step:
    type = i.type("u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64")
    if type[0] == "f":
        if i.base == "rem":
            raise PtxError("unsupported type")
        return _rounded(i, type, 2)

    def compute(a: Array, b: Array) -> Array:
        if (b == 0).any():
            raise PtxError("integer division by zero")
        q = exact.quotient(a, b)
        return q if i.base == "div" else a - q * b

    return i.elementwise(type, [type] * 2, compute)


@opcode("sqrt", "rcp")
def _unary_rounded(i: Instruction) -> Step:
    return _rounded(i, i.type("f32", "f64"), 1)


def _rounded(i: Instruction, type: str, sources: int) -> Step:
    i.required("rn")
    return i.elementwise(type, [type] * sources, _float_function(i, type))


_RSQRT_ERROR = 2.0**-22.9


@opcode("rsqrt")
def _reciprocal_root(i: Instruction) -> Step:
    type = i.type("f32")
    i.required("approx")
    if not i.flag("ftz"):
        raise PtxError("unsupported without .ftz")

    def compute(a: Array) -> Array:
        exact_root = 1 / np.sqrt(exact.flushed(a).astype(np.float64))
        nearest = exact_root.astype(np.float32)
        # As hardware does, the same for the same significand and parity of the exponent.
        step = (nearest.view(np.int32) & 0x7FFFFF) % 5 - 2
        moved = (nearest.view(np.int32) + step.astype(np.int32)).view(np.float32)
        error = np.abs(moved / exact_root - 1)
        return np.where(error <= _RSQRT_ERROR, moved, nearest)

    return i.elementwise(type, [type], compute)


@opcode("neg", "abs")
def _sign(i: Instruction) -> Step:
    type = i.type("s16", "s32", "s64", "f32", "f64")
    function = _FLOAT_FUNCTIONS[i.base]
    if type[0] == "f":
        function = _with_flags(i, type, function)
    return i.elementwise(type, [type], function)


@opcode("copysign")
def _copysign(i: Instruction) -> Step:
    type = i.type("f32", "f64")
    return i.elementwise(type, [type] * 2, lambda sign, value: np.copysign(value, sign))


@opcode("min", "max")
def _extremum(i: Instruction) -> Step:
    type = i.type("u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64")
    if type[0] != "f":
        return i.elementwise(type, [type] * 2, {"min": np.minimum, "max": np.maximum}[i.base])
    function = {"min": exact.minimum, "max": exact.maximum}[i.base]
    if i.flag("NaN"):
        function = exact.propagating(function)
    if i.flag("xorsign"):
        i.required("abs")
        return i.elementwise(type, [type] * 2, _with_flags(i, type, _xorsign(function)))
    i.arity(3, 4)
    several = lambda a, b, *c: function(function(a, b), *c) if c else function(a, b)  # noqa: E731
    return i.elementwise(type, [type] * (len(i.operands) - 1), _with_flags(i, type, several))


def _xorsign(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def compute(a: Array, b: Array) -> Array:
        magnitude = function(np.abs(a), np.abs(b))
        negative = np.signbit(a) ^ np.signbit(b)
        return np.where(negative, -magnitude, magnitude)

    return compute


# Bits.


@opcode("and", "or", "xor")
def _bitwise(i: Instruction) -> Step:
    type = i.type("pred", "b16", "b32", "b64")
    names = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return i.elementwise(type, [type] * 2, names[i.base])


@opcode("not")
def _not(i: Instruction) -> Step:
    type = i.type("pred", "b16", "b32", "b64")
    return i.elementwise(type, [type], np.invert)


@opcode("shl", "shr")
def _shift(i: Instruction) -> Step:
    kinds = "b" if i.base == "shl" else "bus"
    type = i.type(*(k + w for k in kinds for w in ("16", "32", "64")))
    dtype = DTYPES[type]
    bits = 8 * dtype.itemsize
    shift = np.left_shift if i.base == "shl" else np.right_shift

    def compute(value: Array, amount: Array) -> Array:
        inside = np.minimum(amount, np.uint32(bits - 1)).astype(dtype)
        beyond = value >> dtype.type(bits - 1) if dtype.kind == "i" else dtype.type(0)
        return np.where(amount < bits, shift(value, inside), beyond)

    return i.elementwise(type, [type, "u32"], compute)


@opcode("shf")
def _funnel_shift(i: Instruction) -> Step:
    i.type("b32")
    left = i.required("l", "r") == "l"
    wrap = i.required("wrap", "clamp") == "wrap"

    def compute(low: Array, high: Array, amount: Array) -> Array:
        amount = amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))
        word = _joined([low, high], 8)
        shift = amount.astype(np.uint64)
        moved = (word << shift) >> np.uint64(32) if left else word >> shift
        return moved.astype(np.uint32)

    return i.elementwise("b32", ["b32", "b32", "u32"], compute)


@opcode("prmt")
def _permute(i: Instruction) -> Step:
    i.type("b32")

    def compute(a: Array, b: Array, selector: Array) -> Array:
        word = _joined([a, b], 8)
        result = np.uint32(0)
        for place in range(4):
            choice = (selector >> np.uint32(4 * place)) & np.uint32(15)
            shift = (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            octet = ((word >> shift) & np.uint64(255)).astype(np.uint32)
            sign = np.where(octet >> np.uint32(7) == 1, np.uint32(255), np.uint32(0))
            octet = np.where(choice & np.uint32(8) != 0, sign, octet)
            result = result | (octet << np.uint32(8 * place))
        return result

    return i.elementwise("b32", ["b32"] * 3, compute)


@opcode("lop3")
def _logic3(i: Instruction) -> Step:
    i.type("b32")
    i.arity(5)
    table = integer(i.operands.pop())
    if table is None or not 0 <= table < 256:
        raise PtxError("expected a table of 8 bits")

    def compute(a: Array, b: Array, c: Array) -> Array:
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                chosen = a if row & 4 else ~a
                chosen = chosen & (b if row & 2 else ~b)
                result = result | (chosen & (c if row & 1 else ~c))
        return np.asarray(result)[()] if np.ndim(result) == 0 else result

    return i.elementwise("b32", ["b32"] * 3, compute)


@opcode("bfe")
def _extract(i: Instruction) -> Step:
    type = i.type("u32", "s32", "u64", "s64")
    bits = int(type[1:])
    dtype = DTYPES[type]

    def compute(value: Array, start: Array, length: Array) -> Array:
        # Fields that reach beyond the word hold its sign there; one word more gives room.
        start, length = (np.minimum(v & np.uint32(255), np.uint32(bits)) for v in (start, length))
        shift = np.minimum(start, np.uint32(bits - 1)).astype(dtype)
        beyond = value >> dtype.type(bits - 1) if dtype.kind == "i" else dtype.type(0)
        field = np.where(start < bits, value >> shift, beyond)
        spare = np.minimum(np.uint32(bits) - length, np.uint32(bits - 1)).astype(dtype)
        return np.where(length == 0, dtype.type(0), (field << spare) >> spare)

    return i.elementwise(type, [type, "u32", "u32"], compute)


@opcode("bfi")
def _insert(i: Instruction) -> Step:
    type = i.type("b32", "b64")
    bits = int(type[1:])
    dtype = DTYPES[type]

    def compute(field: Array, value: Array, start: Array, length: Array) -> Array:
        start, length = (np.minimum(v & np.uint32(255), np.uint32(bits)) for v in (start, length))
        spare = np.minimum(np.uint32(bits) - length, np.uint32(bits - 1)).astype(dtype)
        ones = np.where(length == 0, dtype.type(0), np.invert(dtype.type(0)) >> spare)
        shift = np.minimum(start, np.uint32(bits - 1)).astype(dtype)
        mask = np.where(start < bits, ones << shift, dtype.type(0))
        return (value & ~mask) | ((field << shift) & mask)

    return i.elementwise(type, [type, type, "u32", "u32"], compute)


# Comparison and selection.

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINATIONS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _comparison(i: Instruction, type: str) -> Callable[[Array, Array], Array]:
    if type[0] == "f":
        return _float_comparison(i, type)
    if type[0] == "b":
        return _COMPARISONS[i.required("eq", "ne")]
    if type[0] == "u":
        name = i.required(*_COMPARISONS, *_UNSIGNED_COMPARISONS)
        return _COMPARISONS[_UNSIGNED_COMPARISONS.get(name, name)]
    return _COMPARISONS[i.required(*_COMPARISONS)]


def _float_comparison(i: Instruction, type: str) -> Callable[[Array, Array], Array]:
    name = i.required(*_COMPARISONS, *(n + "u" for n in _COMPARISONS), "num", "nan")
    flush = type == "f32" and i.flag("ftz")
    compare = _COMPARISONS.get(name[:2])

    def compute(a: Array, b: Array) -> Array:
        if flush:
            a, b = exact.flushed(a), exact.flushed(b)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        return compare(a, b) | unordered if name[2:] else compare(a, b) & ~unordered

    return compute


@opcode("setp")
def _set_predicate(i: Instruction) -> Step:
    type = i.type(*_INTEGERS, "f32", "f64")
    compare = _comparison(i, type)
    combination = i.one_of(*_COMBINATIONS)
    i.arity(4 if combination else 3)
    writes = [i.writer(name.strip(), "pred") for name in i.operands[0].split("|")]
    if len(writes) > 2:
        raise PtxError("expected one or two predicates")
    reads = [i.reader(o, type) for o in i.operands[1:3]]
    read_third = _predicate_reader(i, i.operands[3]) if combination else None

    def step(wave: Wave, lanes: Lanes) -> None:
        result = compare(*[read(wave, lanes) for read in reads])
        outcomes = [result, ~result][: len(writes)]
        if read_third:
            third = read_third(wave, lanes)
            outcomes = [_COMBINATIONS[combination](o, third) for o in outcomes]
        for write, outcome in zip(writes, outcomes, strict=True):
            write(wave, lanes, outcome)

    return step


def _predicate_reader(i: Instruction, operand: str) -> Reader:
    if not operand.startswith("!"):
        return i.reader(operand, "pred")
    read = i.reader(operand[1:], "pred")
    return lambda wave, lanes: ~read(wave, lanes)


@opcode("selp")
def _select(i: Instruction) -> Step:
    type = i.type(*_INTEGERS, "f32", "f64")
    return i.elementwise(type, [type, type, "pred"], lambda a, b, p: np.where(p, a, b))


# Conversion and movement.


@opcode("cvt")
def _convert(i: Instruction) -> Step:
    source = i.type(*_INTEGERS, "u8", "s8", "f32", "f64", *_HALVES)
    result = i.type(*_INTEGERS, "u8", "s8", "f32", "f64", *_HALVES, "f16x2", "bf16x2")
    if "b" in (source[0] + result[0]) and not {source, result} & {"bf16", "bf16x2"}:
        raise PtxError("unsupported type")
    if result in ("f16x2", "bf16x2"):
        return _convert_pair(i, result, source)
    i.arity(2)
    compute = _conversion(i, result, source)
    write = i.writer(i.operands[0], result, wider=True)
    return applied(write, [i.reader(i.operands[1], source, wider=True)], compute)


def _convert_pair(i: Instruction, result: str, source: str) -> Step:
    """`cvt.rn.bf16x2.f32 d, a, b`: a goes into the upper half."""
    i.required("rn")
    if source != "f32":
        raise PtxError("unsupported type")
    flush = i.flag("ftz")

    def compute(high: Array, low: Array) -> Array:
        halves = (exact.flushed(v) if flush else v for v in (low, high))
        return _joined([exact.narrowed(v, result[:-2]) for v in halves], 4)

    return i.elementwise(result, ["f32", "f32"], compute)


def _conversion(i: Instruction, result: str, source: str) -> Callable[[Array], Array]:
    dtype = DTYPES[result]
    if _is_float(source) and not _is_float(result):
        mode = i.required(*exact.INTEGRAL)
        flush = source == "f32" and i.flag("ftz")
        widen = source in _HALVES

        def compute(x: Array) -> Array:
            x = exact.widened(x, source) if widen else x
            return exact.to_integer(exact.flushed(x) if flush else x, mode, dtype)

        return compute
    if not _is_float(source):
        if not _is_float(result):
            return lambda x: x.astype(dtype)
        if result in _HALVES:
            raise PtxError("unsupported type")
        i.required("rn")
        return lambda x: x.astype(dtype)
    return _float_conversion(i, result, source)


def _is_float(type: str) -> bool:
    return type[0] == "f" or type == "bf16"


def _float_conversion(i: Instruction, result: str, source: str) -> Callable[[Array], Array]:
    if source in _HALVES and result in _HALVES:
        raise PtxError("unsupported type")
    flush = "f32" in (source, result) and i.flag("ftz")
    saturate = result in ("f32", "f64") and i.flag("sat")
    integral = i.one_of(*exact.INTEGRAL) if source == result else None
    if DTYPES[result].itemsize < DTYPES[source].itemsize:
        i.required("rn")

    def compute(x: Array) -> Array:
        x = exact.widened(x, source) if source in _HALVES else x
        x = exact.flushed(x) if flush and source == "f32" else x
        x = exact.INTEGRAL[integral](x) if integral else x
        if result in _HALVES:
            return exact.narrowed(x, result)
        x = x.astype(DTYPES[result])
        x = exact.flushed(x) if flush and result == "f32" else x
        return exact.saturated(x) if saturate else x

    return compute


def _vector(operand: str) -> list[str] | None:
    if not operand.startswith("{"):
        return None
    return [part.strip() for part in operand.strip("{} \t\n").split(",")]


@opcode("mov")
def _move(i: Instruction) -> Step:
    type = i.type("pred", *_INTEGERS, "f32", "f64")
    i.arity(2)
    target, source = i.operands
    parts = _vector(target) or _vector(source)
    if parts is None:
        return i.elementwise(type, [type], lambda x: x)
    size = DTYPES[type].itemsize
    width, rest = divmod(size, len(parts))
    if type[0] != "b" or rest or width not in UNSIGNED:
        raise PtxError("unsupported vector")
    part = f"b{8 * width}"
    if _vector(source):
        reads = [i.reader(p, part) for p in parts]
        return applied(i.writer(target, type), reads, lambda *v: _joined(v, size))
    read = i.reader(source, type)
    writes = [i.writer(p, part) for p in parts]

    def step(wave: Wave, lanes: Lanes) -> None:
        values = _split(read(wave, lanes), width, len(writes))
        for write, value in zip(writes, values, strict=True):
            write(wave, lanes, value)

    return step


@opcode("cvta")
def _convert_address(i: Instruction) -> Step:
    i.type("u64")
    to, space = i.flag("to"), i.required(*BASES)
    base = np.uint64(BASES[space])
    return i.elementwise("u64", ["u64"], (lambda x: x - base) if to else (lambda x: x + base))


@opcode("createpolicy")
def _create_policy(i: Instruction) -> Step:
    """Ignores cache policies, which only steer caches."""
    i.type("b64")
    i.required("fractional")
    i.required("L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::evict_unchanged")
    i.arity(2, 3)
    if any(immediate(o, DTYPES["f32"]) is None for o in i.operands[1:]):
        raise PtxError("expected a fraction")
    write = i.writer(i.operands[0], "b64")
    return lambda wave, lanes: write(wave, lanes, np.uint64(0))


# Exchange within warps.

WARP = 32


@opcode("shfl")
def _shuffle(i: Instruction) -> Step:
    i.type("b32")
    i.required("sync")
    mode = i.required("idx", "bfly", "up", "down")
    i.arity(5)
    writes = [
        i.writer(name.strip(), type)
        for name, type in zip(i.operands[0].split("|"), ("b32", "pred"), strict=False)
    ]
    reads = [i.reader(o, "u32") for o in i.operands[1:4]]
    read_mask = i.reader(i.operands[4], "u32")

    def step(wave: Wave, lanes: Lanes) -> None:
        _require_all_members(read_mask(wave, lanes))
        warps = wave.warps(lanes)
        value, b, c = (
            np.broadcast_to(read(wave, lanes), warps.size).reshape(warps.shape) for read in reads
        )
        source, inside = _shuffled(mode, b.astype(np.int64), c.astype(np.int64))
        result = np.take_along_axis(value, source, axis=1)
        for write, outcome in zip(writes, (result, inside), strict=False):
            write(wave, lanes, outcome.reshape(-1))

    return step


def _require_all_members(mask: Array) -> None:
    if (mask != np.uint32(2**32 - 1)).any():
        raise PtxError("expected all threads of the warp to take part")


def _shuffled(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the lane each lane reads, whether that lies in its segment), as in the ISA's pseudocode."""
    lane = np.broadcast_to(np.arange(WARP), b.shape)
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    last = (lane & segment) | (clamp & ~segment)
    source = {
        "idx": (lane & segment) | (b & ~segment),
        "bfly": lane ^ b,
        "up": lane - b,
        "down": lane + b,
    }[mode]
    inside = source >= last if mode == "up" else source <= last
    return np.where(inside, source, lane), inside


@opcode("redux")
def _reduce(i: Instruction) -> Step:
    type = i.type("u32", "s32")
    i.required("sync")
    extremum = {"min": np.min, "max": np.max}[i.required("min", "max")]
    i.arity(3)
    write, read = i.writer(i.operands[0], type), i.reader(i.operands[1], type)
    read_mask = i.reader(i.operands[2], "u32")

    def step(wave: Wave, lanes: Lanes) -> None:
        _require_all_members(read_mask(wave, lanes))
        warps = wave.warps(lanes)
        values = np.broadcast_to(read(wave, lanes), warps.size).reshape(warps.shape)
        write(wave, lanes, np.repeat(extremum(values, axis=1), WARP))

    return step


@opcode("ldmatrix", "stmatrix")
def _matrices(i: Instruction) -> Step:
    """8x8 matrices of 16 bits: a lane holds two elements of each, and the address of one row."""
    i.type("b16")
    for name in ("sync", "aligned", "m8n8"):
        i.required(name)
    count = int(i.required("x1", "x2", "x4")[1:])
    transposed = i.flag("trans")
    i.required("shared", "shared::cta")
    i.arity(2)
    place, value = i.operands if i.base == "stmatrix" else reversed(i.operands)
    parts = _vector(value) or [value]
    if len(parts) != count:
        raise PtxError(f"expected {count} registers, got {len(parts)}")
    _, address = _address(i, place, "shared", 16)
    build = _store_matrices if i.base == "stmatrix" else _load_matrices
    return build(i, address, parts, transposed)


def _rows(wave: Wave, lanes: Lanes, address: Reader, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(lanes that name a row, addresses of these rows), row by row of matrix by matrix."""
    warps = wave.warps(lanes)
    addresses = np.broadcast_to(address(wave, lanes), warps.size).reshape(warps.shape)
    return warps[:, : 8 * count].reshape(-1), addresses[:, : 8 * count].reshape(-1)


def _load_matrices(i: Instruction, address: Reader, parts: list[str], transposed: bool) -> Step:
    writes = [i.writer(p, "b32") for p in parts]

    def step(wave: Wave, lanes: Lanes) -> None:
        rows, addresses = _rows(wave, lanes, address, len(writes))
        words = wave.load("shared", addresses, 2, 8, rows, True).reshape(-1, len(writes), 8, 8)
        if transposed:
            words = words.swapaxes(2, 3)
        for place, write in enumerate(writes):
            write(wave, lanes, np.ascontiguousarray(words[:, place]).view(np.uint32).reshape(-1))

    return step


def _store_matrices(i: Instruction, address: Reader, parts: list[str], transposed: bool) -> Step:
    reads = [i.reader(p, "b32") for p in parts]

    def step(wave: Wave, lanes: Lanes) -> None:
        rows, addresses = _rows(wave, lanes, address, len(reads))
        held = [np.broadcast_to(read(wave, lanes), wave.count(lanes)) for read in reads]
        words = np.stack([v.reshape(-1, WARP) for v in held], axis=1).view(np.uint16)
        words = words.reshape(-1, len(reads), 8, 8)
        if transposed:
            words = words.swapaxes(2, 3)
        wave.store("shared", addresses, np.ascontiguousarray(words).reshape(-1, 8), rows)

    return step


# Memory.

_SPACES = ("param", "global", "shared", "local", "const")
_LEVELS_1 = [f"L1::{s}" for s in ("evict_normal", "evict_first", "evict_last", "no_allocate")]
_LEVELS_1 += ["L1::evict_unchanged"]
_LEVELS_2 = [f"L2::{s}" for s in ("evict_normal", "evict_first", "evict_last")]
_PREFETCHES = ["L2::64B", "L2::128B", "L2::256B"]
_LOAD_CACHES, _STORE_CACHES = ("ca", "cg", "cs", "lu", "cv"), ("wb", "cg", "cs", "wt")


@opcode("ld", "st")
def _access(i: Instruction) -> Step:
    type = i.type(*_INTEGERS, "b8", "u8", "s8", "f32", "f64")
    space = i.one_of(*_SPACES) or "generic"
    if i.flag("shared::cta"):
        space = "shared"
    coherent = not (i.base == "ld" and space == "global" and i.flag("nc"))
    count = int((i.one_of("v2", "v4", "v8") or "v1")[1:])
    if count * DTYPES[type].itemsize > 32:
        raise PtxError("unsupported vector")
    policy = _cache_hints(i)
    i.arity(3 if policy else 2)
    if policy:
        i.reader(i.operands.pop(), "b64")
    place, value = i.operands if i.base == "st" else reversed(i.operands)
    parts = _vector(value) or [value]
    if len(parts) != count:
        raise PtxError(f"expected {count} registers, got {len(parts)}")
    space, address = _address(i, place, space, count * DTYPES[type].itemsize)
    if i.base == "st":
        if space in ("param", "const"):
            raise PtxError(f"store into {space} memory")
        return _store(i, type, space, address, parts)
    return _load(i, type, space, address, parts, coherent)


@opcode("atom", "red")
def _atomic(i: Instruction) -> Step:
    """Integer additions in shared memory, whose sum depends on no order.

    The number from before the addition does, so its register is poisoned.
    """
    type = i.type("u32", "u64")
    i.required("shared", "shared::cta")
    i.required("add")
    returns = i.base == "atom"
    i.arity(3 if returns else 2)
    *result, place, value = i.operands
    _, address = _address(i, place, "shared", DTYPES[type].itemsize)
    read = i.reader(value, type)
    writes = [i.writer(name, type) for name in result]
    poison = DTYPES[type].type(-1 % (1 << 8 * DTYPES[type].itemsize))

    def step(wave: Wave, lanes: Lanes) -> None:
        values = np.broadcast_to(read(wave, lanes), wave.count(lanes))
        wave.add(address(wave, lanes), values, lanes)
        for write in writes:
            write(wave, lanes, poison)

    return step


def _cache_hints(i: Instruction) -> bool:
    """Takes the operands that only steer caches; true if a cache policy is among them."""
    i.flag("volatile")
    i.one_of(*(_LOAD_CACHES if i.base == "ld" else _STORE_CACHES))
    i.one_of(*_LEVELS_1)
    i.one_of(*_LEVELS_2)
    i.one_of(*_PREFETCHES)
    return i.flag("L2::cache_hint")


def _address(i: Instruction, place: str, space: str, size: int) -> tuple[str, Reader]:
    """The space, which the name of a variable may tell, and the address in it."""
    match = _OFFSET.fullmatch(place[1:-1]) if place[:1] + place[-1:] == "[]" else None
    if match is None:
        raise PtxError(f"expected an address, got {place}")
    found = i.scope.find(match[1])
    offset = _displacement(match)
    if isinstance(found, Register):
        base = _register_reader(found, DTYPES["u32" if found.width == 4 else "u64"], False)
        step = np.uint64(offset % 2**64)
        return space, lambda wave, lanes: base(wave, lanes).astype(np.uint64) + step
    if not isinstance(found, Variable) or space not in (found.space, "generic"):
        raise PtxError(f"expected a variable in {space} memory, got {match[1]}")
    # Dynamic shared memory has no size of its own.
    if found.size and not 0 <= offset <= found.size - size:
        raise PtxError(f"{size} bytes at {offset} out of bounds of {found.name}")
    return found.space, reader(i.scope, place[1:-1], DTYPES["u64"])


def _load(
    i: Instruction, type: str, space: str, address: Reader, parts: list[str], coherent: bool
) -> Step:
    writes = [i.writer(p, type, wider=True) for p in parts]
    width, count = DTYPES[type].itemsize, len(parts)

    def step(wave: Wave, lanes: Lanes) -> None:
        words = wave.load(space, address(wave, lanes), width, count, lanes, coherent)
        for place, write in enumerate(writes):
            word = words[..., place]
            write(wave, lanes, np.ascontiguousarray(word) if word.ndim else word[()])

    return step


def _store(i: Instruction, type: str, space: str, address: Reader, parts: list[str]) -> Step:
    reads = [i.reader(p, type, wider=True) for p in parts]
    word = UNSIGNED[DTYPES[type].itemsize]

    def step(wave: Wave, lanes: Lanes) -> None:
        words = np.empty((wave.count(lanes), len(reads)), word)
        for place, read in enumerate(reads):
            words[:, place] = read(wave, lanes).view(word)
        wave.store(space, address(wave, lanes), words, lanes)

    return step
