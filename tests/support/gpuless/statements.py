"""Single instructions of PTX, run on columns of operands."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from . import ptx

HEADER = ".version 8.7\n.target sm_90\n.address_size 64\n"
WORDS = ("u32", "s32", "u64", "s64")
HALVES_AND_WORDS = ("u16", "s16", *WORDS)


def evaluate(
    body: str, sources: dict[str, np.ndarray], result: str, declarations: str = ""
) -> np.ndarray:
    """The values that `body` leaves in register d, of PTX type `result`, for each element of its
    sources.
    """
    return run_statements(body, sources, result, declarations)[0]


def run_statements(
    body: str, sources: dict[str, np.ndarray], result: str, declarations: str = ""
) -> tuple[np.ndarray, ptx.Launch]:
    """Runs `body` in one thread for each element of its sources, with registers named by their
    keys.
    """
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
