"""The table of docs/tune.md: the distance of few steps from the exact solution."""

from __future__ import annotations

from typing import Any

from cpu_results import provenance, result_of
from markdown_cells import table, two


def blocks() -> dict[str, str]:
    """Content of the marked places of docs/tune.md."""
    return {"few-steps": few_steps_as_markdown(result_of("few-steps"))}


def few_steps_as_markdown(result: dict[str, Any]) -> str:
    """Mean and median distance by number of steps, for each model and kind of steps."""
    rows = result["rows"]
    columns = sorted({row["steps"] for row in rows})
    lines = []
    for name, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        cells = {
            row["steps"]: f"{two(row['distance'])}<br>{two(row['median'])}"
            for row in rows
            if (row["model"], row["way"]) == (name, way)
        }
        lines.append([name, way, *(cells.get(steps, "–") for steps in columns)])
    counts = {row["model"]: row["count"] for row in rows}
    listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
    note = (
        f"Latents of seed {result['seed']}: {listed}. The exact solution is "
        f"{result['reference_steps']} steps of order 3. {provenance(result['machine'])}"
    )
    return "\n\n".join([table(["", "", *(f"S = {steps}" for steps in columns)], lines), note])
