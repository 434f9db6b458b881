"""The CUDA launchers as a backend for CPU tensors (tests/native/launcher.cpp)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from fastddim import ops
from fastddim.philox import Keys
from fastddim.plan import Rescaling

from ..artefacts import compiled
from ..environment import COMPILER, ROOT

OPERATORS = ("update_out", "fit_rows", "backward_out", "normal_out", "advance")


def build_library(namespace: str, folder: Path, objects: list[str], flags: list[str]) -> Path:
    """Compile the binding for the operators `namespace::…` and link it with the launchers."""
    options = [
        *("-std=c++20", "-O0", "-g", "-c", "-fPIC"),
        *(f"-isystem{path}" for path in include_paths()),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-DFASTDDIM_TEST_LIBRARY={namespace}",
    ]
    compile_flags = [flag for flag in flags if flag.startswith("-f")]
    binding = compiled(COMPILER, ROOT / "tests/native/launcher.cpp", [*options, *compile_flags])
    library = folder / f"{namespace}.so"
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    files = [str(binding), *objects, "-o", str(library)]
    subprocess.run([COMPILER, "-shared", *flags, *files, *libraries], check=True)
    return library


_defined: dict[str, torch.library.Library] = {}


def define(namespace: str) -> None:
    """Define operators with the schemas of fastddim's, once and as long as the process lives: torch
    2.11 lists operators that are gone, and opcheck then fails on them.
    """
    if namespace in _defined:
        return
    library = _defined[namespace] = torch.library.Library(namespace, "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.fastddim, name).default._schema)
        library.define(schema.removeprefix("fastddim::"))


def backend(namespace: str) -> Any:
    """The functions of a backend that launch kernels, and `backward_out`, which is the operator."""
    operators = getattr(torch.ops, namespace)

    def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
        operators.normal_out(*keys, stream, out)

    def rescale_rows(
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor,
        rescaling: Rescaling,
        out: Tensor,
    ) -> None:
        operators.fit_rows(x, model_output, table, row, *rescaling, out)

    return SimpleNamespace(
        update_out=ops.update_out_through(operators.update_out.default),
        rescale_rows=rescale_rows,
        backward_out=operators.backward_out,
        normal_out=normal_out,
        advance=operators.advance,
    )
