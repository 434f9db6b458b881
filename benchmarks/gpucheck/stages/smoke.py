"""A quick check that something works: a few updates and the loop, bit for bit against the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastddim
from fastddim import backends
from gpucheck.cases import CASES, correctly_rounded, differing
from gpucheck.device import on_device
from gpucheck.record import Record
from gpucheck.settings import Settings

LOOP: dict[str, Any] = {
    "shape": (2, 3, 16, 16),
    "schedule": fastddim.Schedule.linear(),
    "eta": 1.0,
    "seed": 7,
}
STEPS = 10


def run(record: Record, settings: Settings) -> None:
    compiled = _count_triton_cache(record)
    for implementation in settings.implementations:
        backend = backends.BACKENDS[implementation]
        reason = backend.unavailable(settings.device)
        if reason is not None:
            record.problem(impl=implementation, unavailable=reason)
            continue
        compare(record, implementation, on_device(backend.update_out, settings.device))
        compare_loops(record, implementation, settings)
    record.show(triton_cache=compiled)


def compare(record: Record, implementation: str, update_out: Callable[..., None]) -> None:
    """Record, for each case, whether the bits are those of the CPU's kernel."""
    for name, case in CASES.items():
        about = {"impl": implementation, "case": name}
        start = time.perf_counter()
        wrong = record.attempt(partial(differing, update_out, case), **about)
        if wrong is None:
            continue
        say = record.problem if any(wrong.values()) else record.row
        say(**about, wrong=wrong, seconds=round(time.perf_counter() - start, 4))


def compare_loops(record: Record, implementation: str, settings: Settings) -> None:
    """Record, for each kind of graph, whether the image is that of the CPU."""
    expected = image(device="cpu")
    for mode in settings.modes:
        about = {"impl": implementation, "graph": mode}
        got = record.attempt(partial(image, device=settings.device, **about), **about)
        if got is not None:
            equal = torch.equal(got.cpu(), expected)
            (record.show if equal else record.problem)(**about, loop_equal_to_cpu=equal)


def image(**options: Any) -> Tensor:
    """A sample from a model that gives the same bits on every device."""
    return fastddim.sample(correctly_rounded, STEPS, **LOOP, **options)


def _count_triton_cache(record: Record) -> dict[str, int]:
    """Counts of kernels found in Triton's cache and of kernels compiled, updated continuously."""
    counts = {"hits": 0, "compiled": 0}

    def listen(*, cache_hit: bool, **_: Any) -> None:
        counts["hits" if cache_hit else "compiled"] += 1

    try:
        from triton import knobs
    except ImportError as error:
        record.lacks(f"Triton ({error})")
    else:
        knobs.compilation.listener = listen
    return counts
