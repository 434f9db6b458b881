"""The Triton kernels compiled ahead of time for every target, and the contents of their machine
code.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gpucheck.machine_code import count, output_of, sass_of, tool

from fastddim.plan import Rescaling

from .support.gpuless.cases import run_bare
from .support.updates import make_case, run

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from gpucheck import triton_jit

BF16 = torch.bfloat16
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, noise": {"noise": "keyed"},
    "float32, noise given": {"noise": "given"},
    "bfloat16": {"dtype": BF16},
    "bfloat16, noise": {"dtype": BF16, "noise": "keyed"},
    "float16": {"dtype": torch.float16},
    "guided": {"guided": True, "model_input": torch.float32},
    "guided, bfloat16, noise": {"dtype": BF16, "guided": True, "model_input": BF16}
    | {"noise": "keyed"},
    "float32, bfloat16": {"model_dtype": BF16, "model_input": BF16},
    "strided, noise": {"noise": "keyed", "layout": "sliced"},
    "float64, noise": {"dtype": torch.float64, "noise": "keyed"},
    "everything": {"noise": "keyed", "guided": True, "model_input": BF16, "per_sample": True}
    | {"history": True, "mask": True, "learned_variance": True},
}
# Loads and stores of 16 bytes by a thread: one for each tensor.
WIDE = {
    "float32": (2, 1),
    "float32, noise": (2, 1),
    "float32, noise given": (3, 1),
    "bfloat16": (2, 1),
    "bfloat16, noise": (2, 1),
    "float16": (2, 1),
    "guided": (3, 3),
    "guided, bfloat16, noise": (3, 3),
    # Those of the state; the others move 8 bytes.
    "float32, bfloat16": (1, 1),
    "float64, noise": (2, 1),
    "everything": (6, 1),
}
# Registers a thread for full occupancy on sm_80, 90 and 100, and for three quarters of it, which on
# sm_120 is full.
FULL, THREE_QUARTERS = 32, 40
UNBOUNDED = ("everything", "float64, noise")
FULLY_OCCUPIED = ("float32", "guided", "float32, bfloat16")
HALF_PRECISION = ("bfloat16", "float16")
# Within 40 registers the ptxas of Triton 3.7 keeps 8 bytes of this kernel on the stack.
SPILLED = {(100, "guided, bfloat16, noise")} if triton.__version__.startswith("3.7.") else set()


def built(target: Any, variant: str) -> triton_jit.Binary:
    """The kernel that a large update of this kind launches."""
    binaries: list[triton_jit.Binary] = []
    case = make_case(torch.Generator().manual_seed(1), (2, 4, 384, 384), **VARIANTS[variant])
    with triton_jit.compiled_for(target, binaries.append):
        # With x_0, into memory that is not aligned, or without it where it is.
        (run if variant == "strided, noise" else run_bare)(triton_jit.LAUNCHERS.update_out, case)
    (binary,) = binaries
    return binary


def machine_code(binary: triton_jit.Binary, folder: Path) -> Counter[str]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.kernel.asm["cubin"])
    (sass,) = sass_of(output_of([tool("nvdisasm"), "-c", str(cubin)], folder)).values()
    return sass


OPCODES = ("FFMA", "FMUL", "FADD", "DFMA", "DMUL", "DADD")


def operations(sass: Counter[str]) -> dict[str, int]:
    """Floating-point operations in machine code; those on pairs count twice."""
    found = {opcode: count(sass, opcode) + 2 * count(sass, opcode + "2") for opcode in OPCODES}
    # Of a half and a float.
    found["FADD"] += count(sass, "FHADD")
    return found


def operations_in_ptx(ptx: str) -> dict[str, int]:
    found = {}
    for opcode in OPCODES:
        name = {"FMA": "fma", "MUL": "mul", "ADD": "(?:add|sub)"}[opcode[1:]]
        width = {"F": 32, "D": 64}[opcode[0]]
        found[opcode] = len(re.findall(rf"\b{name}\.rn\.f{width}\b", ptx))
        found[opcode] += 2 * len(re.findall(rf"\b{name}\.rn\.f{width}x2\b", ptx))
    # There is no other instruction for it.
    found["DADD"] += len(re.findall(r"\bneg\.f64\b", ptx))
    return found


@pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None, reason="no cuobjdump or nvdisasm"
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[] if target == triton_jit.SM_90 else pytest.mark.deep)
        for target in triton_jit.CUDA_TARGETS
    ],
    ids=lambda target: f"sm_{target.arch}",
)
def test_nvidia(target: Any, variant: str, tmp_path: Path) -> None:
    """Kernels for NVIDIA have no stack and no spills, make wide accesses, and ptxas contracts
    nothing.
    """
    binary = built(target, variant)
    ptx = binary.kernel.asm["ptx"]
    assert not re.search(r"\b(?:fma|mul|add|sub)\.f(?:32|64)\b", ptx), "may be contracted"
    rest = ptx.replace("rsqrt.approx.ftz.f32", "")
    assert "approx" not in rest
    assert ".ftz" not in rest
    assert "sqrt" not in rest
    sass = machine_code(binary, tmp_path)
    usage = output_of([tool("cuobjdump"), "-res-usage", "kernel.cubin"], tmp_path)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert resources is not None
    registers, stack, _, local = map(int, resources.groups())
    spills = (target.arch, variant) in SPILLED
    assert (stack > 0, local) == (spills, 0)
    assert (count(sass, "LDL") > 0) == (count(sass, "STL") > 0) == spills
    # Values stay in the thread that read them.
    assert binary.kernel.metadata.shared == 0
    assert count(sass, "BAR") == count(sass, "SHFL") == count(sass, "STS") == 0
    full = variant in FULLY_OCCUPIED or (variant in HALF_PRECISION and target.arch in (80, 90))
    if variant not in UNBOUNDED:
        assert registers <= (FULL if full else THREE_QUARTERS)
    wide = [name for name in sass.elements() if ".128" in name]
    loads, stores = (sum(name.startswith(kind) for name in wide) for kind in ("LDG", "STG"))
    assert (loads, stores) == WIDE.get(variant, (0, 0))
    expected = Counter(operations_in_ptx(ptx))
    found = operations(sass)
    # A product that is contracted adds an FFMA for the FADD that it takes away; one that is worked
    # out twice, as ptxas may where registers are short, changes the number of FMUL alone.
    assert abs(expected["FMUL"] - found["FMUL"]) <= 1
    del expected["FMUL"], found["FMUL"]
    assert found == {opcode: expected[opcode] for opcode in found}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[] if target.arch == "gfx942" else pytest.mark.deep)
        for target in triton_jit.HIP_TARGETS
    ],
    ids=lambda target: target.arch,
)
def test_amd(target: Any, variant: str) -> None:
    """Kernels for AMD have no spills and no scratch memory, and vectors if the tensors are
    contiguous.
    """
    assembly = built(target, variant).kernel.asm["amdgcn"]
    assert_no_spills(assembly)
    loads, stores = WIDE.get(variant, (0, 0))
    assert len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", assembly)) == loads
    assert len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", assembly)) == stores
    assert not re.search(r"v_(?:log|sin|cos)_f32", assembly), "approximate"


OF_DATA: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind}, {name}": (kind, {**arguments, "guided": True, "mask": kind == "gradients"})
    for kind in ("rows", "gradients")
    for name, arguments in {
        "float32": {},
        "bfloat16": {"dtype": BF16},
        "float64": {"dtype": torch.float64},
        "strided": {"layout": "sliced"},
    }.items()
}
"""Rows that take factors from data, and gradients."""

QUICK = (
    ("cuda", "rows, float32"),
    ("cuda", "gradients, bfloat16"),
    ("hip", "rows, float32"),
)
"""Of the first target of a kind."""

REGISTERS = {"rows": 96, "gradients": 64}


def targets_and_variants(first: Any, targets: tuple[Any, ...]) -> list[Any]:
    return [
        pytest.param(
            *(target, variant),
            id=f"{target.arch}-{variant}",
            marks=[]
            if target == first and (target.backend, variant) in QUICK
            else pytest.mark.deep,
        )
        for target, variant in itertools.product(targets, OF_DATA)
    ]


def built_of_data(target: Any, variant: str) -> triton_jit.Binary:
    binaries: list[triton_jit.Binary] = []
    kind, arguments = OF_DATA[variant]
    case = make_case(torch.Generator().manual_seed(1), (2, 4, 64, 64), **arguments)
    inputs = (case.x, case.model_output, case.table, case.row)
    with triton_jit.compiled_for(target, binaries.append):
        if kind == "rows":
            triton_jit.LAUNCHERS.rescale_rows(
                *inputs, Rescaling(0.7, 0.995, 2.0), torch.empty(2, 12).to(case.table.dtype)
            )
        else:
            grads = (torch.empty_like(case.x), torch.empty_like(case.model_output))
            triton_jit.LAUNCHERS.backward_out(case.x, case.x, *inputs, case.mask, *grads)
    (binary,) = binaries
    return binary


@pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None, reason="no cuobjdump or nvdisasm"
)
@pytest.mark.parametrize(
    ("target", "variant"), targets_and_variants(triton_jit.SM_90, triton_jit.CUDA_TARGETS)
)
def test_rows_and_gradients_on_nvidia(target: Any, variant: str, tmp_path: Path) -> None:
    """Rows and gradients on NVIDIA have no stack, no spills, and only operations that are rounded
    to nearest.
    """
    binary = built_of_data(target, variant)
    ptx = binary.kernel.asm["ptx"]
    assert not re.search(r"\b(?:fma|mul|add|sub|div|sqrt|rcp)\.f(?:32|64)\b", ptx)
    assert not re.search(r"approx|\.full\b|\.ftz", ptx)
    sass = machine_code(binary, tmp_path)
    usage = output_of([tool("cuobjdump"), "-res-usage", "kernel.cubin"], tmp_path)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert resources is not None
    registers, stack, local = map(int, resources.groups())
    assert (stack, local, count(sass, "LDL"), count(sass, "STL")) == (0, 0, 0, 0)
    kind = OF_DATA[variant][0]
    assert registers <= REGISTERS[kind]
    if kind == "gradients":
        assert binary.kernel.metadata.shared == 0
        wide = [name for name in sass.elements() if ".128" in name]
        loads, stores = (sum(name.startswith(of) for name in wide) for of in ("LDG", "STG"))
        assert (loads, stores) == ((0, 0) if "strided" in variant else (6, 3))


@pytest.mark.parametrize(
    ("target", "variant"), targets_and_variants(triton_jit.HIP_TARGETS[0], triton_jit.HIP_TARGETS)
)
def test_rows_and_gradients_on_amd(target: Any, variant: str) -> None:
    assert_no_spills(built_of_data(target, variant).kernel.asm["amdgcn"])


def assert_no_spills(assembly: str) -> None:
    for name in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        values = re.findall(rf"\.{name}:\s+(\d+)", assembly)
        assert values
        assert set(values) == {"0"}, name


def test_other_sizes_need_no_other_kernel() -> None:
    """Other sizes need no other kernel. Batch, resolution and strides are arguments: one binary
    serves them.
    """
    for layout, noise in (("contiguous", "keyed"), ("contiguous", "none"), ("sliced", "keyed")):
        hashes = set()
        for shape in ((2, 4, 64, 64), (5, 4, 96, 160), (3, 3, 128, 32)):
            case = make_case(torch.Generator().manual_seed(1), shape, layout=layout, noise=noise)
            binaries: list[triton_jit.Binary] = []
            with triton_jit.compiled_for(triton_jit.SM_90, binaries.append):
                run_bare(triton_jit.LAUNCHERS.update_out, case)
            hashes |= {binary.kernel.hash for binary in binaries}
        assert len(hashes) == 1
