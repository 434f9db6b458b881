"""A tick of a robot: ten DDIM steps of a diffusion policy, for networks from small to large.

The floor is the network alone, called as often as in a tick. All loops must make the same actions
before any is timed. On a GPU, loops with and without a graph are timed too, and the result states
the time for reading the weights from memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import case_id
from policy_cases import CASES, COMPILED_CASES, measured
from policy_loops import Case, Policy
from policy_tables import OURS, policies_as_markdown

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = f"policies-{DEVICE.type}"
as_markdown = policies_as_markdown


@pytest.mark.parametrize("case", CASES, ids=lambda case: case_id(case.name))
def test_policy(case: Case, rows: list[dict[str, Any]], benchmark: Any) -> None:
    # The other cores of a robot have work of their own.
    torch.set_num_threads(1)
    policy = Policy(case, DEVICE)
    row = measured(policy, seconds=CASES[case], compiled=case in COMPILED_CASES)
    rows.append(row)
    benchmark.extra_info["of the floor"] = row["timings"][OURS]["ratio"]
    benchmark.pedantic(policy.floor(), args=(0,), rounds=1)
