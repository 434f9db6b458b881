"""The CUDA operators on the interpreter of PTX: the launchers that nvcc built, and its PTX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastddim import philox
from fastddim.plan import Rescaling

from ..environment import ROOT
from . import launcher
from .gpu import FakeGpu
from .toolchain import compile_object, compile_ptx

SOURCE = ROOT / "csrc/cuda/update.cu"
NAMESPACE = "fastddim_on_ptx"


class Device:
    """The operators on the interpreter: every call registers its tensors and nothing else."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self._backend = launcher.backend(NAMESPACE)

    def update_out(
        self, x: Tensor, model_output: Tensor, table: Tensor, row: Tensor | None, **rest: Any
    ) -> None:
        given = {"x": x, "model_output": model_output, "table": table, "row": row, **rest}
        keys = rest["keys"]
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        tensors |= {} if keys is None else keys._asdict()
        self._call(
            tensors,
            {"out", "x_0", "model_input", "epsilon"},
            lambda: self._backend.update_out(x, model_output, table, row, **rest),
        )

    def rescale_rows(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor | None,
        rescaling: Rescaling,
        out: Tensor,
    ) -> None:
        given = (x, model_output, table, row)
        tensors = {"x": x, "model_output": model_output, "table": table, "out": out}
        if row is not None:
            tensors["row"] = row
        self._call(
            tensors,
            {"out"},
            lambda: self._backend.rescale_rows(*given, rescaling, out),
        )

    def backward_out(self, *operands: Tensor | None) -> None:
        names = ("grad_out", "grad_x_0", "x", "model_output", "table", "row", "mask")
        names += ("grad_x", "grad_model_output")
        tensors = {
            name: tensor for name, tensor in zip(names, operands, strict=True) if tensor is not None
        }
        self._call(
            tensors, {"grad_x", "grad_model_output"}, lambda: self._backend.backward_out(*operands)
        )

    def normal_out(self, keys: philox.Keys, stream: int, out: Tensor) -> None:
        tensors = {**keys._asdict(), "out": out}
        self._call(tensors, {"out"}, lambda: self._backend.normal_out(keys, stream, out))

    def advance(self, counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
        tensors = {"counters": counters, "timesteps": timesteps, "t": t}
        self._call(
            tensors, {"counters", "t"}, lambda: self._backend.advance(counters, timesteps, t)
        )

    def _call(self, tensors: dict[str, Tensor], written: set[str], call: Any) -> None:
        self.gpu.reset()
        # Views of one another, as the counters of a loop are, count as the widest of them.
        held: list[range] = []
        for name in sorted(tensors, key=lambda n: (n not in written, -extent(tensors[n]))):
            begin = tensors[name].data_ptr()
            if any(begin in other for other in held):
                continue
            held.append(range(begin, begin + extent(tensors[name])))
            self.gpu.memory.add_tensor(tensors[name], name, writable=name in written)
        try:
            call()
        except RuntimeError:
            if self.gpu.error is not None:
                raise self.gpu.error from None
            raise


def extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * stride for n, stride in steps)) * tensor.element_size()


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("ptx")
    gpu = FakeGpu(folder)
    flags = ["-fmad=false", "-gencode=arch=compute_90,code=compute_90"]
    host = ["-Werror=all-warnings", "-Xcompiler=-fPIC,-Wall,-Wextra"]
    built = compile_object(SOURCE, *flags, *host)
    launcher.define(NAMESPACE)
    library = launcher.build_library(NAMESPACE, folder, [str(built)], gpu.link_flags)
    gpu.load(library, ptx_of("sm_90"))
    return Device(gpu)


@pytest.fixture
def idle(device: Device) -> Iterator[Device]:
    """A device that is told of launches and executes none."""
    device.gpu.executes = False
    yield device
    device.gpu.executes = True


def ptx_of(arch: str, source: Path = SOURCE) -> str:
    """The PTX of the kernels in a checkout, or in a copy of it."""
    return compile_ptx(source, arch, "-fmad=false", tree=source.parents[2])
