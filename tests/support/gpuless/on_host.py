"""The CUDA kernels as plain C++: run by tests/test_cuda_host.py in a process of its own, under the
sanitizers.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch

from ..updates import DTYPES, make_case
from . import launcher
from .cases import (
    EACH_WAY,
    LONG,
    assert_advance,
    assert_bare_bits_of_cpu,
    assert_bits_of_cpu,
    assert_normals,
    update_case,
)
from .fits import (
    BACKWARD_CASES,
    FIT_CASES,
    assert_backward_of_cpu,
    assert_fit_of_cpu,
    backward_case,
    fit_case,
)

# One of each dtype: aligned, and not.
QUICK = list(LONG)[3::6]


@pytest.fixture(scope="module")
def host() -> Any:
    launcher.define("fastddim_on_host")
    ctypes.CDLL(os.environ["FASTDDIM_ON_HOST"])
    return launcher.backend("fastddim_on_host")


@pytest.mark.parametrize(("name", "in_place"), EACH_WAY)
def test_updates(host: Any, name: str, in_place: bool) -> None:
    assert_bits_of_cpu(host.update_out, update_case(name), in_place=in_place)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if i % 5 == 2 else pytest.mark.deep)
        for i, name in enumerate(LONG)
    ],
)
def test_long_chunks(host: Any, name: str) -> None:
    assert_bare_bits_of_cpu(host.update_out, update_case(name), alone="bfloat16" in name)


# Those of the quick ones are of both kernels and all layouts.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if i % 9 == 0 else pytest.mark.deep)
        for i, name in enumerate(FIT_CASES)
    ],
)
def test_fits(host: Any, name: str) -> None:
    assert_fit_of_cpu(host.rescale_rows, *fit_case(name))


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_gradients(host: Any, name: str) -> None:
    assert_backward_of_cpu(host.backward_out, *backward_case(name))


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments(host: Any, dtype: torch.dtype, offset: int) -> None:
    """Views that begin at any element of a buffer, whose other elements stay as they are."""
    generator = torch.Generator().manual_seed(3)
    case = make_case(generator, (2, 3, 8), dtype=dtype, noise="keyed")
    buffer = torch.full((case.x.numel() + 16,), 7.0, dtype=dtype)
    view = buffer[offset : offset + case.x.numel()].view(case.x.shape)
    view.copy_(case.x)
    host.update_out(
        *(view, case.model_output, case.table, case.row),
        **{"noise": None, "keys": case.keys, "out": view, "x_0": None, "model_input": None},
    )
    expected = assert_bits_of_cpu(host.update_out, case)
    assert torch.equal(view, expected.out)
    assert written_only_inside_view(buffer, offset, view.numel())


def written_only_inside_view(buffer: torch.Tensor, offset: int, count: int) -> bool:
    outside = torch.cat([buffer[:offset], buffer[offset + count :]])
    return bool((outside == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals(host: Any, dtype: torch.dtype) -> None:
    assert_normals(host.normal_out, dtype)


@pytest.mark.parametrize("count", [1, 31, 256, 700])
def test_advance(host: Any, count: int) -> None:
    assert_advance(host.advance, count)
