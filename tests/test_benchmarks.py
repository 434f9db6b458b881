"""The numbers in the README are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tables
from quality import grid

ROOT = Path(__file__).resolve().parent.parent


def result_of(name: str) -> Any:
    return json.loads((tables.RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("place", [*tables.TABLES, *tables.SUMMARIES])
def test_readme_shows_the_committed_results(place: str) -> None:
    readme = (ROOT / "README.md").read_text()
    assert tables.update_readme(readme, place, tables.blocks()[place]) == readme


@pytest.mark.parametrize("name", tables.TABLES)
def test_results_say_where_they_come_from(name: str) -> None:
    result = result_of(name)
    machine = result["machine"]
    assert all(machine[key] for key in ("cpu", "instruction_set", "threads", "torch", "commit"))
    assert machine["modified"] is False, "measured on uncommitted code"
    cases = [
        str({k: v for k, v in row.items() if k != "seconds" and not isinstance(v, dict)})
        for row in result["rows"]
    ]
    assert len(set(cases)) == len(cases) >= 7


@pytest.mark.parametrize("name", ["step-cpu", "dropins-cpu", "loops-cpu", "sampling-cpu"])
def test_timings_have_their_spread(name: str) -> None:
    result = result_of(name)
    for row in result["rows"]:
        for timing in row["timings"].values():
            assert 0 < timing["ratio_low"] <= timing["ratio"] <= timing["ratio_high"]


@pytest.mark.parametrize("name", ["quality-digits", "quality-fashion"])
def test_quality_is_that_of_the_bundled_model(name: str) -> None:
    result = result_of(name)
    assert {row["weights"] for row in result["rows"]} == {grid.fingerprint(result["data"])}
    for row in result["rows"]:
        assert row["classifier"]["distance"] > 0 < row["classifier"]["error"]
