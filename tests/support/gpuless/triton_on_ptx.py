"""Kernels of Triton executed on CPU tensors by the interpreter of PTX."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gpucheck import triton_jit
from gpucheck.triton_jit import Binary

from ..environment import ROOT
from . import ptx

OUTPUTS = (
    *("out", "x_0", "model_input", "epsilon", "counters", "t"),
    *("grad_x", "grad_model_output"),
)


@dataclass
class Interpreter:
    """Executes what is launched on CPU tensors, and keeps the counts of each launch."""

    edit: Callable[[str], str] = lambda text: text
    """Applied to the PTX of each kernel before it runs."""
    launches: list[ptx.Launch] = field(default_factory=list)
    _modules: dict[str, ptx.Module] = field(default_factory=dict)

    def __call__(self, binary: Binary) -> None:
        text = self.edit(binary.kernel.asm["ptx"])
        if text not in self._modules:
            self._modules[text] = ptx.parse(text)
        arguments: list[bytes | int] = []
        memory = ptx.Memory()
        tensors: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for name, kind, value in binary.parameters():
            if not kind.startswith("*"):
                arguments.append(struct.pack("<d", value) if kind == "fp64" else value)
                continue
            arguments.append(value.data_ptr())
            # The row and the steps of a loop may begin at one address: the longer counts.
            known, names = tensors.get(value.data_ptr(), (value, []))
            longer = max(known, value, key=lambda tensor: tensor.numel())
            tensors[value.data_ptr()] = (longer, [*names, name])
        for tensor, names in tensors.values():
            writable = any(name in OUTPUTS for name in names)
            memory.add_tensor(tensor, "=".join(names), writable)
        # Scratch memory, which these kernels do not use.
        arguments += [0, 0]
        grid = (*binary.grid, 1, 1)[:3]
        self.launches.append(
            ptx.run(
                self._modules[text],
                binary.name,
                grid=grid,
                block=(binary.threads, 1, 1),
                arguments=arguments,
                memory=memory,
                shared_bytes=binary.kernel.metadata.shared,
            )
        )


@pytest.fixture
def interpreter() -> Iterator[Interpreter]:
    """Executes what is launched for sm_90."""
    interpreter = Interpreter()
    with triton_jit.compiled_for(triton_jit.SM_90, interpreter):
        yield interpreter


def changed_kernels(folder: Path, module: str, right: str, wrong: str) -> Any:
    """A copy of the kernels, as a package of its own, with another text."""
    package = folder / f"kernels_{abs(hash((module, right)))}"
    package.mkdir()
    (package / "__init__.py").touch()
    for source in (ROOT / "kernels").glob("[a-z]*.py"):
        text = source.read_text()
        if source.stem == module:
            assert right in text
            text = text.replace(right, wrong)
        (package / source.name).write_text(text)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        return importlib.import_module(f"{package.name}.launch")
