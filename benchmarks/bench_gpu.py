"""On a GPU: one update against the bandwidth of a copy, and the loop against diffusers' loop.

The bandwidth that counts is measured beside it: `out.copy_(x)` from device memory to device memory.
An update moves more bytes than a copy of one tensor, so what is compared is bytes a second. Parity
with the CPU kernel, bit for bit, is asserted first. Nothing here runs without a CUDA device.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import machine
from loops import MODELS, diffusers_loop, make
from torch import Tensor

import fastddim
from fastddim import backends, ops, philox
from fastddim.plan import Update, coefficient_row, stack_row

RESULTS = "gpu.json"
MEBIBYTE = 2**20

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def gpu_rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of both tables; printed, and written where asked for, when all have been measured."""
    rows: list[dict[str, Any]] = []
    yield rows
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "gpu": properties.name,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "backends": [
            name
            for name, backend in backends.BACKENDS.items()
            if backend.unavailable(torch.device("cuda:0")) is None
        ],
    }
    for row in rows:
        print(row)
    folder: Path | None = request.config.getoption("--results")
    if folder is not None and not request.session.testsfailed:
        folder.mkdir(parents=True, exist_ok=True)
        result = {"machine": {**machine(), **gpu}, "rows": rows}
        (folder / RESULTS).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {folder / RESULTS}")


def device_seconds(function: Callable[[], Any], rounds: int = 50) -> list[float]:
    """Seconds on the device of single calls, the caches flushed before each."""
    flush = torch.empty(256 * MEBIBYTE, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


def spread(values: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "low": low, "high": high}


@pytest.mark.parametrize("impl", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mebibytes", [1, 16, 64, 256, 1024])
def test_update(
    impl: str, eta: float, dtype: torch.dtype, mebibytes: int, gpu_rows: list[dict[str, Any]]
) -> None:
    device = torch.device("cuda:0")
    reason = backends.BACKENDS[impl].unavailable(device)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")
    size = torch.empty(0, dtype=dtype).element_size()
    shape = (4, mebibytes * MEBIBYTE // size // 4)
    generator = torch.Generator(device).manual_seed(1)
    x, m = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    row = coefficient_row(0.4, 0.5, Update(eta=eta))
    table = stack_row(row).float()[None].to(device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    keys = philox.make_keys(7, shape[0], step_index=3, device=device) if eta else None
    options: dict[str, Any] = {"noise": None, "x_0": None, "model_input": None}

    def update() -> None:
        backends.BACKENDS[impl].update_out(x, m, table, index, keys=keys, out=out, **options)

    update()
    if impl != "reference":
        assert_bits_of_cpu(x, m, table, index, keys, out)
    ours, copy = device_seconds(update), device_seconds(lambda: out.copy_(x))
    bandwidth = 2 * x.nbytes / statistics.median(copy)
    share = [3 * x.nbytes / seconds / bandwidth for seconds in ours]
    gpu_rows.append(
        {
            "table": "update",
            "case": f"η = {eta:g}, {mebibytes} MiB, {str(dtype).removeprefix('torch.')}",
            "impl": impl,
            "seconds": spread(ours),
            "copy_bytes_per_second": bandwidth,
            "share_of_copy_bandwidth": spread(share),
        }
    )


def assert_bits_of_cpu(
    x: Tensor, m: Tensor, table: Tensor, index: Tensor, keys: philox.Keys | None, out: Tensor
) -> None:
    expected = torch.empty(out.shape, dtype=out.dtype)
    ops.update_out(
        x.cpu(),
        m.cpu(),
        table.cpu(),
        index.cpu(),
        noise=None,
        keys=None if keys is None else philox.Keys(*(key.cpu() for key in keys)),
        out=expected,
        x_0=None,
        model_input=None,
    )
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_loop(name: str, eta: float, gpu_rows: list[dict[str, Any]]) -> None:
    """Seconds of 50 steps as the host sees them, the device awaited at the end."""
    model, shape = make(name, "cuda")
    steps = 50
    schedule = fastddim.Schedule.linear()
    x_T = fastddim.philox.initial_latents(shape, 0, device="cuda")
    samplers = {
        f"graph={graph!r}": fastddim.Sampler(
            model, steps, shape=shape, schedule=schedule, eta=eta, device="cuda", graph=graph
        )
        for graph in (False, True, "loop")
    }
    results = [sampler(x_T=x_T, seed=3) for sampler in samplers.values()]
    assert all(torch.equal(result, results[0]) for result in results)
    contenders: dict[str, Callable[[], Any]] = {
        name: (lambda sampler=sampler: sampler(x_T=x_T, seed=3))
        for name, sampler in samplers.items()
    }
    contenders["diffusers"] = diffusers_loop(model, x_T, steps, eta)
    if not eta:
        torch.testing.assert_close(contenders["diffusers"](), results[0], rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(15):
        for contender, run in contenders.items():
            seconds[contender].append(host_seconds(run))
    gpu_rows.append(
        {
            "table": "loop",
            "case": f"{name}, η = {eta:g}",
            "steps": steps,
            "seconds": {contender: spread(values) for contender, values in seconds.items()},
        }
    )


def host_seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
