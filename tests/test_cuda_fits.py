"""Rows fitted to their data and gradients by the CUDA kernels, executed: the PTX that nvcc made of
them, on an interpreter, bit for bit against the C++ kernels on the CPU.
"""

from __future__ import annotations

import pytest

from .support.environment import needs_compiler, needs_extension
from .support.gpuless.cuda_on_ptx import Device, device
from .support.gpuless.fits import (
    BACKWARD_CASES,
    FIT_CASES,
    assert_backward_of_cpu,
    assert_fit_of_cpu,
    backward_case,
    fit_case,
)
from .support.gpuless.toolchain import needs_nvcc

__all__ = ["device"]

pytestmark = [needs_compiler, needs_extension, needs_nvcc]


@pytest.mark.parametrize("name", FIT_CASES)
def test_fits(device: Device, name: str) -> None:
    assert_fit_of_cpu(device.rescale_rows, *fit_case(name))


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_gradients(device: Device, name: str) -> None:
    assert_backward_of_cpu(device.backward_out, *backward_case(name))
