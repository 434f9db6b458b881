"""The policies that are timed, and the row of each in the result file."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch
from harness import against
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
from policy_tables import FLOOR, OURS

from fastddim.choices import Graph

TICKS, LEAST, WARM_UP = 1000, 3, 1
GRAPHS: tuple[Graph, ...] = (False, "loop")

CASES = {
    Case("MLP"): 10,
    Case("MLP", batch=16): 15,
    Case("small U-Net"): 45,
    Case("small U-Net", batch=16): 15,
    Case("small U-Net", ddpm=True): 20,
    Case("transformer"): 45,
    Case("default U-Net"): 15,
}
"""The seconds for the ticks of a case, of which each loop takes at most `TICKS`."""

COMPILED_CASES = [case for case in CASES if case.batch == 1 and not case.ddpm]
"""The only networks to compile, since that takes up to a minute for each."""


def measured(
    policy: Policy, *, seconds: float, most: int = TICKS, compiled: bool = False
) -> dict[str, Any]:
    """Measure a case, and return its row in the result file.

    Args:
        seconds: time for all ticks together.
        most: largest number of ticks of a loop.
        compiled: whether to time LeRobot's loop under `torch.compile` too.
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
        # The first tick compiles for the mode, captures and finds algorithms.
        timed(ticks, policy.device, seconds=0, most=WARM_UP, least=WARM_UP)
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
