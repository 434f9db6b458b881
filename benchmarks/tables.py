"""Markdown tables from result files, and their place in the README.

`python benchmarks/tables.py` rewrites the README's table from the committed results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step-cpu.json"
CONTENDERS = ("fastddim", "fastddim in place", "diffusers", "eager", "torch.compile")
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def as_markdown(result: dict[str, Any]) -> str:
    """Time of one step as a multiple of the floor, `torch.add(x, e, out=o)`."""
    header = ["case", "floor", *CONTENDERS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in result["rows"]:
        cells = [row["case"], _duration(row["timings"]["floor"]["seconds"])]
        cells += [_ratio(row["timings"].get(name)) for name in CONTENDERS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _provenance(result["machine"])])


def update_readme(readme: str, table: str) -> str:
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


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
    path.write_text(update_readme(path.read_text(), as_markdown(json.loads(RESULTS.read_text()))))
