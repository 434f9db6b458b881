"""Tests on a real GPU: the bits of the C++ kernel on the CPU first, then streams, devices and the
loop.

Everything here is skipped, visibly, where there is no CUDA device; tests/test_graph.py has the
tests of captured loops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpucheck import memcheck
from gpucheck.device import on_device

import fastddim
from fastddim import backends, philox

from .support.gpuless.cases import (
    LONG,
    UPDATES,
    assert_advance,
    assert_bare_bits_of_cpu,
    assert_bits_of_cpu,
    assert_normals,
    update_case,
)
from .support.gpuless.fits import (
    BACKWARD_CASES,
    FIT_CASES,
    FITS,
    assert_backward_of_cpu,
    assert_fit_of_cpu,
    backward_case,
    fit_case,
)
from .support.models import elementwise_model
from .support.updates import DTYPES, make_case

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation. A GPU that one is made for and cannot be used on is a failure."""
    if request.param == "cuda" and torch.version.hip is not None:
        pytest.skip("cuda: it runs on NVIDIA GPUs only")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backends.BACKENDS[request.param].unavailable(device)
    if reason is not None:
        pytest.fail(f"{request.param}: {reason}")
    return str(request.param)


def on_gpu(function: Callable[..., None], device: str = "cuda") -> Callable[..., None]:
    return on_device(function, torch.device(device))


@pytest.mark.parametrize("name", UPDATES)
def test_updates(impl: str, name: str) -> None:
    """Hardware gives what the interpreter of PTX gave: the bits of the CPU."""
    update_out = on_gpu(backends.BACKENDS[impl].update_out)
    assert_bits_of_cpu(update_out, update_case(name))
    assert_bits_of_cpu(update_out, update_case(name), in_place=True)


@pytest.mark.parametrize("name", LONG)
def test_long_chunks(impl: str, name: str) -> None:
    assert_bare_bits_of_cpu(on_gpu(backends.BACKENDS[impl].update_out), update_case(name))


@pytest.mark.parametrize("name", FIT_CASES)
def test_fits(impl: str, name: str) -> None:
    assert_fit_of_cpu(on_gpu(backends.BACKENDS[impl].rescale_rows), *fit_case(name))


def test_fits_of_large_samples(impl: str) -> None:
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(5)
        case = make_case(generator, (3, 3, 512, 511), dtype=dtype, guided=True)
        assert_fit_of_cpu(on_gpu(backends.BACKENDS[impl].rescale_rows), case, FITS["both"])


BACKWARD = {"cuda": "backward_out", "triton": "triton_backward_out"}


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_gradients(impl: str, name: str) -> None:
    backward_out = on_gpu(getattr(torch.ops.fastddim, BACKWARD[impl]))
    assert_backward_of_cpu(backward_out, *backward_case(name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals(impl: str, dtype: torch.dtype) -> None:
    assert_normals(on_gpu(backends.BACKENDS[impl].normal_out), dtype)


def test_many_normals(impl: str) -> None:
    """Many normals have the bits of the CPU, so many that most uniforms are among them: 22 of their
    roots are of the two significands for which the square root rests on the hardware
    (tests/test_formula.py).
    """
    keys, count = philox.make_keys(7, 1), 2**28
    expected, out = torch.empty(1, count), torch.empty(1, count)
    backends.BACKENDS["cpu"].normal_out(keys, philox.LATENTS, expected)
    on_gpu(backends.BACKENDS[impl].normal_out)(keys, philox.LATENTS, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("count", [1, 31, 256, 3000])
def test_advance(impl: str, count: int) -> None:
    assert_advance(on_gpu(backends.BACKENDS[impl].advance), count)


def test_a_large_update(impl: str) -> None:
    case = make_case(torch.Generator().manual_seed(2), (8, 3, 256, 257), noise="keyed")
    assert_bits_of_cpu(on_gpu(backends.BACKENDS[impl].update_out), case)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("graph", [False, True, "loop"])
def test_the_same_image_as_on_the_cpu(impl: str, graph: bool | str, eta: float) -> None:
    """The image is that on the CPU, by a model of correctly rounded operations, which gives the
    same bits on every device.
    """
    arguments: dict[str, Any] = {"shape": (3, 3, 16, 16), "eta": eta, "seed": 7}
    expected = fastddim.sample(elementwise_model, 20, **arguments)
    got = fastddim.sample(elementwise_model, 20, device="cuda", impl=impl, graph=graph, **arguments)
    assert torch.equal(got.cpu(), expected)


def test_the_loop_never_waits(impl: str) -> None:
    """The loop never waits: torch raises on each wait of the host for the device."""
    sampler = fastddim.Sampler(
        elementwise_model, 10, shape=(2, 3, 8, 8), eta=1.0, device="cuda", impl=impl
    )
    sampler(seed=1)
    x_T = torch.randn(2, 3, 8, 8, device="cuda")
    torch.cuda.synchronize()
    samples = philox.check_samples(3, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler._loop.run(x_T, samples=samples)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used(impl: str) -> None:
    """An update on a stream of the caller's follows the caller's earlier work there."""
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
    update_out = on_gpu(backends.BACKENDS[impl].update_out, "cuda:1")
    for name in list(UPDATES)[::9]:
        assert_bits_of_cpu(update_out, update_case(name))


def test_under_compute_sanitizer(impl: str, tmp_path: Path) -> None:
    if memcheck.tool() is None:
        pytest.skip("there is no compute-sanitizer on PATH")
    device = torch.device("cuda:0")
    assert memcheck.memcheck([impl], device, tmp_path / "memcheck.txt", limit=300) is None
