"""The CUDA kernels as plain C++: run by tests/test_cuda_host.py in a process of its own, under the
sanitizers.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastddim import philox

from ..test_update import DTYPES, LAYOUTS, make_case, poisoned_like, written_only_inside
from . import launcher
from .cases import UPDATES, assert_bits_of_cpu, update_case


@pytest.fixture(scope="module")
def host() -> Iterator[Any]:
    operators = launcher.define("fastddim_on_host")
    ctypes.CDLL(os.environ["FASTDDIM_ON_HOST"])
    yield launcher.backend("fastddim_on_host")
    del operators


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("in_place", [False, True])
def test_updates(host: Any, name: str, in_place: bool) -> None:
    assert_bits_of_cpu(host.update_out, update_case(name), in_place=in_place)


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


def test_normals(host: Any) -> None:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS[:-1]):
        case = make_case(
            torch.Generator().manual_seed(1),
            (3, 5, 7, 3),
            dtype=dtype,
            layout=layout,
            noise="keyed",
        )
        assert case.keys is not None
        out, buffer = poisoned_like(case.x)
        host.normal_out(case.keys, philox.LATENTS, out)
        expected = philox.normal(case.keys, case.x.shape[1:], philox.LATENTS).to(dtype)
        assert torch.equal(out, expected)
        assert written_only_inside(out, buffer)


@pytest.mark.parametrize("count", [1, 31, 256, 700])
def test_advance(host: Any, count: int) -> None:
    timesteps = torch.randint(0, 1000, (9,))
    counters = torch.randint(0, 8, (count + 3,))
    before, t = counters.clone(), torch.zeros(count, dtype=torch.int64)
    host.advance(counters, timesteps, t)
    assert torch.equal(counters, before + 1)
    assert torch.equal(t, timesteps[counters[:count]])
