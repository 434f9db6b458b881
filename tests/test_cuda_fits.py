"""Rows fitted to their data, and gradients, by the CUDA kernels: their PTX runs on an interpreter,
and is compared bit for bit with the C++ kernels on the CPU.
"""

from __future__ import annotations

import re

import pytest
import torch

from .support.environment import needs_compiler, needs_extension
from .support.gpuless import ptx
from .support.gpuless.cases import same_bits
from .support.gpuless.cuda_on_ptx import Device, device, idle, ptx_of
from .support.gpuless.fits import (
    BACKWARD_CASES,
    FIT_CASES,
    assert_backward_of_cpu,
    assert_fit_of_cpu,
    backward_case,
    fit_case,
    fitted,
    gradients,
)
from .support.gpuless.toolchain import needs_nvcc
from .support.updates import DTYPES, make_case

__all__ = ["device", "idle"]

pytestmark = [needs_compiler, needs_extension, needs_nvcc]


def test_one_launch_of_each_kernel(idle: Device) -> None:
    """The cases reach all kernels; a block of a fit takes a sample."""
    names = set()
    for fit, name in (*((True, n) for n in FIT_CASES), *((False, n) for n in BACKWARD_CASES)):
        if fit:
            case, rescaling = fit_case(name)
            fitted(idle.rescale_rows, case, rescaling, case.table, case.row)
        else:
            case, *given = backward_case(name)
            gradients(idle.backward_out, case, (case.table, case.row), *given)
        expected = len(case.x) > 0 if fit else case.x.numel() > 0
        assert len(idle.gpu.launches) == expected, name
        for launch in idle.gpu.launches:
            assert (launch.stream, launch.shared_bytes) == (0x51, 0)
            assert not fit or (launch.grid, launch.block) == ((len(case.x), 1, 1), (256, 1, 1))
            names.add(launch.name)
    assert idle.gpu.module is not None
    assert names == {
        name
        for name in idle.gpu.module.kernels
        if re.search(r"\d(fit|backward|backward_strided)I", name)
    }


@pytest.mark.parametrize(
    "arch",
    ["sm_80", *(pytest.param(arch, marks=pytest.mark.deep) for arch in ("sm_100", "sm_120"))],
)
def test_other_targets(device: Device, arch: str) -> None:
    """The output of nvcc for other GPUs gives the same bits."""
    before = device.gpu.module
    device.gpu.module = ptx.parse(ptx_of(arch))
    try:
        for name in list(FIT_CASES)[::5]:
            assert_fit_of_cpu(device.rescale_rows, *fit_case(name))
        for name in list(BACKWARD_CASES)[::7]:
            assert_backward_of_cpu(device.backward_out, *backward_case(name))
    finally:
        device.gpu.module = before


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments(device: Device, dtype: torch.dtype) -> None:
    """Gradients in views that begin at any element of a buffer."""
    case = make_case(torch.Generator().manual_seed(3), (2, 3, 16), dtype=dtype, clip=0.7)
    grad = torch.randn(case.x.shape).to(dtype)
    rows = (case.table, case.row)
    expected = gradients(torch.ops.fastddim.backward_out, case, rows, grad, None)[:2]
    for offset in range(9):
        buffers = [torch.full((112,), 7.0, dtype=dtype) for _ in range(3)]
        views = [b[offset : offset + 96].view(2, 3, 16) for b in buffers]
        views[0].copy_(grad)
        given = (views[0], None, case.x, case.model_output, case.table, case.row, None)
        device.backward_out(*given, *views[1:])
        for view, buffer, right in zip(views[1:], buffers[1:], expected, strict=True):
            assert same_bits(view, right)
            assert (torch.cat([buffer[:offset], buffer[offset + 96 :]]) == 7.0).all()


@pytest.mark.parametrize("name", FIT_CASES)
def test_fits(device: Device, name: str) -> None:
    assert_fit_of_cpu(device.rescale_rows, *fit_case(name))


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_gradients(device: Device, name: str) -> None:
    assert_backward_of_cpu(device.backward_out, *backward_case(name))
