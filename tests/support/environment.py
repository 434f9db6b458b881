"""The checkout, and the compilers and backends that the machine of the tests has."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from fastddim import backends, ops

CPU_IMPLS = [
    name
    for name, backend in backends.BACKENDS.items()
    if backend.unavailable(torch.device("cpu")) is None
]

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++")

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"there is no C++ compiler ({COMPILER})"
)
needs_extension = pytest.mark.skipif(
    ops.EXTENSION_ERROR is not None, reason=str(ops.EXTENSION_ERROR)
)


class Some(Protocol):
    def __call__(
        self, cases: Iterable[Any], *others: Any, quick: int, deep: int | None = None
    ) -> list[Any]: ...


class RunPython(Protocol):
    def __call__(
        self, *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]: ...
