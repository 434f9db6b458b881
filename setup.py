"""Packages, package data and the compiled extension; everything else is in pyproject.toml.

The list of packages is explicit because `fastddim.kernels` lives in `kernels/`, not in `fastddim/`.

The extension is compiled with the torch that can be imported here. If pip builds in an isolated
environment, that is the torch of the environment that it installs into.

Without torch, without a C++ compiler, or with FASTDDIM_BUILD_EXT=0 in the environment, the package
is built without the extension. pip hides the output of a build, so the version says so, in the last
line of `pip install`, in `pip list` and to `fastddim.extension`: 0.1.0+no.kernel.without.torch.

The CUDA kernels are part of the extension if torch is a CUDA build and nvcc is found with its
static runtime. FASTDDIM_BUILD_CUDA=1 requires them with any torch: the build fails without them.
FASTDDIM_BUILD_CUDA=0 leaves them out. FASTDDIM_WERROR=1 turns compilers' warnings into errors. It
is off by default, since other releases of a compiler may warn of more.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import find_packages, setup
from setuptools.command.egg_info import egg_info

packages = find_packages(include=["fastddim", "fastddim.*"])
packages += [f"fastddim.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

# Machine code for those that nvcc knows, and PTX of one that every newer GPU can run.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CUDA_PTX = 100

WARNINGS_ARE_ERRORS = os.environ.get("FASTDDIM_WERROR") == "1"


class Missing(NamedTuple):
    """The reason why the extension cannot be built, for people and as a part of a version."""

    reason: str
    label: str


def missing_for_extension() -> Missing | None:
    if os.environ.get("FASTDDIM_BUILD_EXT") == "0":
        return Missing("FASTDDIM_BUILD_EXT=0", "by.request")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return Missing(f"there is no C++ compiler ({compiler})", "without.compiler")
    if importlib.util.find_spec("torch") is None:
        sys.path += hidden_folders()
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return Missing(f"torch cannot be imported: {error}", "without.torch")
    return None


def hidden_folders() -> list[str]:
    """The folders with the packages of the environment that pip installs into.

    For an isolated build, pip runs the interpreter of that environment and hides its packages with
    variables. At the end of the path, these folders do not replace the build's own setuptools.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    asked = [sys.executable, "-c", "import sys; print(*sys.path, sep='\\n')"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True, env=variables).stdout
    return [folder for folder in said.splitlines() if folder and folder not in sys.path]


def marked_version(missing: Missing) -> dict[str, object]:
    """Arguments of `setup` that mark the version of a build without the extension."""

    class Information(egg_info):
        def finalize_options(self) -> None:
            # An sdist has no mark, since it may still be built with the extension.
            if "sdist" not in sys.argv:
                self.tag_build = f"+no.kernel.{missing.label}"
            super().finalize_options()

    return {"cmdclass": {"egg_info": Information}}


class Toolkit(NamedTuple):
    """The compiler of the CUDA kernels, and its libraries."""

    nvcc: Path
    libraries: Path  # the folder of libcudart_static.a


def cuda_toolkit() -> Toolkit | None:
    """The toolkit to use; without one, None, after a line that gives the reason."""
    import torch

    asked = os.environ.get("FASTDDIM_BUILD_CUDA")
    try:
        if asked == "0":
            raise LookupError("FASTDDIM_BUILD_CUDA=0")
        if asked != "1" and torch.version.cuda is None:
            raise LookupError("torch is not a CUDA build")
        return find_toolkit()
    except LookupError as error:
        if asked == "1":
            raise SystemExit(f"FASTDDIM_BUILD_CUDA=1: {error}") from None
        print(f"fastddim: building without the CUDA kernels: {error}", file=sys.stderr)
        return None


def find_toolkit() -> Toolkit:
    """Find the toolkit; raises LookupError if a part of it is missing."""
    from torch.utils.cpp_extension import CUDA_HOME

    # torch looks for a toolkit only if it is a CUDA build itself.
    home = os.environ.get("CUDA_HOME") or CUDA_HOME
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        raise LookupError("expected nvcc on PATH or in CUDA_HOME, found none")
    for folder in library_folders(found):
        if (folder / "libcudart_static.a").is_file():
            return Toolkit(Path(found), folder)
    raise LookupError(f"expected libcudart_static.a in the toolkit of {found}, found none")


def library_folders(nvcc: str) -> list[Path]:
    """Folders that may hold the libraries of `nvcc`, as reported by itself, since the file may be a
    script that calls an nvcc elsewhere. A toolkit has its libraries in a folder that nvcc links
    with, the packages from PyPI have them in `lib`.
    """
    asked = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(asked, check=False, capture_output=True, text=True).stderr
    linked = re.findall(r'"-L([^"]+)"', said)
    tops = re.findall(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return [Path(folder) for folder in (*linked, *(f"{top}/lib" for top in tops))]


def cuda_targets(nvcc: Path) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = {int(name.removeprefix("compute_")) for name in listed.stdout.split()}
    machine = [arch for arch in CUDA_ARCHITECTURES if arch in known]
    ptx = CUDA_PTX if CUDA_PTX in known else machine[-1]
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in machine]
    return [f"-gencode={target}" for target in [*targets, f"arch=compute_{ptx},code=compute_{ptx}"]]


def compile_cuda(nvcc: Path, folder: Path) -> Path:
    """The object file of the CUDA kernels and their launchers."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "update.o"
    # -fmad=false for the same reason as -ffp-contract=off below. torch asks for C++20.
    flags = ["-std=c++20", "-O3", "-fmad=false", "--threads=0"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *cuda_targets(nvcc)]
    flags += ["-Werror=all-warnings"] if WARNINGS_ARE_ERRORS else []
    subprocess.run([nvcc, *flags, "-c", "csrc/cuda/update.cu", "-o", output], check=True)
    return output


def extension_arguments() -> dict[str, object]:
    """One abi3 library on libtorch's stable ABI, for every Python >= 3.10 and torch >= 2.11."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    toolkit = cuda_toolkit()

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            if toolkit is not None:
                built = compile_cuda(toolkit.nvcc, Path(self.build_temp).resolve())
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
        *(["-Werror"] if WARNINGS_ARE_ERRORS else []),
        # Warnings are enabled for our own code only.
        *(f"-isystem{path}" for path in include_paths()),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    sources = [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    if toolkit is not None:
        sources.append(Path("csrc/cuda/binding.cpp"))
    headers = [path for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cu", ".cuh")]
    extension = CppExtension(
        "fastddim._C",
        sorted(map(str, sources)),
        depends=sorted(map(str, headers)),
        extra_compile_args=flags,
        library_dirs=[] if toolkit is None else [str(toolkit.libraries)],
        libraries=[] if toolkit is None else ["cudart_static", "dl", "rt", "pthread"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


missing = missing_for_extension()
if missing is not None:
    print(f"fastddim: building without the C++ extension: {missing.reason}", file=sys.stderr)

setup(
    packages=packages,
    py_modules=["fastddim_command"],
    package_dir={"fastddim": "fastddim", "fastddim.kernels": "kernels"},
    # Package data is only what is named here, not what MANIFEST.in adds to the sdist.
    include_package_data=False,
    package_data={
        "fastddim": ["py.typed"],
        "fastddim.models": ["weights/*.safetensors", "weights/*.json"],
    },
    **(marked_version(missing) if missing else extension_arguments()),
)
