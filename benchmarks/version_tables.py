"""The table of docs/versions.md: the versions and settings that the tests were run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_cells import table

RESULTS = Path(__file__).resolve().parent / "results"

HEADER = ("torch", "Triton", "Python", "processor", "setting", "passed", "skipped", "at")


def blocks() -> dict[str, str]:
    """Content of the marked place of docs/versions.md."""
    return {"tests": table(HEADER, [_cells(result) for result in results()])}


def results() -> list[dict[str, Any]]:
    """The records written by `pytest --record`, by the release of torch."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("tests-*.json")]
    return sorted(found, key=lambda result: (result["machine"]["torch"], str(result["settings"])))


def _cells(result: dict[str, Any]) -> list[str]:
    machine, tests = result["machine"], result["tests"]
    settings = [f"`{name}={value}`" for name, value in result["settings"].items()]
    return [
        machine["torch"],
        machine["triton"],
        machine["python"],
        f"{machine['cpu']} ({machine['instruction_set']})",
        ", ".join(settings) or "–",
        f"{tests['passed']:,}",
        f"{tests['skipped']:,}",
        machine["commit"],
    ]
