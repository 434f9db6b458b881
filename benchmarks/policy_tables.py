"""Tables of what a tick of a robot's policy takes, by network and loop."""

from __future__ import annotations

from typing import Any

from cpu_results import provenance, result_of
from markdown_cells import duration, table

FLOOR, OURS = "network alone", "fastddim"
THEIRS, INSTALLED, COMPILED = "LeRobot", "LeRobot, fastddim installed", "LeRobot, torch.compile"
CONTENDERS = (OURS, INSTALLED, THEIRS, COMPILED)


def blocks() -> dict[str, str]:
    """Content of the marked places of docs/results/policy-speed.md."""
    return {"policies": policies_as_markdown(result_of("policies-cpu"))}


def policies_as_markdown(result: dict[str, Any]) -> str:
    """The time of a tick, as a multiple of the network's alone, and the slowest tick in a
    hundred.
    """
    timed = [name for row in result["rows"] for name in row["timings"] if name != FLOOR]
    timed = sorted(dict.fromkeys(timed), key=_place)
    extra = ["weights read"] if "weights_read_seconds" in result["rows"][0] else []
    header = ["policy", "parameters", "S", "ticks", FLOOR, *extra, *timed]
    ratios, slowest = [], []
    for row in result["rows"]:
        timings = row["timings"]
        about = [row["case"], millions(row["parameters"]), str(row["steps"]), str(row["ticks"])]
        cells = [duration(timings[FLOOR]["seconds"])]
        cells += [duration(row[f"{name.replace(' ', '_')}_seconds"]) for name in extra]
        ratios.append([*about, *cells, *(_ratio(timings.get(name)) for name in timed)])
        slow = [_slow(timings.get(name)) for name in (FLOOR, *timed)]
        slowest.append([row["case"], str(row["ticks"]), *slow])
    return "\n\n".join(
        [
            table(header, ratios),
            "The 99th percentile of a tick, where there were a hundred or more:",
            table(["policy", "ticks", FLOOR, *timed], slowest),
            *_left_out(result),
            f"{provenance(result['machine'])} Median of the ratios taken tick by tick in one "
            "process.",
        ]
    )


def _place(contender: str) -> tuple[int, str]:
    """Its place in the tables; those with a kind of graph come last."""
    known = contender in CONTENDERS
    return CONTENDERS.index(contender) if known else len(CONTENDERS), contender


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2g} M" if parameters < 1e7 else f"{parameters / 1e6:.0f} M"


def _ratio(timing: dict[str, float] | None) -> str:
    return "–" if timing is None else f"{timing['ratio']:.3f}×"


def _slow(timing: dict[str, Any] | None) -> str:
    if timing is None or timing["seconds_99"] is None:
        return "–"
    return duration(timing["seconds_99"])


def _left_out(result: dict[str, Any]) -> list[str]:
    """The sentence that says what was not timed and why."""
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["left_out"].items():
            reasons.setdefault(f"{name}: {reason}", []).append(row["case"])
    if not reasons:
        return []
    said = "; ".join(f"{why} ({', '.join(cases)})" for why, cases in reasons.items())
    return [f"Left out: {said}."]
