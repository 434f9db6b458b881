"""The CUDA source compiled as plain C++ under AddressSanitizer and UndefinedBehaviorSanitizer: it
touches no memory but its tensors', and its bits are those of the CPU kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastddim import ops

from .support import artefacts
from .support.environment import COMPILER, ROOT
from .support.gpuless.launcher import build_library
from .support.gpuless.toolchain import changed_cuda_source

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
CASES = ROOT / "tests/support/gpuless/on_host.py"


def sanitizers() -> list[str]:
    """The runtime libraries of the sanitizers, empty where the compiler has none."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        printed = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        found += [printed] if Path(printed).is_absolute() else []
    return found if len(found) == 2 else []


def compiled(folder: Path, right: str, wrong: str) -> Path:
    """The CUDA source with `wrong` for `right`, as a library of operators on CPU tensors."""
    changed_cuda_source(folder, right, wrong)
    (folder / "tests/native").mkdir(parents=True)
    shim = folder / "tests/native/cuda_on_host.cpp"
    shutil.copy(ROOT / "tests/native/cuda_on_host.cpp", shim)
    flags = ["-std=c++20", "-O0", "-fPIC", "-ffp-contract=off", "-fno-math-errno", *SANITIZE]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    built = artefacts.compiled(COMPILER, shim, [*flags, *warnings, "-c"], tree=folder)
    return build_library("fastddim_on_host", folder, [str(built)], SANITIZE)


def run_cases(library: Path, *selection: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(sanitizers()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FASTDDIM_ON_HOST": str(library),
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)),
            *(*selection, str(CASES)),
        ],
        # Elsewhere than in the checkout, which would hide the installed package.
        cwd=library.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


needs_sanitizers = pytest.mark.skipif(
    shutil.which(COMPILER) is None or not sanitizers() or ops.EXTENSION_ERROR is not None,
    reason=f"needs {COMPILER} with AddressSanitizer and UBSan, and the compiled extension",
)


@needs_sanitizers
@pytest.mark.parametrize(
    ("along_y", "selection", "least"),
    [
        ("2", ("-m", "not deep"), 200),
        pytest.param("2", ("--deep", "-m", "deep"), 180, marks=pytest.mark.deep),
        pytest.param("0xFFFF", ("--deep",), 380, marks=pytest.mark.deep),
    ],
)
def test_memory_and_bits(
    tmp_path: Path, along_y: str, selection: tuple[str, ...], least: int
) -> None:
    """Memory and bits are right, even if a grid has more samples than one axis can count; the test
    counts fewer along it.
    """
    library = compiled(tmp_path, "ALONG_Y = 0xFFFF", f"ALONG_Y = {along_y}")
    result = run_cases(library, *selection)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
    assert "skipped" not in result.stdout
