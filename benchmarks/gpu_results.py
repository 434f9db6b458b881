"""Result files of the GPU check, and the measures in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PREDICTED = "gpu-predicted"
"""The predictions made before anything had run on a GPU; they are never rewritten."""
FIRST = "gpu-first"
"""The first run on the GPU of the predictions, with the code of the predictions."""
PREDICTED_GPU = "h100"
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Result:
    """The findings of the check on one GPU."""

    machine: dict[str, Any]
    stages: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    @cached_property
    def measured(self) -> dict[str, dict[str, Any]]:
        """The row of each measure."""
        return {row["measure"]: row for row in self.rows if "measure" in row}

    def seconds(self, measure: str, quantity: str = "seconds") -> float | None:
        """The median of a measure, or of another quantity in its row."""
        found = self.measured.get(measure, {}).get(quantity)
        return None if found is None else float(found["median"])

    def ratio(self, slower: str, faster: str) -> float | None:
        """The time of one measure as a multiple of another's."""
        long, short = self.seconds(slower), self.seconds(faster)
        return None if long is None or short is None else long / short

    def spread(self, measure: str) -> dict[str, float]:
        """Median, 20th and 80th percentile of a measure that exists."""
        found: dict[str, float] = self.measured[measure]["seconds"]
        return found

    def fastest(self, measures: Iterable[str]) -> str | None:
        """The fastest of several measures."""
        known = (measure for measure in measures if measure in self.measured)
        return min(known, key=lambda measure: self.spread(measure)["median"], default=None)

    def tests(self, stage: str) -> dict[str, Any] | None:
        """The numbers of tests in a stage that passed, failed and were skipped."""
        return next((row for row in self.rows if row["stage"] == stage and "passed" in row), None)

    @property
    def provenance(self) -> str:
        machine = self.machine
        return (
            f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, "
            f"Triton {machine['triton']}, diffusers {machine['diffusers']}, "
            f"fastddim {machine['fastddim']} at {machine['commit']}."
        )


def read(file: Path) -> Result:
    content = json.loads(file.read_text())
    return Result(content["machine"], content["stages"], content["rows"])


def measured_results(folder: Path = RESULTS) -> dict[str, Result]:
    """The result of each GPU that has been measured, by its name."""
    return {
        file.stem.removeprefix("gpu-"): read(file)
        for file in sorted(folder.glob("gpu-*.json"))
        if file.stem not in (PREDICTED, FIRST)
    }
