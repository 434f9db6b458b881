"""The Triton kernels compiled ahead of time for every target: what their machine code holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from .gpuless.cases import run_bare
from .gpuless.toolchain import tool
from .test_cuda_build import count, output_of, packed, sass_of
from .test_update import make_case

pytest.importorskip("triton", reason="Triton is not installed")

from .gpuless import triton_jit

BF16 = torch.bfloat16
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, noise": {"noise": "keyed"},
    "bfloat16": {"dtype": BF16},
    "bfloat16, noise": {"dtype": BF16, "noise": "keyed"},
    "float16": {"dtype": torch.float16},
    "guided": {"guided": True, "model_input": torch.float32},
    "float32, bfloat16": {"model_dtype": BF16, "model_input": BF16},
    "strided, noise": {"noise": "keyed", "layout": "sliced"},
    "float64": {"dtype": torch.float64},
}
PLAIN = ("float32", "float32, noise", "bfloat16", "bfloat16, noise", "float16")

# Registers a thread. Full occupancy needs 32 on sm_80, 90 and 100, three quarters of it 40.
REGISTERS = {"float32": 32, "float32, noise": 48, "bfloat16": 40, "bfloat16, noise": 64}


def built(target: Any, variant: str) -> triton_jit.Binary:
    """The kernel that a large update of this kind launches."""
    binaries: list[triton_jit.Binary] = []
    case = make_case(torch.Generator().manual_seed(1), (2, 4, 512, 512), **VARIANTS[variant])
    with triton_jit.compiled_for(target, binaries.append):
        run_bare(triton_jit.update.update_out, case)
    (binary,) = binaries
    return binary


@pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None, reason="no cuobjdump or nvdisasm"
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", triton_jit.CUDA_TARGETS, ids=lambda target: f"sm_{target.arch}")
def test_nvidia(target: Any, variant: str, tmp_path: Path) -> None:
    """No stack, no spills, wide accesses, and ptxas contracts nothing."""
    binary = built(target, variant)
    ptx = binary.kernel.asm["ptx"]
    assert not re.search(r"\b(?:fma|mul|add|sub)\.f32\b", ptx), "an operation may be contracted"
    assert "approx" not in ptx
    assert ".ftz" not in ptx
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.kernel.asm["cubin"])
    usage = output_of([tool("cuobjdump"), "-res-usage", str(cubin)], tmp_path)
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert resources is not None
    registers, stack, shared, local = map(int, resources.groups())
    assert (stack, local) == (0, 0)
    assert shared == 0, "values change threads"
    assert registers <= REGISTERS.get(variant, 128)
    (sass,) = sass_of(output_of([tool("nvdisasm"), "-c", str(cubin)], tmp_path)).values()
    assert count(sass, "LDL") == count(sass, "STL") == 0
    if variant in PLAIN:
        wide = [name for name in sass.elements() if ".128" in name]
        assert sum(name.startswith("LDG") for name in wide) == 2
        assert sum(name.startswith("STG") for name in wide) == 1
    if "noise" not in variant and variant != "float64":
        for opcode, operation in (("FFMA", "fma"), ("FMUL", "mul"), ("FADD", "(?:add|sub)")):
            expected = len(re.findall(rf"\b{operation}\.rn\.f32\b(?!x2)", ptx))
            found = count(sass, opcode) + 2 * count(sass, opcode + "2")
            assert found == expected + packed(ptx, opcode), opcode


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", triton_jit.HIP_TARGETS, ids=lambda target: target.arch)
def test_amd(target: Any, variant: str) -> None:
    """No spills and no scratch memory; vectors where the tensors are contiguous."""
    assembly = built(target, variant).kernel.asm["amdgcn"]
    for name in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        values = re.findall(rf"\.{name}:\s+(\d+)", assembly)
        assert values
        assert set(values) == {"0"}, name
    if variant in PLAIN:
        assert len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", assembly)) >= 2
        assert re.search(r"(?:global|buffer)_store_(?:dwordx4|b128)", assembly)
    assert not re.search(r"v_(?:log|sin|cos|rsq)_f32", assembly), "approximate"
