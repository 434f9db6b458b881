"""The numbers in the README are those of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_committed_results() -> None:
    tables = load_tables()
    result = json.loads(tables.RESULTS.read_text())
    readme = (ROOT / "README.md").read_text()
    assert tables.update_readme(readme, tables.as_markdown(result)) == readme


def test_results_say_where_they_come_from() -> None:
    result = json.loads(load_tables().RESULTS.read_text())
    machine = result["machine"]
    assert all(machine[key] for key in ("cpu", "instruction_set", "threads", "torch", "commit"))
    assert machine["modified"] is False, "measured on uncommitted code"
    assert len(result["rows"]) == len({row["case"] for row in result["rows"]}) >= 10
    for row in result["rows"]:
        for timing in row["timings"].values():
            assert 0 < timing["ratio_low"] <= timing["ratio"] <= timing["ratio_high"]
