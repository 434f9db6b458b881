"""Collects the measurements of benchmarks into one result file, and prints them as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import machine
from tables import TABLES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        help="the folder that result files are written into, if any",
    )


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows to add to; printed, and written if requested, after all benchmarks have passed."""
    collected: list[dict[str, Any]] = []
    yield collected
    if request.session.testsfailed or not collected:
        return
    result = {"machine": machine(), "rows": collected}
    name: str = request.module.RESULTS
    as_markdown = getattr(request.module, "as_markdown", None) or TABLES[name]
    print(f"\n\n{as_markdown(result)}\n")
    folder: Path | None = request.config.getoption("--results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
