"""Seconds on the host, seconds on the device, and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpucheck.measures import MEBIBYTE

# More than the last cache of any GPU so far holds.
FLUSHED = 256 * MEBIBYTE
# The number of calls of `seconds_to_return`, if time allows.
CALLS = 30


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, *_, high = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "low": low, "high": high}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call on the host, including the wait for the device at the end."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def seconds_to_return(run: Callable[[], Any], device: torch.device, most: float) -> list[float]:
    """Seconds until each of several calls returns, which may be before the device is done.

    Args:
        most: seconds after which no further call begins.
    """
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < CALLS and time.perf_counter() - begin < most:
        # If the device is idle, no call waits for room in its queue.
        wait(device)
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    wait(device)
    return seconds


def device_seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of single calls on the device, with its caches flushed before each."""
    for _ in range(3):
        run()
    if device.type == "cpu":
        return [host_seconds(run, device) for _ in range(rounds)]
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in pairs:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


def in_turn(
    contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, so that a slow moment affects them all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(host_seconds(run, device))
    return seconds


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions without TF32, which rounds a model's output to three digits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    got, expected = got.double(), expected.double()
    return float((got - expected).abs().max() / expected.abs().max())
