"""Markdown tables from result files, and their places in the README.

`python benchmarks/tables.py` rewrites the README's tables from the committed results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONTENDERS = ("fastddim", "fastddim in place", "diffusers", "eager", "torch.compile")


def steps_as_markdown(result: dict[str, Any]) -> str:
    """Time of one step as a multiple of the floor, `torch.add(x, e, out=o)`."""
    header = ["case", "floor", *CONTENDERS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in result["rows"]:
        cells = [row["case"], _duration(row["timings"]["floor"]["seconds"])]
        cells += [_ratio(row["timings"].get(name)) for name in CONTENDERS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _provenance(result["machine"])])


def dropins_as_markdown(result: dict[str, Any]) -> str:
    """Time of a step of the original and of the drop-in, and of the draw they have in common."""
    header = ["", "case", "original", "fastddim", "faster", "the draw"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in result["rows"]:
        timings, steps = row["timings"], row["steps"]
        seconds = [timings[name]["seconds"] / steps for name in ("original", "fastddim")]
        noisy = row["eta"] > 0
        cells = [row["case"], f"η = {row['eta']:g}, {'×'.join(map(str, row['shape']))}"]
        cells += [*map(_duration, seconds), _ratio(timings["original"])]
        cells += [_duration(timings["draw"]["seconds"]) if noisy else "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _provenance(result["machine"])])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step-cpu": steps_as_markdown,
    "dropins-cpu": dropins_as_markdown,
}
"""What makes the table of each result file."""


def update_readme(readme: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def _ratio(timing: dict[str, float] | None) -> str:
    if timing is None:
        return "–"
    return f"{timing['ratio']:.2f}×" if timing["ratio"] < 9.95 else f"{timing['ratio']:.0f}×"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _provenance(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']} ({machine['instruction_set']}), {machine['threads']} threads, "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, "
        f"fastddim {machine['fastddim']} at {machine['commit']}. "
        "Median of the ratios taken round by round in one process."
    )


if __name__ == "__main__":
    path = ROOT / "README.md"
    for name, as_markdown in TABLES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        path.write_text(update_readme(path.read_text(), name, as_markdown(result)))
