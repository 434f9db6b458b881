"""Markdown tables from result files, and their places in the README.

`python benchmarks/tables.py` rewrites the README's tables from the committed results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
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


# Table 1 of arXiv 2010.02502: FID of CIFAR10, by steps.
PAPER = {
    "η = 0": {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04},
    "η = 0.2": {10: 14.04, 20: 7.11, 50: 4.77, 100: 4.25, 1000: 4.09},
    "η = 0.5": {10: 16.66, 20: 8.35, 50: 5.25, 100: 4.46, 1000: 4.29},
    "η = 1": {10: 41.07, 20: 18.36, 50: 8.01, 100: 5.78, 1000: 4.73},
    "σ̂": {10: 367.43, 20: 133.37, 50: 32.72, 100: 9.99, 1000: 3.17},
}

# Table 2 of the same: squared error of reconstructed CIFAR10 test images in [0, 1], by steps.
PAPER_RECONSTRUCTION = {
    10: 0.014,
    20: 0.0065,
    50: 0.0023,
    100: 0.0009,
    200: 0.0004,
    500: 0.0001,
    1000: 0.0001,
}


def quality_as_markdown(result: dict[str, Any]) -> str:
    """Table 1 of the paper in each feature space, and the paper's own."""
    blocks = []
    for space, title in (
        ("classifier", "features of a classifier of the data"),
        ("efficientnet-lite0", "features of EfficientNet-Lite0"),
    ):
        found: dict[str, dict[int, str]] = {}
        for row in result["rows"]:
            if space in row:
                distance, error = row[space]["distance"], row[space]["error"]
                cell = f"{_three(distance)} ± {error:.{0 if error >= 1 else 1}f}"
                found.setdefault(_kind(row), {})[row["steps"]] = cell
        counts = sorted({row[space]["count"] for row in result["rows"] if space in row})
        floor = result["floors"][space]
        blocks.append(_by_steps(f"{result['data']}: {title}", found))
        blocks.append(
            f"{' or '.join(f'{count:,}' for count in counts)} samples a cell, ± the bootstrap's "
            f"standard deviation. Real against real, {floor['count']:,} images: "
            f"{_three(floor['distance'])}."
        )
    paper = {
        kind: {steps: f"{value:g}" for steps, value in cells.items()}
        for kind, cells in PAPER.items()
    }
    blocks.append(_by_steps("the paper: FID of CIFAR10", paper))
    record, machine = result["classifier"], result["machine"]
    blocks.append(
        f"The classifier finds the class of {record['test_accuracy']:.1%} of "
        f"{record['test_images']:,} held-out images. "
        f"torch {machine['torch']}, fastddim {machine['fastddim']} at "
        f"{machine['commit']}, the network in bfloat16."
    )
    return "\n\n".join(blocks)


def reconstruction_as_markdown(result: dict[str, Any]) -> str:
    """Table 2 of the paper on the bundled models, and the paper's own."""
    found: dict[str, dict[int, str]] = {}
    counts = {}
    for row in result["rows"]:
        kind = row["data"] + (f", `refine={row['refine']}`" if row["refine"] else "")
        found.setdefault(kind, {})[row["steps"]] = _two(row["mse"])
        counts[row["data"]] = row["count"]
    shown = {steps for cells in found.values() for steps in cells}
    found["the paper: CIFAR10"] = {
        steps: _two(error) for steps, error in PAPER_RECONSTRUCTION.items() if steps in shown
    }
    machine = result["machine"]
    images = " and ".join(f"{count} of {name}" for name, count in counts.items())
    note = (
        f"Mean squared error of a pixel in [0, 1]; held-out images, {images}. "
        f"torch {machine['torch']}, fastddim {machine['fastddim']} at {machine['commit']}."
    )
    return _by_steps("encoded and decoded", found) + "\n\n" + note


def _two(value: float) -> str:
    """At most two significant digits, never in scientific notation."""
    return format(Decimal(f"{value:.2g}"), "f")


def _kind(row: dict[str, Any]) -> str:
    name = "σ̂" if row["variance"] == "large" else f"η = {row['eta']:g}"
    name += ", order 2" if row["order"] == 2 else ""
    return name if row["spacing"] == "uniform" else f"{name}, {row['spacing']}"


def _by_steps(title: str, found: dict[str, dict[int, str]]) -> str:
    columns = sorted({steps for cells in found.values() for steps in cells})
    lines = ["| " + " | ".join([title, *(f"S = {steps}" for steps in columns)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for kind in sorted(found, key=lambda kind: ("σ" in kind, kind)):
        cells = [found[kind].get(steps, "–") for steps in columns]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step-cpu": steps_as_markdown,
    "dropins-cpu": dropins_as_markdown,
    "quality-digits": quality_as_markdown,
    "reconstruction": reconstruction_as_markdown,
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
