"""The noise formulas of csrc/formula.h for all possible inputs, and the facts on which the root of
the CUDA kernels rests.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from gpucheck.machine_code import nvcc, output_of, tool

from .support.environment import COMPILER, ROOT, needs_compiler


@needs_compiler
def test_all_words_and_all_reciprocals(tmp_path: Path) -> None:
    """Of 51 million pairs of a number and an approximation, one step is not enough for two. The
    hardware decides whether they occur: see the test below.
    """
    program = tmp_path / "formula"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off"]
    if b" fma " in Path("/proc/cpuinfo").read_bytes():
        flags.append("-mfma")
    source = ROOT / "tests/native/formula.cpp"
    subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], check=True)
    formulas, tried, roots = map(int, output_of([program], tmp_path).split())
    assert formulas == 0
    assert tried > 50_000_000
    assert roots == 2


SQRT_KERNEL = 'extern "C" __global__ void root(float* x) { x[0] = __fsqrt_rn(x[0]); }'


@pytest.mark.skipif(nvcc() is None or tool("nvdisasm") is None, reason="no nvcc or nvdisasm")
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_the_root_is_that_of_the_hardware(arch: int, tmp_path: Path) -> None:
    """The root is that of the hardware: csrc/scalar.h writes out the parts of sqrt.rn.f32 on each
    GPU, which NVIDIA says is rounded correctly; so the reciprocals that one step is not enough for
    do not occur.
    """
    (tmp_path / "root.cu").write_text(SQRT_KERNEL)
    output_of([nvcc(), f"-arch=sm_{arch}", "-cubin", "root.cu", "-o", "root.cubin"], tmp_path)
    listing = output_of([tool("nvdisasm"), "-c", "root.cubin"], tmp_path).replace(".reuse", "")
    # Some versions of nvdisasm add how an instruction is scheduled.
    text = "\n".join(
        re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*(?:[?&].*)?;", listing, re.MULTILINE)
    )
    reciprocal = re.search(r"^MUFU\.RSQ (R\d+), (R\d+)$", text, re.MULTILINE)
    assert reciprocal is not None, text
    y, a = reciprocal.groups()
    product = re.search(rf"^FMUL\.FTZ (R\d+), (?:{a}, {y}|{y}, {a})$", text, re.MULTILINE)
    half = re.search(rf"^FMUL\.FTZ (R\d+), {y}, 0\.5$", text, re.MULTILINE)
    assert product is not None, text
    assert half is not None, text
    s, h = product[1], half[1]
    rest = re.search(rf"^FFMA (R\d+), -{s}, {s}, {a}$", text, re.MULTILINE)
    assert rest is not None, text
    assert re.search(rf"^FFMA R\d+, {rest[1]}, {h}, {s}$", text, re.MULTILINE), text
    # From 2^-101 on.
    assert "0xf3000000" in text or "-0xd000000" in text, text
    assert "0x727fffff" in text, text
