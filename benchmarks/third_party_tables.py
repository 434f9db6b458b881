"""The tables of docs/third-party.md: few steps on networks that others trained."""

from __future__ import annotations

from typing import Any

from cpu_results import provenance, result_of
from markdown_cells import table, two

METHODS = ("order 1", "order 2", "tuned")
SOLVERS = ("own sampler", "adaptive")


def blocks() -> dict[str, str]:
    """Content of the marked places of docs/third-party.md."""
    result = result_of("third-party")
    return {
        "third-party-steps": steps_as_markdown(result),
        "third-party-own": own_as_markdown(result),
    }


def steps_as_markdown(result: dict[str, Any]) -> str:
    """Distance to the ODE's solution by number of steps, for each network and method."""
    shown = [row for row in result["rows"] if row["method"] in METHODS and _is_whole(row, result)]
    columns = sorted({row["steps"] for row in shown})
    lines = []
    for name in _networks(result):
        for method in METHODS:
            cells = {
                row["steps"]: "<br>".join(
                    _percent(row[kind] / row["apart"]) for kind in ("distance", "median")
                )
                for row in shown
                if (row["network"], row["method"]) == (name, method)
            }
            if cells:
                lines.append([name, method, *(cells.get(steps, "–") for steps in columns)])
    return "\n\n".join(
        [table(["network", "", *(f"S = {steps}" for steps in columns)], lines), _note(result)]
    )


def own_as_markdown(result: dict[str, Any]) -> str:
    """The calls and distances of Runge–Kutta solvers, and the calls that come as near."""
    lines = []
    for name in _networks(result):
        rows = [row for row in result["rows"] if row["network"] == name]
        found = {row["method"]: row for row in rows}
        if not all(solver in found for solver in SOLVERS):
            continue
        apart = next(row["apart"] for row in rows if _is_whole(row, result))
        goal = found["own sampler"]["of_few"]
        lines.append(
            [
                name,
                two(apart),
                _percent(found["accurate"]["distance"] / apart),
                *(_calls(found[solver], apart) for solver in SOLVERS),
                *(_as_near(rows, method, goal) for method in METHODS),
            ]
        )
    header = [
        "network",
        "two samples",
        "reference",
        "own sampler",
        "adaptive",
        *(f"{method}, as near as its own" for method in METHODS),
    ]
    return table(header, lines)


def _calls(row: dict[str, Any], apart: float) -> str:
    return f"{row['calls']:,}: {_percent(row['of_few'] / apart)}"


def _as_near(rows: list[dict[str, Any]], method: str, goal: float) -> str:
    """The fewest network calls of a method that come as near as `goal`."""
    tried = {row["steps"]: row["of_few"] for row in rows if row["method"] == method}
    near = [steps for steps, distance in tried.items() if distance <= goal]
    if near:
        return str(min(near))
    return f"> {max(tried)}" if tried else "–"


def _networks(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in result["rows"]))


def _is_whole(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Tell whether a row is of all latents, rather than the few of the package's own sampler."""
    count: int = max(other["count"] for other in result["rows"])
    return row["count"] == count


def _percent(share: float) -> str:
    return f"{two(100 * share)} %"


def _note(result: dict[str, Any]) -> str:
    count = max(row["count"] for row in result["rows"])
    (seed,) = {row["seed"] for row in result["rows"]}
    return (
        f"{count} latents of seed {seed}; the reference is {result['reference_steps']} steps of "
        f"order 2. {provenance(result['machine'])}"
    )
