"""The tables of docs/results/policy-success.md: a trained policy by its number of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cpu_results import provenance, result_of
from markdown_cells import table, two


def blocks() -> dict[str, str]:
    """Content of the marked places of docs/results/policy-success.md."""
    result = result_of("policy-success")
    return {
        "policy-success": success_as_markdown(result),
        "policy-actions": actions_as_markdown(result),
    }


def success_as_markdown(result: dict[str, Any]) -> str:
    """The share of episodes that arrive, by kind and number of steps."""

    def cell(row: Mapping[str, Any]) -> str:
        return f"{100 * row['success']:.1f} ± {100 * row['error']:.1f}"

    rows = [row for row in result["rows"] if "success" in row]
    recipe = result["recipe"]
    note = (
        f"Percent of {result['episodes']:,} episodes, ± the standard error; episodes and noise are "
        f"the same in every cell. The policy has {result['parameters']:,} parameters and was "
        f"trained for {recipe['steps']:,} steps of {recipe['batch']} chunks. "
        f"{provenance(result['machine'])}"
    )
    return f"{_by_steps(rows, ['way'], cell)}\n\n{note}"


def actions_as_markdown(result: dict[str, Any]) -> str:
    """The distance of chunks to the exact solution, of the trained and the untrained policy."""

    def cell(row: Mapping[str, Any]) -> str:
        return f"{two(row['distance'])}<br>{two(row['median'])}"

    rows = [row for row in result["rows"] if "distance" in row]
    note = (
        f"Root mean square over {result['observations']} held-out observations, each with a latent "
        "of its own, in units of the greatest speed; below it the median of the chunks. The exact "
        "solution is all 100 steps of order 2."
    )
    return f"{_by_steps(rows, ['policy', 'way'], cell)}\n\n{note}"


def _by_steps(
    rows: Sequence[Mapping[str, Any]], names: list[str], cell: Callable[[Mapping[str, Any]], str]
) -> str:
    """A line for each value of `names`, and a column for each number of steps."""
    columns = sorted({row["steps"] for row in rows})
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        found = {
            row["steps"]: cell(row) for row in rows if tuple(row[name] for name in names) == key
        }
        lines.append([*key, *(found.get(steps, "–") for steps in columns)])
    return table([*("" for _ in names), *(f"S = {steps}" for steps in columns)], lines)
