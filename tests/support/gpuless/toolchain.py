"""The CUDA compiler as tests call it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from gpucheck.machine_code import nvcc

from ..environment import ROOT
from .gpu import FakeGpu

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")


def compile_ptx(source: Path, arch: str, *flags: str) -> str:
    """The PTX of a CUDA source."""
    compiler = nvcc()
    assert compiler is not None
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-ptx", *flags]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.ptx"
        subprocess.run([compiler, *options, source, "-o", output], check=True)
        return output.read_text()


def changed_cuda_source(folder: Path, right: str, wrong: str) -> Path:
    """A copy of csrc/cuda/update.cu, with what it includes, in which `right` reads `wrong`."""
    sources = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")]
    changed = [source for source in sources if right in source.read_text()]
    assert len(changed) == 1, f"expected {right!r} in one file, found it in {changed}"
    for source in sources:
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        copy.write_text(text.replace(right, wrong) if source in changed else text)
    return folder / "csrc/cuda/update.cu"


def compile_shared(source: Path, arch: str, output: Path, gpu: FakeGpu, *flags: str) -> Path:
    """The launchers of a CUDA source as a library that runs on `gpu`."""
    compiler = nvcc()
    assert compiler is not None
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC", *flags]
    files = [str(source), str(gpu.library), "-o", str(output)]
    subprocess.run([str(compiler), *options, "-cudart=none", *files], check=True)
    return output
