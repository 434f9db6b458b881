"""Times of one update: bytes against bandwidth, instructions against the rate of issue."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fastddim import philox
from fastddim.plan import Update, coefficient_row, stack_row

from . import measures
from .assumptions import assumed
from .machine_code import nvcc, output_of, sections, short, tool
from .main_path import main_path
from .rows import row

ROOT = Path(__file__).resolve().parents[2]
CUDA_TYPES = {"float32": "float", "bfloat16": "Brain"}
ITEMSIZE = {"float32": 4, "bfloat16": 2}
# The tensors of an update: state and model output are read, the next state is written.
TENSORS = 3
# Bytes of each tensor that a thread moves, and threads that issue together.
WORD, WARP = 16, 32

# By the first part of an opcode, and which assumption says how long it takes. What is not here
# keeps no unit busy for longer than it takes to issue it.
UNITS = {
    "logic_cycles": (
        *("FSEL", "FSETP", "F2FP", "I2FP", "IABS", "IADD3", "ISETP", "LEA", "LOP3"),
        *("MOV", "PRMT", "SEL", "SHF", "VIADD"),
    ),
    "product_cycles": ("IMAD",),
    "special_cycles": ("MUFU", "F2I", "I2F", "F2F"),
}


def variant(impl: str, dtype: str, eta: float) -> str:
    return f"{impl}, {dtype}, eta {eta:g}"


def cuda_counts() -> dict[str, dict[str, int]]:
    """Instructions of a warp by opcode for the kernels of csrc/cuda/update.cu, built as by setup.py
    for sm_90.
    """
    flags = ["-std=c++20", "-O3", "-fmad=false", "-arch=sm_90", "-cubin"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        output_of([nvcc(), *flags, ROOT / "csrc/cuda/update.cu", "-o", "update.cubin"], folder)
        listing = output_of([tool("nvdisasm"), "-c", "update.cubin"], folder)
    kernels = {short(name): section for name, section in sections(listing).items()}
    found = {}
    for dtype, kind in CUDA_TYPES.items():
        for eta in measures.UPDATE_ETAS:
            kernel = f"update<{kind}, {kind}, plain, {'true' if eta else 'false'}>"
            found[variant("cuda", dtype, eta)] = _counted(kernels[kernel])
    return found


def triton_counts() -> dict[str, dict[str, int]]:
    """The same for Triton's kernels, as a large update launches them."""
    from fastddim.kernels import update

    from . import triton_jit

    found = {}
    for dtype in measures.DTYPES:
        for eta in measures.UPDATE_ETAS:
            binaries: list[triton_jit.Binary] = []
            with triton_jit.compiled_for(triton_jit.SM_90, binaries.append):
                _launch(update.update_out, getattr(torch, dtype), eta)
            (binary,) = binaries
            found[variant("triton", dtype, eta)] = _counted(_listing(binary))
    return found


def _launch(update_out: Any, dtype: torch.dtype, eta: float) -> None:
    """An update like those of the check, of four samples."""
    x, m, out = (torch.zeros((4, 2**20), dtype=dtype) for _ in range(3))
    update_out(
        x,
        m,
        stack_row(coefficient_row(0.4, 0.5, Update(eta=eta))).float()[None],
        torch.zeros(1, dtype=torch.int64),
        noise=None,
        keys=philox.make_keys(7, len(x), step_index=3) if eta else None,
        out=out,
        x_0=None,
        model_input=None,
    )


def _listing(binary: Any) -> str:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "kernel.cubin").write_bytes(binary.kernel.asm["cubin"])
        listing = output_of([tool("nvdisasm"), "-c", "kernel.cubin"], folder)
    (section,) = sections(listing).values()
    return section


def _counted(section: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for opcode, n in main_path(section).items():
        counts[opcode.split(".")[0]] += n
    return dict(sorted(counts.items()))


def cycles(counts: dict[str, int]) -> float:
    """Cycles of one scheduler for a warp: to issue all, or those of the busiest unit."""
    busy = [
        assumed(name) * sum(counts.get(opcode, 0) for opcode in opcodes)
        for name, opcodes in UNITS.items()
    ]
    return max(sum(counts.values()), *busy)


def predicted_updates(counts: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """A row for each measured update, from the instructions of each variant."""
    return [
        _predicted(impl, dtype, eta, mib, counts[variant(impl, dtype, eta)])
        for impl in measures.IMPLEMENTATIONS
        for dtype in measures.DTYPES
        for eta in measures.UPDATE_ETAS
        for mib in sorted(measures.MEBIBYTES)
    ]


def _predicted(
    impl: str, dtype: str, eta: float, mib: int, counts: dict[str, int]
) -> dict[str, Any]:
    size = mib * measures.MEBIBYTE
    moved = TENSORS * size
    schedulers = assumed("multiprocessors") * assumed("schedulers")
    warps = size / (WORD * WARP)
    of_bytes = moved / (assumed("copy_bandwidth") * assumed("streaming_share"))
    of_instructions = warps * cycles(counts) / (schedulers * assumed("clock"))
    fixed = assumed("kernel") + assumed("dependent_reads") * assumed("dependent_read")
    parts = {"launch": fixed, "bytes": of_bytes, "instructions": of_instructions}
    seconds = fixed + max(of_bytes, of_instructions)
    copy = 2 * size / (2 * size / assumed("copy_bandwidth") + assumed("kernel"))
    return row(
        measures.update(impl, dtype, eta, mib),
        seconds,
        bound=max(parts, key=lambda part: parts[part]),
        parts=parts,
        bytes=moved,
        share_of_copy_bandwidth=moved / seconds / copy,
    )
