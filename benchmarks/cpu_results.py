"""Result files of benchmarks on the CPU, and the sentences that state their origin."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from markdown_cells import gain

RESULTS = Path(__file__).resolve().parent / "results"


@cache
def result_of(name: str) -> Any:
    """The content of a result file, read once."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratio(timing: dict[str, float] | None) -> str:
    """The time of a contender as a multiple of ours; a dash if it was not timed."""
    return "–" if timing is None else f"{gain(timing['ratio'])}×"


def paired(machine: dict[str, Any]) -> str:
    """The machine and versions of a result whose timings are ratios."""
    return f"{provenance(machine)} Median of the ratios taken round by round in one process."


def provenance(machine: dict[str, Any]) -> str:
    """The machine and the versions of a result."""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{machine['cpu']} ({machine['instruction_set']}), {threads}, torch {machine['torch']}, "
        f"diffusers {machine['diffusers']}, fastddim {machine['fastddim']} at {machine['commit']}."
    )
