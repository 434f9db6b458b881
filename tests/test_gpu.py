"""On a real GPU: the bits of the C++ kernel on the CPU first, then streams, devices and the loop.

Everything here is skipped, visibly, where there is no CUDA device; tests/test_graph.py has the
tests of captured loops.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends, philox

from .gpuless.cases import UPDATES, assert_advance, assert_bits_of_cpu, assert_normals, update_case
from .helpers import elementwise_model
from .test_native import ROOT
from .test_update import DTYPES, make_case

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backends.BACKENDS[request.param].unavailable(device)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def moved(value: Any, device: torch.device, places: dict[int, Tensor]) -> Any:
    """A tensor with the same strides on the device; a tensor given twice stays one tensor."""
    if isinstance(value, philox.Keys):
        return philox.Keys(*(moved(key, device, places) for key in value))
    if not isinstance(value, Tensor):
        return value
    if id(value) not in places:
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        places[id(value)] = copy.copy_(value) if value.numel() else copy
    return places[id(value)]


def on_gpu(function: Callable[..., None], device: torch.device | None = None) -> Any:
    """A backend's function for CPU tensors: they go there and what was written comes back."""

    def call(*arguments: Any, **named: Any) -> None:
        target = device or torch.device("cuda")
        places: dict[int, Tensor] = {}
        there = [moved(value, target, places) for value in arguments]
        function(*there, **{k: moved(v, target, places) for k, v in named.items()})
        for value in (*arguments, *named.values()):
            # An expanded input has places that several elements share.
            if isinstance(value, Tensor) and value.numel() and 0 not in value.stride():
                value.copy_(places[id(value)])

    return call


@pytest.mark.parametrize("name", UPDATES)
def test_updates(impl: str, name: str) -> None:
    """Hardware gives what the interpreter of PTX gave: the bits of the CPU."""
    update_out = on_gpu(backends.BACKENDS[impl].update_out)
    assert_bits_of_cpu(update_out, update_case(name))
    assert_bits_of_cpu(update_out, update_case(name), in_place=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals(impl: str, dtype: torch.dtype) -> None:
    assert_normals(on_gpu(backends.BACKENDS[impl].normal_out), dtype)


@pytest.mark.parametrize("count", [1, 31, 256, 3000])
def test_advance(impl: str, count: int) -> None:
    assert_advance(on_gpu(backends.BACKENDS[impl].advance), count)


def test_a_large_update(impl: str) -> None:
    case = make_case(torch.Generator().manual_seed(2), (8, 3, 256, 257), noise="keyed")
    assert_bits_of_cpu(on_gpu(backends.BACKENDS[impl].update_out), case)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("graph", [False, True, "loop"])
def test_the_same_image_as_on_the_cpu(impl: str, graph: bool | str, eta: float) -> None:
    """A model of correctly rounded operations, which gives the same bits on every device."""
    arguments: dict[str, Any] = {"shape": (3, 3, 16, 16), "eta": eta, "seed": 7}
    expected = fastddim.sample(elementwise_model, 20, **arguments)
    got = fastddim.sample(elementwise_model, 20, device="cuda", impl=impl, graph=graph, **arguments)
    assert torch.equal(got.cpu(), expected)


def test_the_loop_never_waits(impl: str) -> None:
    """torch raises on whatever would make the host wait for the device."""
    sampler = fastddim.Sampler(
        elementwise_model, 10, shape=(2, 3, 8, 8), eta=1.0, device="cuda", impl=impl
    )
    sampler(seed=1)
    x_T = torch.randn(2, 3, 8, 8, device="cuda")
    torch.cuda.synchronize()
    keys = philox.make_keys(3, 2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler._loop.run(x_T, keys=keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used(impl: str) -> None:
    """An update on a stream of the caller's follows what he queued there before."""
    case = make_case(torch.Generator().manual_seed(2), (64, 3, 64, 64))
    stream = torch.cuda.Stream()
    x, m, table, row = (v.cuda() for v in (case.x, case.model_output, case.table, case.row))
    expected, late = torch.empty_like(x), torch.zeros_like(x)
    options: dict[str, Any] = {"noise": None, "keys": None, "x_0": None, "model_input": None}
    backends.BACKENDS[impl].update_out(x, m, table, row, out=expected, **options)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        backends.BACKENDS[impl].update_out(late, m, table, row, out=late, **options)
    stream.synchronize()
    assert torch.equal(late, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device(impl: str) -> None:
    """The tensors' device counts, not the current one."""
    update_out = on_gpu(backends.BACKENDS[impl].update_out, torch.device("cuda:1"))
    for name in list(UPDATES)[::9]:
        assert_bits_of_cpu(update_out, update_case(name))


def test_under_compute_sanitizer(impl: str) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("there is no compute-sanitizer on PATH")
    tests = [f"{ROOT}/tests/test_gpu.py", "-k", f"test_updates and {impl}"]
    for checks in ("memcheck", "racecheck", "initcheck"):
        result = subprocess.run(
            [
                *(tool, "--tool", checks, "--error-exitcode", "9"),
                *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-3000:]
