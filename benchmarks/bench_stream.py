"""Requests that arrive at random, served in one shared batch and one after the other.

Each contender serves the same requests at the same arrival times in real time: it gets a request
when its time has come, and sleeps if there is none. A load of 1 is the number of requests a second
that can be served one after the other, measured first in the same process.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from harness import case_id
from torch import Tensor, nn

import fastddim
from fastddim.choices import Spacing

RESULTS = "stream-cpu"
LOADS = (0.5, 0.9, 2.0, 4.0, 8.0)
SLOTS = 16
SPACING: Spacing = "uniform"
SECONDS = float(os.environ.get("FASTDDIM_BENCH_SECONDS", "10"))
"""Seconds of serving one after the other at load 1, which determine the number of requests."""

LEAST = 40


class PolicyHead(nn.Module):
    """A planner's denoiser: 16 actions of 7 numbers, three layers."""

    sample_shape = (112,)
    schedule = fastddim.Schedule.linear()

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(113, width), (width, width), (width, 112)]
        layers = [nn.Linear(*size) for size in sizes]
        with torch.no_grad():
            for layer in layers:
                weight = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(weight / layer.in_features**0.5)
                layer.bias.zero_()
        self.layers = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.layers(torch.cat([x, t[:, None].to(x.dtype) / 1000], dim=1))
        return output


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    steps: tuple[int, ...]  # equally likely


CASES = {
    "digits U-Net": Case(lambda: fastddim.models.load("digits"), (10, 20, 50)),
    "policy head": Case(PolicyHead, (5, 10, 20)),
}


@dataclass(frozen=True)
class Request:
    steps: int
    eta: float
    seed: int
    arrival: float  # seconds from the start


@dataclass(frozen=True)
class Served:
    """Seconds of serving the requests, in total and for each."""

    total: float
    latencies: list[float]
    samples: list[Tensor]


def make_requests(case: Case, count: int, rate: float) -> list[Request]:
    """Draw a Poisson process of `rate` requests a second, the same for every contender."""
    rng = random.Random(0)
    arrival, requests = 0.0, []
    for seed in range(count):
        requests.append(Request(rng.choice(case.steps), rng.choice([0.0, 1.0]), seed, arrival))
        arrival += rng.expovariate(rate)
    return requests


def one_after_the_other(model: Any, requests: list[Request]) -> Served:
    """Serve with a sampler for each kind of request, prepared before."""
    kinds = sorted({(request.steps, request.eta) for request in requests})
    samplers = {
        (steps, eta): fastddim.Sampler(model, steps, eta=eta, spacing=SPACING)
        for steps, eta in kinds
    }
    samples, latencies = [], []
    start = time.perf_counter()
    for request in requests:
        _sleep_until(start + request.arrival)
        samples.append(samplers[request.steps, request.eta](seed=request.seed))
        latencies.append(time.perf_counter() - start - request.arrival)
    return Served(time.perf_counter() - start, latencies, samples)


def streamed(model: Any, requests: list[Request]) -> Served:
    stream = fastddim.Stream(model, batch_size=SLOTS)
    tickets: dict[int, fastddim.stream.Ticket] = {}
    latencies = [0.0] * len(requests)
    start = time.perf_counter()
    while len(tickets) < len(requests) or stream.pending or stream.running:
        if not (stream.pending or stream.running):
            _sleep_until(start + requests[len(tickets)].arrival)
        now = time.perf_counter() - start
        while len(tickets) < len(requests) and requests[len(tickets)].arrival <= now:
            request = requests[len(tickets)]
            ticket = stream.submit(
                request.steps, eta=request.eta, seed=request.seed, spacing=SPACING
            )
            tickets[ticket.index] = ticket
        for ticket in stream.step():
            latencies[ticket.index] = time.perf_counter() - start - requests[ticket.index].arrival
    total = time.perf_counter() - start
    return Served(total, latencies, [tickets[i].result(0) for i in range(len(requests))])


CONTENDERS = {"one after the other": one_after_the_other, "stream": streamed}


@pytest.mark.parametrize("load", LOADS, ids=[f"load{load:g}" for load in LOADS])
@pytest.mark.parametrize("name", CASES, ids=case_id)
def test_stream(name: str, load: float, rows: list[dict[str, Any]], benchmark: Any) -> None:
    torch.set_num_threads(1)
    case = CASES[name]
    model = case.make()
    capacity = _capacity(case, model)
    requests = make_requests(case, max(LEAST, round(capacity * SECONDS)), load * capacity)
    served = {kind: serve(model, requests) for kind, serve in CONTENDERS.items()}
    assert_parity(*served.values())
    rows.append(
        {
            "case": name,
            "load": load,
            "slots": SLOTS,
            "steps": case.steps,
            "requests": len(requests),
            "requests_per_second": load * capacity,
            "timings": {kind: _summary(result) for kind, result in served.items()},
        }
    )
    benchmark.extra_info["requests"] = len(requests)
    few = [Request(r.steps, r.eta, r.seed, 0.0) for r in requests[:SLOTS]]
    benchmark.pedantic(lambda: streamed(model, few), rounds=3, warmup_rounds=1)


def assert_parity(alone: Served, together: Served) -> None:
    """Compare the samples, with a tolerance, since networks round differently in other batches."""
    for expected, got in zip(alone.samples, together.samples, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def _capacity(case: Case, model: Any) -> float:
    """Requests a second, served one after the other without a pause."""
    warm_up = make_requests(case, 12, 1e9)
    one_after_the_other(model, warm_up)
    streamed(model, warm_up)
    requests = make_requests(case, LEAST, 1e9)
    return len(requests) / one_after_the_other(model, requests).total


def _summary(served: Served) -> dict[str, float]:
    return {
        "requests_per_second": len(served.latencies) / served.total,
        "latency_median": statistics.median(served.latencies),
        "latency_95": statistics.quantiles(served.latencies, n=20)[-1],
    }


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
