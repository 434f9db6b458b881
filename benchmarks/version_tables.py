"""The tables of docs/versions.md: the versions and settings of the test runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markdown_cells import table

RESULTS = Path(__file__).resolve().parent / "results"

HEADER = ("torch", "Triton", "Python", "processor", "setting", "passed", "skipped", "at")

COMPAT_HEADER = ("diffusers", "transformers", "torch", "Python", "passed", "skipped", "at")


def blocks() -> dict[str, str]:
    """Content of the marked places of docs/versions.md."""
    return {
        "tests": table(HEADER, [_cells(result) for result in results()]),
        "compat": table(COMPAT_HEADER, [_compat_cells(result) for result in compat_results()]),
    }


def compat_results() -> list[dict[str, Any]]:
    """The records of `make test-compat`, by the release of diffusers."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("compat-*.json")]
    return sorted(found, key=lambda result: _release(result["machine"]["diffusers"]))


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


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


def _compat_cells(result: dict[str, Any]) -> list[str]:
    machine, tests = result["machine"], result["tests"]
    versions = [machine[name] for name in ("diffusers", "transformers", "torch", "python")]
    return [*versions, f"{tests['passed']:,}", f"{tests['skipped']:,}", machine["commit"]]
