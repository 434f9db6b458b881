"""Packages, package data and the compiled extension; everything else is in pyproject.toml.

The list of packages is explicit because `fastddim.kernels` lives in `kernels/`, not in `fastddim/`.

Without torch, without a C++ compiler, or with FASTDDIM_BUILD_EXT=0 in the environment, the package
is built without the extension. The CUDA kernels are part of it where torch is a CUDA build and nvcc
is found; FASTDDIM_BUILD_CUDA=1 asks for them beside any torch (they then fail to build rather than
be left out), FASTDDIM_BUILD_CUDA=0 leaves them out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["fastddim", "fastddim.*"])
packages += [f"fastddim.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

# Machine code for these, as far as nvcc knows them, and PTX of one that every newer GPU can run.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CUDA_PTX = 100


def missing_for_extension() -> str | None:
    """What keeps the extension from being built, or None."""
    if os.environ.get("FASTDDIM_BUILD_EXT") == "0":
        return "FASTDDIM_BUILD_EXT=0"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed (build with --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler.split()[0]) else f"there is no C++ compiler ({compiler})"


def find_nvcc() -> Path | None:
    from torch.utils.cpp_extension import CUDA_HOME

    # torch looks for a toolkit only where it is a CUDA build itself.
    home = os.environ.get("CUDA_HOME") or CUDA_HOME
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return Path(found) if found else None


def missing_for_cuda() -> str | None:
    """What keeps the CUDA kernels from being built, or None."""
    import torch

    asked = os.environ.get("FASTDDIM_BUILD_CUDA")
    if asked == "0":
        return "FASTDDIM_BUILD_CUDA=0"
    if asked != "1" and torch.version.cuda is None:
        return "torch is not a CUDA build"
    if find_nvcc() is None:
        if asked == "1":
            raise SystemExit("FASTDDIM_BUILD_CUDA=1: expected nvcc on PATH or in CUDA_HOME")
        return "there is no nvcc on PATH or in CUDA_HOME"
    return None


def cuda_targets(nvcc: Path) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = {int(name.removeprefix("compute_")) for name in listed.stdout.split()}
    machine = [arch for arch in CUDA_ARCHITECTURES if arch in known]
    ptx = CUDA_PTX if CUDA_PTX in known else machine[-1]
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in machine]
    return [f"-gencode={target}" for target in [*targets, f"arch=compute_{ptx},code=compute_{ptx}"]]


def compile_cuda(folder: Path) -> Path:
    """The object file of the CUDA kernels and their launchers."""
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "update.o"
    # -fmad=false for the same reason as -ffp-contract=off below. torch asks for C++20.
    flags = ["-std=c++20", "-O3", "-fmad=false", "--threads=0", "-Werror=all-warnings"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *cuda_targets(nvcc)]
    subprocess.run([nvcc, *flags, "-c", "csrc/cuda/update.cu", "-o", output], check=True)
    return output


def cuda_libraries() -> list[str]:
    """Folders of the static CUDA runtime: toolkits have lib64, the packages from PyPI lib."""
    nvcc = find_nvcc()
    assert nvcc is not None
    home = nvcc.resolve().parent.parent
    return [str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()]


def extension_arguments() -> dict[str, object]:
    """One abi3 library on libtorch's stable ABI, for every Python >= 3.10 and torch >= 2.11."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            if missing_for_cuda() is None:
                built = compile_cuda(Path(self.build_temp).resolve())
                self.extensions[0].extra_objects.append(str(built))
            super().build_extensions()

    flags = [
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        # The same bits from every compiler: fused multiply-adds are written out, and only there.
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Werror",
        # Warnings are errors in our own code only.
        *(f"-isystem{path}" for path in include_paths()),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    without_cuda = missing_for_cuda()
    if without_cuda is not None:
        print(f"fastddim: building without the CUDA kernels: {without_cuda}", file=sys.stderr)
    sources = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    if without_cuda is None:
        sources.append(Path("csrc/cuda/binding.cpp"))
    headers = [path for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cu")]
    extension = CppExtension(
        "fastddim._C",
        sorted(map(str, sources)),
        depends=sorted(map(str, headers)),
        extra_compile_args=flags,
        library_dirs=[] if without_cuda else cuda_libraries(),
        libraries=[] if without_cuda else ["cudart_static", "dl", "rt", "pthread"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


missing = missing_for_extension()
if missing is not None:
    print(f"fastddim: building without the C++ extension: {missing}", file=sys.stderr)

setup(
    packages=packages,
    package_dir={"fastddim": "fastddim", "fastddim.kernels": "kernels"},
    # Package data is what is named here, not whatever MANIFEST.in puts into the sdist.
    include_package_data=False,
    package_data={
        "fastddim": ["py.typed"],
        "fastddim.models": ["weights/*.safetensors", "weights/*.json"],
    },
    **({} if missing else extension_arguments()),
)
