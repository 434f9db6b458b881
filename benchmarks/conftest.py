"""Collects what the benchmarks measure into one result file and prints it as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import machine
from tables import RESULTS, TABLES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        default=RESULTS,
        help="the folder that result files are written into",
    )


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows to add to; written to the module's file when all benchmarks have passed."""
    collected: list[dict[str, Any]] = []
    yield collected
    if request.session.testsfailed or not collected:
        return
    result = {"machine": machine(), "rows": collected}
    name: str = request.module.RESULTS
    path: Path = request.config.getoption("--results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n\n{TABLES[name](result)}\n\nwritten to {path}")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
