"""Where the compilers and disassemblers for GPUs are: in packages from PyPI, or on PATH."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

from .gpu import FakeGpu


def nvcc() -> Path | None:
    return tool("nvcc")


def tool(name: str) -> Path | None:
    """nvcc and ptxas come with nvidia-cuda-nvcc, nvdisasm and cuobjdump with Triton."""
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            found = Path(place) / folder / name
            if found.exists():
                return found
    found_on_path = shutil.which(name)
    return Path(found_on_path) if found_on_path else None


def compile_ptx(source: Path, arch: str, *flags: str) -> str:
    """The PTX of a CUDA source."""
    compiler = nvcc()
    assert compiler is not None
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-ptx", *flags]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.ptx"
        subprocess.run([compiler, *options, source, "-o", output], check=True)
        return output.read_text()


def compile_shared(source: Path, arch: str, output: Path, gpu: FakeGpu, *flags: str) -> Path:
    """The launchers of a CUDA source as a library that runs on `gpu`."""
    compiler = nvcc()
    assert compiler is not None
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC", *flags]
    files = [str(source), str(gpu.library), "-o", str(output)]
    subprocess.run([str(compiler), *options, "-cudart=none", *files], check=True)
    return output
