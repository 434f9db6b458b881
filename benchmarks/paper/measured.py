"""Plots of committed results: quality by calls of the model, seconds by steps, trained policies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headline import equal_quality
from quality_tables import FEW_KINDS, PAPER_RECONSTRUCTION, TUNED, baseline_of

from .plots import Level, Line, Note, Plot
from .style import BLUE, FAINT, GREEN, ORANGE, PURPLE, TEXT


def consistency_plot(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Distance to the image of most steps by steps, of the rows of one model."""
    lines = []
    for eta, color, marker in ((0.0, BLUE, "o"), (1.0, ORANGE, "s")):
        own = [row for row in rows if row["eta"] == eta]
        steps, distances = [row["steps"] for row in own], [row["distance"] for row in own]
        errors = [row["error"] for row in own]
        lines.append(
            Line(f"η = {eta:g}", steps, distances, color, marker, error=errors, named="end")
        )
    measure = f"relative distance to the image of {rows[0]['reference_steps']:,} steps"
    level = Level("two images of different $x_T$", 1.0)
    return Plot(rows[0]["data"], lines, "steps S", measure, [level])


def reconstruction_plot(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Error by steps, of the rows of one model, with the paper's."""
    lines = []
    for refine, color, marker in (
        (refine, *style)
        for refine, style in zip(
            sorted({row["refine"] for row in rows}), ((BLUE, "o"), (GREEN, "^")), strict=True
        )
    ):
        own = [row for row in rows if row["refine"] == refine]
        label = f"refine={refine}" if refine else "invert"
        steps, errors = [row["steps"] for row in own], [row["mse"] for row in own]
        bars = [row["error"] for row in own]
        lines.append(Line(label, steps, errors, color, marker, error=bars, named="end"))
    steps = [steps for steps in PAPER_RECONSTRUCTION if steps in lines[0].x]
    errors = [PAPER_RECONSTRUCTION[s] for s in steps]
    paper = Line("the paper", steps, errors, FAINT, "x", (0, (4, 3)), named="end")
    measure = "squared error of a pixel; the paper's is of CIFAR10"
    return Plot(rows[0]["data"], [*lines, paper], "steps S, each way", measure)


def quality_plot(result: dict[str, Any]) -> Plot:
    """One line for each kind of few steps that a model was measured with, and DDPM's level.

    A note says from how many tuned calls on samples are as good, by the rule of the table.
    """
    lines = []
    for kind, color, marker in zip(
        FEW_KINDS, (ORANGE, BLUE, GREEN, PURPLE), ("s", "o", "^", "D"), strict=True
    ):
        rows = kind.rows(result)
        # Not all models have tuned steps.
        if rows:
            cells = [row["classifier"] for row in rows]
            steps, distances = [row["steps"] for row in rows], [cell["distance"] for cell in cells]
            errors = [cell["error"] for cell in cells]
            lines.append(
                Line(kind.label, steps, distances, color, marker, error=errors, named="start")
            )
    distance, error = baseline_of(result)
    level = Level("DDPM, 1,000 calls", distance, below=True, right=True, error=error)
    notes = []
    if (enough := equal_quality(result, [], [TUNED])) is not None:
        text = f"{enough.steps} tuned calls are\nas good as DDPM's 1,000"
        notes.append(Note(text, enough.steps, enough.distance, PURPLE, (0, -37)))
    measure = "Fréchet distance: less is better"
    return Plot(result["data"], lines, "calls of the model", measure, [level], notes)


def sampling_plot(case: str, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Seconds by steps of the rows of one model, with those of DDPM's 1000 steps."""
    own = [row for row in rows if "diffusers" in row["timings"]]
    steps = [row["steps"] for row in own]
    lines = [
        Line(name, steps, [row["timings"][name]["seconds"] for row in own], color, marker)
        for name, color, marker in (("diffusers", ORANGE, "s"), ("fastddim", BLUE, "o"))
    ]
    level = Level("DDPM of diffusers, 1,000 steps", own[0]["timings"]["DDPM"]["seconds"])
    return Plot(f"{case}, batch of {own[0]['shape'][0]}", lines, "steps S", "seconds", [level])


def requests_plots(rows: Sequence[Mapping[str, Any]]) -> tuple[Plot, Plot]:
    """Requests served a second, and the latency that 95 % stay below, by requests that arrive."""
    offered = [row["requests_per_second"] for row in rows]

    def lines(measure: str) -> list[Line]:
        return [
            Line(
                label,
                offered,
                [row["timings"][name][measure] for row in rows],
                color,
                marker,
                named="end",
            )
            for label, name, color, marker in (
                ("one by one", "one after the other", ORANGE, "s"),
                ("Stream", "stream", BLUE, "o"),
            )
        ]

    case, xlabel = rows[0]["case"], "requests that arrive a second"
    all_of_them = Line("all of them", offered, offered, FAINT, "", (0, (4, 3)), named="end")
    served = [all_of_them, *lines("requests_per_second")]
    return (
        Plot(f"{case}: throughput", served, xlabel, "requests served a second"),
        Plot(
            f"{case}: latency",
            lines("latency_95"),
            xlabel,
            "seconds until the sample is there, 95th percentile",
        ),
    )


def arrivals_plot(result: dict[str, Any]) -> Plot:
    """One line for each way to take few steps, and the level of all of DDPM's."""
    lines = [
        Line(
            way,
            [row["steps"] for row in rows],
            [100 * row["success"] for row in rows],
            color,
            marker,
            error=[100 * row["error"] for row in rows],
        )
        for way, color, marker, rows in _ways(result, "success")
    ]
    own = next(row for row in result["rows"] if (row["way"], row["steps"]) == ("η = 1", 100))
    level = Level("DDPM, 100 steps", 100 * own["success"], error=100 * own["error"])
    return Plot("episodes that arrive", lines, "steps S", "percent", [level], linear=True)


def actions_plot(result: dict[str, Any]) -> Plot:
    """One line for each way to solve the ODE in few steps."""
    lines = [
        Line(way, [row["steps"] for row in rows], [row["distance"] for row in rows], color, marker)
        for way, color, marker, rows in _ways(result, "distance")
    ]
    measure = "root mean square, in units of the greatest speed"
    return Plot("distance to the exact solution", lines, "steps S", measure)


def _ways(
    result: dict[str, Any], value: str
) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """The ways to take few steps of the trained policy, with their style and rows."""
    for way, color, marker in zip(
        ("η = 1", "order 1, leading", "order 1", "order 2", "tuned", "warm start"),
        (ORANGE, FAINT, BLUE, GREEN, PURPLE, TEXT),
        ("s", "x", "o", "^", "D", "v"),
        strict=True,
    ):
        own = [row for row in result["rows"] if (row["policy"], row["way"]) == ("trained", way)]
        rows = [row for row in own if value in row and row["steps"] < 100]
        if rows:
            yield way, color, marker, rows
