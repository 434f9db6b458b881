"""Packages, package data and the C++ extension; everything else is in pyproject.toml.

The list of packages is explicit because `fastddim.kernels` lives in `kernels/`, not in `fastddim/`.

Without torch, without a C++ compiler, or with FASTDDIM_BUILD_EXT=0 in the environment, the package
is built without the extension.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["fastddim", "fastddim.*"])
packages += [f"fastddim.{name}" for name in find_packages(include=["kernels", "kernels.*"])]


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


def extension_arguments() -> dict[str, object]:
    """One abi3 library on libtorch's stable ABI, for every Python >= 3.10 and torch >= 2.11."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

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
    extension = CppExtension(
        "fastddim._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        extra_compile_args=flags,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
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
