"""A tick of a robot: ten DDIM steps of a diffusion policy, for networks from small to large.

The floor is the network alone, as often as a tick evaluates it. All loops must make the same
actions before any is timed. On a GPU, loops with and without a graph are timed too, and the time
is told that reading the weights from memory takes.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict
from typing import Any

import pytest
import torch
from harness import against, case_id
from lerobot_loops import around_lerobot
from policy_loops import (
    Case,
    Policy,
    Times,
    assert_parity,
    copy_bandwidth,
    percentile,
    prepared,
    timed,
)
from policy_networks import bytes_of, parameters_of
from policy_tables import FLOOR, OURS, policies_as_markdown

from fastddim.choices import Graph

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = f"policies-{DEVICE.type}"
as_markdown = policies_as_markdown

SECONDS = float(os.environ.get("FASTDDIM_BENCH_SECONDS", "35"))
"""Of a case, within which at most `TICKS` ticks of each loop are timed."""
TICKS, LEAST = 1000, 5
GRAPHS: tuple[Graph, ...] = (False, "loop")

CASES = [
    Case("MLP"),
    Case("MLP", batch=16),
    Case("small U-Net"),
    Case("small U-Net", batch=16),
    Case("small U-Net", ddpm=True),
    Case("transformer"),
    Case("default U-Net"),
]
COMPILED_CASES = [case for case in CASES if case.batch == 1 and not case.ddpm]
"""Compiling takes up to a minute each."""


def measured(
    policy: Policy, *, seconds: float, most: int = TICKS, compiled: bool = False
) -> dict[str, Any]:
    """The row of a case in the result file.

    Args:
        seconds: of all ticks together.
        most: ticks of a loop.
        compiled: whether LeRobot's loop is timed under `torch.compile` too.
    """
    contenders = {OURS: prepared(policy)}
    on_gpu = policy.device.type == "cuda"
    for graph in GRAPHS if on_gpu else ():
        contenders[f"{OURS}, graph={graph}"] = prepared(policy, graph)
    theirs, left_out = around_lerobot(policy, compiled=compiled)
    contenders |= theirs
    assert_parity(policy, contenders)
    ticks = {FLOOR: policy.floor()}
    ticks |= {name: contender.tick for name, contender in contenders.items()}
    with torch.inference_mode():
        # The first ticks capture, or find algorithms.
        timed(ticks, policy.device, seconds=0, most=LEAST, least=LEAST)
        times = timed(ticks, policy.device, seconds=seconds, most=most, least=LEAST)
    case = policy.case
    row = {
        "case": case.name,
        "parameters": parameters_of(policy.network),
        "steps": case.steps,
        "batch": case.batch,
        "ticks": len(times[FLOOR].done),
        "timings": {name: _summary(found, times[FLOOR]) for name, found in times.items()},
        "left_out": left_out,
    }
    if on_gpu:
        read = bytes_of(policy.network) * case.steps
        row["weights_read_seconds"] = read / copy_bandwidth(policy.device)
    return row


def _summary(times: Times, floor: Times) -> dict[str, float | None]:
    return {
        **asdict(against(times.done, floor.done)),
        "seconds_99": percentile(times.done, 0.99),
        "returned_seconds": statistics.median(times.returned),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_id(case.name))
def test_policy(case: Case, rows: list[dict[str, Any]], benchmark: Any) -> None:
    # A robot's other cores have work of their own.
    torch.set_num_threads(1)
    policy = Policy(case, DEVICE)
    row = measured(policy, seconds=SECONDS, compiled=case in COMPILED_CASES)
    rows.append(row)
    benchmark.extra_info["of the floor"] = row["timings"][OURS]["ratio"]
    benchmark.pedantic(policy.floor(), args=(0,), rounds=1)
