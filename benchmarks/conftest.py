"""Collects what the benchmarks measure into one result file and prints it as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import machine
from tables import as_markdown

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        default=RESULTS / "step-cpu.json",
        help="where the rows of the step benchmark are written",
    )


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows to add to; written when all benchmarks have passed."""
    collected: list[dict[str, Any]] = []
    yield collected
    if request.session.testsfailed or not collected:
        return
    result = {"machine": machine(), "rows": collected}
    path: Path = request.config.getoption("--results")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n\n{as_markdown(result)}\n\nwritten to {path}")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
