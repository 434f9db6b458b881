"""The interpreter of PTX behind launchers that nvcc built, on a stand-in for the CUDA runtime."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpucheck.machine_code import nvcc

from .support.environment import ROOT, needs_compiler
from .support.gpuless import ptx
from .support.gpuless.gpu import FakeGpu
from .support.gpuless.toolchain import compile_ptx, compile_shared, needs_nvcc

LAUNCHERS = ROOT / "tests/support/gpuless/launchers.cu"


@pytest.fixture(scope="module")
def launched_text() -> str:
    if nvcc() is None:
        pytest.skip("there is no nvcc")
    return compile_ptx(LAUNCHERS, "sm_90", "-fmad=false")


class Launcher(NamedTuple):
    gpu: FakeGpu
    library: ctypes.CDLL


@pytest.fixture(scope="module")
def launchers(
    launched_text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Launcher, Launcher]:
    """Two launchers, each of which must find its own runtime."""
    made = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("launcher")
        gpu = FakeGpu(folder)
        library = compile_shared(LAUNCHERS, "sm_90", folder / "kernels.so", gpu, "-fmad=false")
        made.append(Launcher(gpu, gpu.load(library, launched_text)))
    return made[0], made[1]


@pytest.fixture
def launcher(launchers: tuple[Launcher, Launcher]) -> Iterator[Launcher]:
    for each in launchers:
        each.gpu.reset()
    yield launchers[0]
    assert launchers[1].gpu.launches == []


def launch_fused(
    launcher: Launcher,
    values: torch.Tensor,
    out: torch.Tensor,
    blocks: int = 2,
    threads: int = 32,
    shared: int = 0,
    stream: int = 0x77,
) -> int:
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
    rest = (ctypes.c_int64(shared), ctypes.c_void_p(stream))
    return launcher.library.launch_fused(*pointers, blocks, threads, *rest)


@needs_nvcc
@needs_compiler
def test_launch_through_the_runtime(launcher: Launcher) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    launcher.gpu.memory.add_tensor(values, "values", writable=False)
    launcher.gpu.memory.add_tensor(out, "out")
    assert launch_fused(launcher, values, out, shared=256) == 0
    expected = (values.double() * 3 + 1).float()
    assert torch.equal(out, expected)
    (launch,) = launcher.gpu.launches
    assert launch.name == "fused"
    assert launch.grid == (2, 1, 1)
    assert launch.block == (32, 1, 1)
    assert launch.shared_bytes == 256
    assert launch.stream == 0x77
    assert launch.stats.executed["fma.rn.f32"] == 64


@needs_nvcc
@needs_compiler
def test_a_violation_is_an_error_of_the_launch(launcher: Launcher) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    launcher.gpu.memory.add_tensor(values[:63], "values", writable=False)
    launcher.gpu.memory.add_tensor(out, "out")
    assert launch_fused(launcher, values, out) == 700
    assert "out of bounds" in str(launcher.gpu.error)
    assert launcher.gpu.launches == []
    launcher.library.error_text.restype = ctypes.c_char_p
    assert launcher.library.error_text(700) == b"an illegal memory access was encountered"
    # The error was reported once; the next launch is judged by itself.
    launcher.gpu.reset()
    launcher.gpu.memory.add_tensor(values, "values", writable=False)
    launcher.gpu.memory.add_tensor(out, "out")
    assert launch_fused(launcher, values, out) == 0


@needs_nvcc
@needs_compiler
def test_a_failure_of_the_interpreter_is_no_success(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(ptx, "run", broken)
    assert launch_fused(launcher, torch.zeros(64), torch.zeros(64)) == 999
    assert isinstance(launcher.gpu.error, ptx.PtxError)
    assert isinstance(launcher.gpu.error.__cause__, KeyError)


@needs_nvcc
@needs_compiler
def test_invalid_configurations(launcher: Launcher) -> None:
    values, out = torch.randn(64), torch.zeros(64)
    assert launch_fused(launcher, values, out, blocks=0) == 9
    assert launch_fused(launcher, values, out, threads=0) == 9
    assert launch_fused(launcher, values, out, threads=1025) == 9
    assert launch_fused(launcher, values, out, shared=48 * 1024 + 1) == 1
    pointer = ctypes.c_void_p(out.data_ptr())
    for shape in ((1, 65536, 1, 1, 1, 1), (1, 1, 65536, 1, 1, 1), (1, 1, 1, 1, 1, 65),
                  (1, 1, 1, 32, 33, 1), (1, 1, 1, 65536, 65536, 1)):  # fmt: skip
        assert launcher.library.launch_grid(pointer, *shape) == 9
    assert launcher.gpu.launches == []
    assert launcher.gpu.error is None


@needs_nvcc
@needs_compiler
def test_large_parameters(launcher: Launcher) -> None:
    """Large parameters work: a structure of 4016 bytes by value, indexed at run time."""

    class Large(ctypes.Structure):
        _fields_ = (
            ("values", ctypes.c_float * 1000),
            ("scale", ctypes.c_int64),
            ("last", ctypes.c_char),
        )

    large = Large((ctypes.c_float * 1000)(*range(1000)), 3, b"\x05")
    out = torch.zeros(64)
    launcher.gpu.memory.add_tensor(out, "out")
    code = launcher.library.launch_large(
        ctypes.byref(large), ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(1)
    )
    assert (code, launcher.gpu.error) == (0, None)
    assert out.tolist() == [i * 37 % 1000 * 3.0 + 5.0 for i in range(64)]


@needs_nvcc
@needs_compiler
def test_without_an_interpreter_there_is_no_driver(tmp_path: Path, launched_text: str) -> None:
    gpu = FakeGpu(tmp_path)
    library = gpu.load(
        compile_shared(LAUNCHERS, "sm_90", tmp_path / "kernels.so", gpu), launched_text
    )
    gpu.disconnect()
    assert launch_fused(Launcher(gpu, library), torch.zeros(64), torch.zeros(64)) == 35


@needs_nvcc
@needs_compiler
def test_the_runtime_offers_what_launchers_need_and_no_more(
    launchers: tuple[Launcher, Launcher],
) -> None:
    """The runtime offers what launchers need and no more: a launcher that allocates, copies or
    waits would not link.
    """
    runtime = symbols("--defined-only", launchers[0].gpu.library)
    assert runtime - {"stand_in_set_callback", "FASTDDIM_STAND_IN"} == {
        "__cudaGetKernel",
        "__cudaLaunchKernel",
        "__cudaPopCallConfiguration",
        "__cudaPushCallConfiguration",
        "__cudaRegisterFatBinary",
        "__cudaRegisterFatBinaryEnd",
        "__cudaRegisterFunction",
        "__cudaUnregisterFatBinary",
        "cudaGetErrorString",
        "cudaGetLastError",
    }


def symbols(which: str, library: Path) -> set[str]:
    lines = subprocess.run(
        ["nm", "-D", which, str(library)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}
