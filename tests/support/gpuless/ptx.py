"""An interpreter of PTX on NumPy, for the code that nvcc and Triton compile, on host memory.

All threads of a wave of blocks run in lockstep: each instruction is executed for every thread that
has reached it, those with the lowest address in the program first. Results are those the ISA
defines, to the bit. What hardware would let pass is an error: accesses out of bounds or misaligned,
races between threads, stores into read-only memory, barriers that not all threads reach.

Not modelled: time, the memory model beyond races, SASS, and the payload of a NaN. Refused: every
opcode and suffix that `isa` does not list, among them calls, approximate operations and all atomics
but the additions of integers in shared memory.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import isa
from .exact import UNSIGNED, Array
from .isa import DTYPES, Lanes, Register, Variable
from .memory import GlobalMemory, Memory, PtxError, Region, RowMemory

__all__ = ["Kernel", "Launch", "Memory", "Module", "PtxError", "parse", "run"]

_WAVE_THREADS = 16384
"""Threads that run in lockstep: many enough to hide Python, few enough for their registers to stay
in the cache."""

_POISON = {0: np.True_, **{size: t(-1 % (1 << 8 * size)) for size, t in UNSIGNED.items()}}
"""The value of a register that was never written: NaN to every float type."""

_THREADS_PER_BLOCK, _SHARED_BYTES = 1024, 227 * 1024


class Launch(NamedTuple):
    executed: Counter[str]
    """Thread-instructions by full opcode; those a predicate turned off do not count."""
    bytes_read: Counter[str]
    bytes_written: Counter[str]
    """Bytes that the threads asked for, by region of global memory."""


@dataclass
class Module:
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    shared_bytes: int = 0
    extern_shared: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Operation:
    text: str
    opcode: str
    guard: tuple[int, bool] | None  # register, and whether it is negated
    step: isa.Step | None
    control: str = ""  # "branch", "exit" or "barrier"
    target: int = -1


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, int]]
    """Name and size in bytes of each."""
    most_threads: int
    exact_threads: int | None
    _body: str = field(repr=False)
    _alignments: list[int] = field(repr=False)
    _module: Module = field(repr=False)

    @functools.cached_property
    def program(self) -> Program:
        """The program, decoded when it is first needed: a module may hold kernels that a test never
        launches.
        """
        return _Decoder(self, self._module).decode(self._body)

    @functools.cached_property
    def offsets(self) -> list[int]:
        """The offset of each parameter in parameter memory."""
        offsets, end = [], 0
        for (_, size), alignment in zip(self.parameters, self._alignments, strict=True):
            offsets.append(_aligned(end, alignment))
            end = offsets[-1] + size
        return offsets

    def parameter_bytes(self, arguments: Sequence[bytes | int]) -> bytes:
        if len(arguments) != len(self.parameters):
            raise PtxError(
                f"{self.name}: expected {len(self.parameters)} arguments, got {len(arguments)}"
            )
        packed = bytearray()
        for (name, size), offset, argument in zip(
            self.parameters, self.offsets, arguments, strict=True
        ):
            value = argument
            if not isinstance(value, bytes):
                value = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
            if len(value) != size:
                raise PtxError(f"{name}: expected {size} bytes, got {len(value)}")
            packed += bytes(offset - len(packed)) + value
        return bytes(packed)


@dataclass
class Program:
    operations: list[Operation]
    widths: list[int]  # of the registers, in bytes
    specials: dict[str, int]  # name of a special register to the register that holds it
    shared_bytes: int  # static
    local_bytes: int


# Text to programs.

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_DIRECTIVE = re.compile(r"\.(?:version|target|address_size|file|loc)\b[^\n]*\n")
_SECTION = re.compile(r"\.section\s+\.\w+\s*\{[^}]*\}")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_ENTRY = re.compile(r"(?:\.visible|\.weak)?\s*\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)?\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?(?:\s*=\s*(.*))?",
    re.DOTALL,
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_REGISTER = re.compile(r"([%\w$]+)(?:<(\d+)>)?")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_COMMA = re.compile(r",(?![^{\[]*[}\]])")
_BOUNDS = re.compile(r"\.(maxntid|reqntid|minnctapersm|maxnreg)\s+(\d+(?:\s*,\s*\d+)*)")
_SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%laneid")


def parse(text: str) -> Module:
    """The kernels of a module. Their code is decoded, and refused, when it is first run."""
    text = _LINE_DIRECTIVE.sub("\n", _COMMENT.sub("", text) + "\n")
    text = _SECTION.sub("", text)
    module = Module()
    position = 0
    while True:
        position = _skip_space(text, position)
        if position == len(text):
            return module
        entry = _ENTRY.match(text, position)
        if entry:
            end = _closing_brace(text, entry.end())
            kernel = _kernel(entry, text[entry.end() : end], module)
            module.kernels[kernel.name] = kernel
            position = end + 1
            continue
        end = text.find(";", position)
        statement = text[position : end if end >= 0 else len(text)]
        variable = _VARIABLE.fullmatch(statement.strip())
        if end < 0 or variable is None:
            raise PtxError(f"unsupported statement: {statement[:80]}")
        _declare_global(variable, module)
        position = end + 1


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _closing_brace(text: str, position: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("unbalanced braces")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _size(type: str) -> int:
    if type not in DTYPES:
        raise PtxError(f"unsupported type {type}")
    return DTYPES[type].itemsize


def _kernel(entry: re.Match[str], body: str, module: Module) -> Kernel:
    name, signature, attributes = entry.groups()
    parameters, alignments = [], []
    for declaration in filter(None, map(str.strip, signature.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if match is None:
            raise PtxError(f"unsupported parameter: {declaration}")
        alignment, type, parameter, length = match.groups()
        parameters.append((parameter, _size(type) * int(length or 1)))
        alignments.append(int(alignment or _size(type)))
    bounds = {m[1]: [int(v) for v in m[2].split(",")] for m in _BOUNDS.finditer(attributes)}
    if _BOUNDS.sub("", attributes).strip():
        raise PtxError(f"unsupported attributes: {attributes.strip()}")
    exact = int(np.prod(bounds["reqntid"])) if "reqntid" in bounds else None
    most = int(np.prod(bounds.get("maxntid", [_THREADS_PER_BLOCK])))
    return Kernel(name, parameters, most, exact, body, alignments, module)


def _declare_global(match: re.Match[str], module: Module) -> None:
    """A variable outside of functions; global and constant ones live as long as the module."""
    space, alignment, type, name, length, initial = match.groups()
    size = _size(type) * (int(length) if length else 0 if length == "" else 1)
    if space == "shared":
        if length == "":
            module.extern_shared.append(name)
            return
        address = _aligned(module.shared_bytes, int(alignment or _size(type)))
        module.shared_bytes = address + size
        module.variables[name] = Variable(name, space, address, size)
        return
    if space == "local" or match[0].startswith(".extern"):
        raise PtxError(f"unsupported statement: {match[0][:80]}")
    octets = np.zeros(_aligned(size, 32) + 64, np.uint8)
    address = _aligned(octets.ctypes.data, 32)
    start = address - octets.ctypes.data
    if initial:
        values = _initial_values(initial, DTYPES[type])
        octets[start : start + values.nbytes] = values.view(np.uint8)
    module.variables[name] = Variable(name, space, address, size)
    module.regions.append(Region(address, size, name, space == "global", octets))


def _initial_values(text: str, dtype: np.dtype) -> np.ndarray:
    literals = [v.strip() for v in text.strip("{} \n").split(",")]
    values = [isa.immediate(v, dtype) for v in literals]
    if any(v is None for v in values):
        raise PtxError(f"unsupported initial value: {text[:80]}")
    return np.array(values, dtype)


class _Scope:
    """Names between two braces, those around them included."""

    def __init__(self, parent: _Scope | None) -> None:
        self.parent = parent
        self.names: dict[str, Register | Variable] = {}
        self.labels: dict[str, int] = {}

    def chain(self) -> Iterator[_Scope]:
        scope: _Scope | None = self
        while scope:
            yield scope
            scope = scope.parent

    def find(self, name: str) -> Register | Variable | None:
        return next((s.names[name] for s in self.chain() if name in s.names), None)

    def label(self, name: str) -> int:
        for scope in self.chain():
            if name in scope.labels:
                return scope.labels[name]
        raise PtxError(f"unknown label {name}")


class _Decoder:
    """Turns the text of one kernel into operations."""

    def __init__(self, kernel: Kernel, module: Module) -> None:
        self.widths = [0]  # the carry flag, isa.CARRY
        self.specials: dict[str, int] = {}
        self.shared_bytes, self.local_bytes = module.shared_bytes, 0
        self.scope = _Scope(None)
        self.scope.names.update(module.variables)
        for (name, size), offset in zip(kernel.parameters, kernel.offsets, strict=True):
            self.scope.names[name] = Variable(name, "param", offset, size)
        self.extern_shared = module.extern_shared
        self.pending: list[tuple[str, _Scope]] = []

    def decode(self, body: str) -> Program:
        self._collect(body)
        # Dynamic shared memory begins where all static variables end.
        self.shared_bytes = (
            _aligned(self.shared_bytes, 128) if self.extern_shared else self.shared_bytes
        )
        root = list(self.scope.chain())[-1]
        for name in self.extern_shared:
            root.names[name] = Variable(name, "shared", self.shared_bytes, 0)
        operations = [self._operation(text, scope) for text, scope in self.pending]
        return Program(operations, self.widths, self.specials, self.shared_bytes, self.local_bytes)

    def _collect(self, body: str) -> None:
        """Notes declarations and labels, and keeps instructions until all of them are known."""
        position = _skip_space(body, 0)
        while position < len(body):
            label = _LABEL.match(body, position)
            if label:
                self.scope.labels[label[1]] = len(self.pending)
                position = label.end()
            elif body[position] == "{":
                self.scope = _Scope(self.scope)
                position += 1
            elif body[position] == "}":
                assert self.scope.parent is not None
                self.scope = self.scope.parent
                position += 1
            else:
                end = body.find(";", position)
                if end < 0:
                    raise PtxError(f"syntax: {body[position : position + 80]}")
                self._statement(body[position:end].strip())
                position = end + 1
            position = _skip_space(body, position)

    def _statement(self, text: str) -> None:
        if not text or text.startswith(".pragma"):
            return
        if not text.startswith("."):
            self.pending.append((" ".join(text.split()), self.scope))
            return
        registers, variable = _REGISTERS.fullmatch(text), _VARIABLE.fullmatch(text)
        if registers:
            self._declare_registers(registers[1], registers[2])
        elif variable and variable[1] in ("shared", "local") and variable[5] != "":
            self._declare_variable(variable)
        else:
            raise PtxError(f"unsupported statement: {text[:80]}")

    def _declare_registers(self, type: str, names: str) -> None:
        width = 0 if type == "pred" else _size(type)
        for declaration in names.split(","):
            match = _REGISTER.fullmatch(declaration.strip())
            if match is None:
                raise PtxError(f"unsupported register: {declaration}")
            name, count = match.groups()
            for full in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
                self.scope.names[full] = self._register(width)

    def _register(self, width: int) -> Register:
        self.widths.append(width)
        return Register(len(self.widths) - 1, width)

    def _declare_variable(self, match: re.Match[str]) -> None:
        space, alignment, type, name, length, _ = match.groups()
        size = _size(type) * int(length or 1)
        start = _aligned(
            self.shared_bytes if space == "shared" else self.local_bytes,
            int(alignment or _size(type)),
        )
        if space == "shared":
            self.shared_bytes = start + size
        else:
            self.local_bytes = start + size
        self.scope.names[name] = Variable(name, space, start, size)

    def _operation(self, text: str, scope: _Scope) -> Operation:
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise PtxError(f"syntax: {text}")
        negated, predicate, opcode, rest = match.groups()
        operands = [o.strip() for o in _COMMA.split(rest) if o.strip()]
        try:
            self._add_specials(operands)
            guard = self._guard(predicate, bool(negated), scope) if predicate else None
            control = _control(opcode, operands)
            if control == "branch":
                return Operation(text, opcode, guard, None, control, scope.label(operands[0]))
            step = None if control else isa.decode(text, opcode, operands, scope)
        except PtxError as error:
            raise PtxError(f"{error}: {text}") from None
        return Operation(text, opcode, guard, step, control)

    def _guard(self, name: str, negated: bool, scope: _Scope) -> tuple[int, bool]:
        register = scope.find(name)
        if not isinstance(register, Register) or register.width:
            raise PtxError(f"expected a predicate, got {name}")
        return register.index, negated

    def _add_specials(self, operands: list[str]) -> None:
        root = list(self.scope.chain())[-1]
        for name in operands:
            if _SPECIAL.fullmatch(name) and name not in root.names:
                register = self._register(4)
                root.names[name] = register
                self.specials[name] = register.index


def _control(opcode: str, operands: list[str]) -> str:
    """The kind of a control instruction; empty for any other."""
    if opcode in ("ret", "exit") and not operands:
        return "exit"
    if opcode in ("bra", "bra.uni") and len(operands) == 1:
        return "branch"
    if opcode in ("bar.sync", "barrier.sync.aligned", "bar.cta.sync") and operands == ["0"]:
        return "barrier"
    return ""


# Programs to results.


def run(
    module: Module,
    name: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[bytes | int],
    memory: Memory,
    shared_bytes: int = 0,
    max_steps: int = 1_000_000,
) -> Launch:
    """Runs one kernel to its end.

    Args:
        arguments: the bytes of each parameter, or its value if it is an integer or address.
        memory: what the kernel may touch.
        shared_bytes: dynamic shared memory of a block.
        max_steps: instructions that a wave of blocks may execute, against endless loops.

    Raises:
        PtxError: where the code is not supported, or breaks a rule.
    """
    if name not in module.kernels:
        raise PtxError(f"{name}: no such kernel; there are {sorted(module.kernels)}")
    kernel = module.kernels[name]
    _check_shape(kernel, grid, block)
    program = kernel.program
    if program.shared_bytes + shared_bytes > _SHARED_BYTES:
        raise PtxError(
            f"{name}: expected at most {_SHARED_BYTES} bytes of shared memory, "
            f"got {program.shared_bytes + shared_bytes}"
        )
    shared = GlobalMemory([*memory, *module.regions])
    execution = _Execution(
        program, grid, block, kernel.parameter_bytes(arguments), shared, shared_bytes, max_steps
    )
    counts = np.zeros(len(program.operations), np.int64)
    blocks, threads = int(np.prod(grid)), int(np.prod(block))
    size = max(1, _WAVE_THREADS // threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, size):
            counts += _Wave(execution, first, min(size, blocks - first)).run()
    executed: Counter[str] = Counter()
    for operation, count in zip(program.operations, counts.tolist(), strict=True):
        if count:
            executed[operation.opcode] += count
    return Launch(executed, shared.bytes_read, shared.bytes_written)


def _check_shape(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    threads = int(np.prod(block))
    limits = (2**31 - 1, 65535, 65535)
    if min(*grid, *block) < 1 or any(g > m for g, m in zip(grid, limits, strict=True)):
        raise PtxError(f"{kernel.name}: no grid of {grid} blocks of {block} threads")
    if threads > min(kernel.most_threads, _THREADS_PER_BLOCK):
        raise PtxError(
            f"{kernel.name}: expected at most {kernel.most_threads} threads, got {threads}"
        )
    if kernel.exact_threads not in (None, threads):
        raise PtxError(f"{kernel.name}: expected {kernel.exact_threads} threads, got {threads}")
    if threads * int(np.prod(grid)) >= 2**31:
        raise PtxError(f"{kernel.name}: more threads than the interpreter counts")


class _Execution(NamedTuple):
    """The state that all waves of a launch share."""

    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    memory: GlobalMemory
    shared_bytes: int
    max_steps: int


class _Wave:
    """Blocks in lockstep."""

    def __init__(self, execution: _Execution, first_block: int, blocks: int) -> None:
        program = execution.program
        self._program, self._memory = program, execution.memory
        self._steps_left = execution.max_steps
        self._threads_per_block = int(np.prod(execution.block))
        self._size = blocks * self._threads_per_block
        lanes = np.arange(self._size, dtype=np.int64)
        self._block = lanes // self._threads_per_block
        self._thread = (first_block * self._threads_per_block + lanes).astype(np.int32)
        self._lane = lanes
        self.registers: list[Array] = [_POISON[width] for width in program.widths]
        self._fill_specials(execution, first_block, blocks)
        shared_bytes = program.shared_bytes + execution.shared_bytes
        self._rows = {
            "shared": (RowMemory("shared", blocks, shared_bytes, races=True), self._block),
            "local": (RowMemory("local", self._size, program.local_bytes, races=False), lanes),
        }
        self._parameters = RowMemory("parameter", 1, len(execution.parameters), races=False)
        self._parameters.block.fill(execution.parameters)
        self._counts = np.zeros(len(program.operations), np.int64)
        self._parked: dict[int, list[np.ndarray]] = {}

    def _fill_specials(self, execution: _Execution, first_block: int, blocks: int) -> None:
        thread = self._lane % self._threads_per_block
        values = dict(
            _coordinates("%tid", thread, execution.block)
            + _coordinates("%ctaid", first_block + self._block, execution.grid)
        )
        values |= {f"%ntid.{a}": n for a, n in zip("xyz", execution.block, strict=True)}
        values |= {f"%nctaid.{a}": n for a, n in zip("xyz", execution.grid, strict=True)}
        values["%laneid"] = thread % isa.WARP
        for name, index in self._program.specials.items():
            value = np.asarray(values[name]).astype(np.uint32)
            uniform = value.ndim == 0 or (value == value[0]).all()
            self.registers[index] = value.reshape(-1)[0] if uniform else value

    # What instructions see.

    def count(self, lanes: Lanes) -> int:
        return self._size if lanes is None else len(lanes)

    def load(
        self, space: str, address: Array, width: int, count: int, lanes: Lanes, coherent: bool
    ) -> np.ndarray:
        space, address = self._resolved(space, address)
        if space == "param":
            return self._parameters.load(address, width, count, np.int64(0), self._thread)
        thread = self._thread if lanes is None else self._thread[lanes]
        if space in ("global", "const"):
            return self._memory.load(address, width, count, thread, coherent)
        memory, row = self._rows[space]
        row = row if lanes is None else row[lanes]
        return memory.load(np.broadcast_to(address, row.shape), width, count, row, thread)

    def store(self, space: str, address: Array, words: np.ndarray, lanes: Lanes) -> None:
        space, address = self._resolved(space, address)
        thread = self._thread if lanes is None else self._thread[lanes]
        if space == "global":
            self._memory.store(address, words, thread)
        elif space in self._rows:
            memory, row = self._rows[space]
            row = row if lanes is None else row[lanes]
            memory.store(np.broadcast_to(address, row.shape), words, row, thread)
        else:
            raise PtxError(f"store into {space} memory")

    def add(self, address: Array, values: np.ndarray, lanes: Lanes) -> None:
        memory, row = self._rows["shared"]
        row, thread = (v if lanes is None else v[lanes] for v in (row, self._thread))
        memory.add(np.broadcast_to(address, row.shape), values, row, thread)

    def warps(self, lanes: Lanes) -> np.ndarray:
        everyone = self._lane if lanes is None else lanes
        whole = self._threads_per_block % isa.WARP == 0 and len(everyone) % isa.WARP == 0
        warps = everyone.reshape(-1, isa.WARP) if whole else everyone[:0]
        if not whole or (warps != warps[:, :1] // isa.WARP * isa.WARP + np.arange(isa.WARP)).any():
            raise PtxError("divergent warp: some of its threads do not execute this")
        return warps

    def _resolved(self, space: str, address: Array) -> tuple[str, Array]:
        """The space that a generic address lies in, and the address there."""
        if space != "generic":
            return space, address
        window = address >> np.uint64(56)
        first = int(window.flat[0] if window.ndim else window)
        spaces = {isa.BASES[s] >> 56: s for s in ("global", "shared", "local", "param")}
        if first not in spaces or (window != first).any():
            raise PtxError("generic addresses in several spaces, or in none")
        return spaces[first], address - np.uint64(first << 56)

    # Control flow.

    def run(self) -> np.ndarray:
        """Executes all threads, and returns how many executed each operation."""
        groups: dict[int, Lanes] = {0: None}
        while groups or self._parked:
            if not groups:
                raise PtxError(self._divergence())
            start = min(groups)
            lanes = groups.pop(start)
            for target, moved in self._straight(start, lanes, min(groups, default=-1)):
                groups[target] = self._merged(groups[target], moved) if target in groups else moved
        return self._counts

    def _straight(self, start: int, lanes: Lanes, stop: int) -> list[tuple[int, Lanes]]:
        """Executes up to the next change of control, and returns the next place of the threads."""
        operations, counts = self._program.operations, self._counts
        position = start
        while position != stop:
            if position == len(operations):
                raise PtxError("code runs past the end of the kernel")
            operation = operations[position]
            active, idle = self._guarded(operation.guard, lanes, bool(operation.control))
            size = self._size if active is None else len(active)
            counts[position] += size
            self._steps_left -= 1
            if self._steps_left < 0:
                raise PtxError(f"more than the allowed steps, at: {operation.text}")
            if operation.control:
                return self._controlled(operation, position, active, idle)
            if size:
                try:
                    operation.step(self, active)
                except PtxError as error:
                    raise PtxError(f"{error}, at: {operation.text}") from None
            position += 1
        return [(position, lanes)]

    def _guarded(
        self, guard: tuple[int, bool] | None, lanes: Lanes, complement: bool
    ) -> tuple[Lanes, Lanes]:
        """The lanes that a predicate lets through, and the others if they are wanted."""
        nobody = self._lane[:0]
        if guard is None:
            return lanes, nobody
        index, negated = guard
        value = self.registers[index]
        if not value.ndim:
            return (lanes, nobody) if value != negated else (nobody, lanes)
        chosen = value if lanes is None else value[lanes]
        chosen = ~chosen if negated else chosen
        if chosen.all():
            return lanes, nobody
        if not chosen.any():
            return nobody, lanes
        everyone = self._lane if lanes is None else lanes
        return everyone[chosen], everyone[~chosen] if complement else nobody

    def _controlled(
        self, operation: Operation, position: int, active: Lanes, idle: Lanes
    ) -> list[tuple[int, Lanes]]:
        after = [(position + 1, idle)] if self.count(idle) else []
        if not self.count(active):
            return after
        if operation.control == "branch":
            return [(operation.target, active), *after]
        if operation.control == "barrier":
            return self._arrived(position, active) + after
        return after

    def _merged(self, a: Lanes, b: Lanes) -> Lanes:
        assert a is not None
        assert b is not None
        lanes = np.sort(np.concatenate([a, b]))
        return None if len(lanes) == self._size else lanes

    def _arrived(self, position: int, lanes: Lanes) -> list[tuple[int, Lanes]]:
        """Parks threads at a barrier; releases the blocks whose threads are all there."""
        if lanes is None:
            self._synchronise(range(self._size // self._threads_per_block))
            return [(position + 1, None)]
        waiting = np.sort(np.concatenate([*self._parked.pop(position, []), lanes]))
        arrived = np.bincount(self._block[waiting])
        complete = arrived == self._threads_per_block
        leaving = complete[self._block[waiting]]
        if not leaving.all():
            self._parked[position] = [waiting[~leaving]]
        if not leaving.any():
            return []
        self._synchronise(np.flatnonzero(complete))
        released = waiting[leaving]
        return [(position + 1, None if len(released) == self._size else released)]

    def _synchronise(self, blocks: Sequence[int] | np.ndarray) -> None:
        memory, _ = self._rows["shared"]
        for block in blocks:
            memory.synchronise(int(block))

    def _divergence(self) -> str:
        position, waiting = next(iter(self._parked.items()))
        thread = int(self._thread[waiting[0][0]])
        return (
            f"divergent barrier: thread {thread} waits for threads of its block that never come, "
            f"at: {self._program.operations[position].text}"
        )


def _coordinates(
    name: str, index: np.ndarray, shape: tuple[int, int, int]
) -> list[tuple[str, np.ndarray]]:
    x, y, _ = shape
    places = (index % x, index // x % y, index // (x * y))
    return [(f"{name}.{axis}", place) for axis, place in zip("xyz", places, strict=True)]
