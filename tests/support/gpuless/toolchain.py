"""The CUDA compiler as tests call it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from gpucheck.machine_code import nvcc

from ..artefacts import compiled
from ..environment import ROOT
from .gpu import FakeGpu

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
FLAGS = ("-std=c++20", "-O3")


def compiler() -> Path:
    found = nvcc()
    assert found is not None
    return found


def compile_ptx(source: Path, arch: str, *flags: str, tree: Path = ROOT) -> str:
    """The PTX of a CUDA source; `tree` holds it and its headers."""
    options = [*FLAGS, f"-arch={arch}", "-ptx", *flags]
    return compiled(compiler(), source, options, tree=tree).read_text()


def compile_object(source: Path, *flags: str) -> Path:
    """The launchers of a CUDA source, with its kernels, to be linked."""
    return compiled(compiler(), source, [*FLAGS, "-c", *flags], suffix=".o")


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
    target = f"-arch={arch}"
    built = compile_object(source, target, "-Xcompiler=-fPIC", *flags)
    files = [built, gpu.library, "-o", output]
    subprocess.run([compiler(), target, "-shared", "-cudart=none", *files], check=True)
    return output
