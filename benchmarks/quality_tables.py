"""Tables of quality: the paper's tables 1 and 2, its own numbers, distances during training, and
distances of few steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from cpu_results import result_of
from markdown_cells import table, three, two

WEIGHTS = Path(__file__).resolve().parent.parent / "fastddim" / "models" / "weights"

# Table 1 of arXiv 2010.02502: FID of CIFAR10, by steps.
PAPER = {
    "η = 0": {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04},
    "η = 0.2": {10: 14.04, 20: 7.11, 50: 4.77, 100: 4.25, 1000: 4.09},
    "η = 0.5": {10: 16.66, 20: 8.35, 50: 5.25, 100: 4.46, 1000: 4.29},
    "η = 1": {10: 41.07, 20: 18.36, 50: 8.01, 100: 5.78, 1000: 4.73},
    "σ̂": {10: 367.43, 20: 133.37, 50: 32.72, 100: 9.99, 1000: 3.17},
}

# Table 2 of the paper: squared error of reconstructed CIFAR10 test images in [0, 1], by steps.
PAPER_RECONSTRUCTION = {
    10: 0.014,
    20: 0.0065,
    50: 0.0023,
    100: 0.0009,
    200: 0.0004,
    500: 0.0001,
    1000: 0.0001,
}


@dataclass(frozen=True)
class Kind:
    """A kind of steps, for which the quality results have one row for each number of steps."""

    label: str
    spacing: str
    order: int = 1
    eta: float = 0.0

    def rows(self, quality: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows of this kind, fewest steps first."""
        own = ("small", self.spacing, self.order, self.eta)
        names = ("variance", "spacing", "order", "eta")
        found = [row for row in quality["rows"] if tuple(row[name] for name in names) == own]
        return sorted(found, key=itemgetter("steps"))


TUNED = Kind("tuned", "tuned")
FEW_KINDS = (
    Kind("η = 1", "trailing", eta=1.0),
    Kind("order 1", "trailing"),
    Kind("order 2", "trailing", order=2),
    TUNED,
)
"""The kinds to compare at few steps: those of the package's default spacing, and tuned steps."""


def quality_of(data: str) -> dict[str, Any]:
    """The quality results of the bundled model "digits" or "fashion"."""
    quality: dict[str, Any] = result_of(f"quality-{data}")
    return quality


def baseline_of(quality: dict[str, Any]) -> tuple[float, float]:
    """Distance and error of DDPM's 1000 steps."""
    found = distance_of(quality, 1000, 1.0)
    assert found is not None, "quality: the cell of 1000 steps at η = 1 is missing"
    return found


def distance_of(
    quality: dict[str, Any],
    steps: int,
    eta: float = 0.0,
    order: int = 1,
    spacing: str = "uniform",
) -> tuple[float, float] | None:
    """Distance and error of a cell in the classifier's features; `spacing` may be "tuned"."""
    for row in Kind("", spacing, order, eta).rows(quality):
        if row["steps"] == steps:
            return row["classifier"]["distance"], row["classifier"]["error"]
    return None


def few_as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Distances of few steps, including tuned ones if they were measured.

    Args:
        results: the quality results of the models.
    """
    found: dict[str, dict[int, str]] = {}
    for result in results:
        for kind in FEW_KINDS:
            for row in kind.rows(result):
                cell = quality_cell(row["classifier"]["distance"], row["classifier"]["error"])
                found.setdefault(f"{result['data']}, {kind.label}", {})[row["steps"]] = cell
    return _by_steps("", found, sort=False) + "\n\n" + _about_few(results)


def _about_few(results: Sequence[dict[str, Any]]) -> str:
    counts, baselines = [], []
    for result in results:
        rows = [row for kind in FEW_KINDS for row in kind.rows(result)]
        counts.append(f"{max(row['classifier']['count'] for row in rows):,} of {result['data']}")
        baselines.append(f"{quality_cell(*baseline_of(result))} of {result['data']}")
    spacing = "`trailing` spacing, the default"
    if any(TUNED.rows(result) for result in results):
        spacing += (
            ", except in the tuned rows, whose timesteps and weights of the last two epsilons were "
            "chosen for the model ([tuned steps](../tune.md))"
        )
    return (
        "Fréchet distance in the features of a classifier of the data; samples a cell: "
        f"{' and '.join(counts)}; ± the bootstrap's standard deviation; η = 0 where a row names "
        f"none; {spacing}. DDPM's 1000 steps: {' and '.join(baselines)}."
    )


def quality_as_markdown(result: dict[str, Any]) -> str:
    """Table 1 of the paper in each feature space."""
    blocks = []
    for space, title in (
        ("classifier", "features of a classifier of the data"),
        ("efficientnet-lite0", "features of EfficientNet-Lite0"),
    ):
        found: dict[str, dict[int, str]] = {}
        # The table of few steps has the other numbers of steps.
        shown = {row["steps"] for row in result["rows"] if row["spacing"] == "uniform"}
        rows = [row for row in result["rows"] if space in row and row["steps"] in shown]
        for row in rows:
            distance, error = row[space]["distance"], row[space]["error"]
            found.setdefault(_kind(row), {})[row["steps"]] = quality_cell(distance, error)
        counts = sorted({row[space]["count"] for row in rows})
        floor = result["floors"][space]
        blocks.append(_by_steps(f"{result['data']}: {title}", found))
        blocks.append(
            f"{' or '.join(f'{count:,}' for count in counts)} samples a cell, ± the bootstrap's "
            "standard deviation; uniform spacing where a row names none. Real against real, "
            f"{floor['count']:,} images: {three(floor['distance'])}."
        )
    record = result["classifier"]
    blocks.append(
        f"The classifier finds the class of {record['test_accuracy']:.1%} of "
        f"{record['test_images']:,} held-out images. {_drawn_and_judged(result)}"
    )
    return "\n\n".join(blocks)


def _drawn_and_judged(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = f"torch {machine['torch']}, fastddim {machine['fastddim']}"
    # Rows without this entry are from before a CPU without bfloat16 was supported.
    precisions = sorted({row.get("network", "bfloat16") for row in result["rows"]})
    network = f"the network in {' or '.join(precisions)}"
    if not any("gpu" in row for row in result["rows"]):
        return f"{versions}, {network}."
    devices = sorted({row.get("gpu", machine["cpu"]) for row in result["rows"]})
    return (
        f"Samples drawn on {' or '.join(devices)}, {network}; judged on a CPU, "
        f"{machine['cpu']}, {versions}."
    )


def reconstruction_as_markdown(result: dict[str, Any]) -> str:
    """Table 2 of the paper on the bundled models, and the paper's own."""
    found: dict[str, dict[int, str]] = {}
    counts = {}
    for row in result["rows"]:
        kind = row["data"] + (f", `refine={row['refine']}`" if row["refine"] else "")
        found.setdefault(kind, {})[row["steps"]] = two(row["mse"])
        counts[row["data"]] = row["count"]
    shown = {steps for cells in found.values() for steps in cells}
    found["the paper: CIFAR10"] = {
        steps: two(error) for steps, error in PAPER_RECONSTRUCTION.items() if steps in shown
    }
    machine = result["machine"]
    images = " and ".join(f"{count} of {name}" for name, count in counts.items())
    note = (
        f"Mean squared error of a pixel in [0, 1]; held-out images, {images}; uniform spacing. "
        f"torch {machine['torch']}, fastddim {machine['fastddim']} at {machine['commit']}."
    )
    return _by_steps("encoded and decoded", found) + "\n\n" + note


def paper_as_markdown(_: dict[str, Any]) -> str:
    """Table 1 of the paper, with its own numbers."""
    paper = {
        kind: {steps: f"{value:g}" for steps, value in cells.items()}
        for kind, cells in PAPER.items()
    }
    return _by_steps("the paper: FID of CIFAR10", paper)


def training_as_markdown(earlier: dict[str, Any]) -> str:
    """Distances before the last run of training, and of the bundled weights."""
    data = earlier["data"]
    training = json.loads((WEIGHTS / f"{data}.json").read_text())["training"]
    steps_shown = sorted({row["steps"] for row in earlier["rows"]})
    found: dict[str, dict[int, str]] = {}
    for record, result in ((training["start"], earlier), (training, quality_of(data))):
        seen = f"after {images_seen(record) / 1e6:.1f} million images"
        for eta in (0.0, 1.0):
            for steps in steps_shown:
                distance = distance_of(result, steps, eta)
                if distance is not None:
                    found.setdefault(f"η = {eta:g}, {seen}", {})[steps] = quality_cell(*distance)
    return _by_steps(f"{data}, by training", found)


def images_seen(training: dict[str, Any]) -> int:
    """The number of images that `examples/train.py` used in a run and the runs before it.

    Args:
        training: the record of the run.
    """
    seen: int = training["steps_done"] * training["batch"]
    return seen + (images_seen(training["start"]) if training.get("start") else 0)


def _kind(row: dict[str, Any]) -> str:
    name = "σ̂" if row["variance"] == "large" else f"η = {row['eta']:g}"
    name += ", order 2" if row["order"] == 2 else ""
    return name if row["spacing"] == "uniform" else f"{name}, {row['spacing']}"


def _by_steps(title: str, found: dict[str, dict[int, str]], *, sort: bool = True) -> str:
    columns = sorted({steps for cells in found.values() for steps in cells})
    kinds = sorted(found, key=lambda kind: ("σ" in kind, kind)) if sort else list(found)
    rows = [[kind, *(found[kind].get(steps, "–") for steps in columns)] for kind in kinds]
    return table([title, *(f"S = {steps}" for steps in columns)], rows)


def quality_cell(distance: float, error: float) -> str:
    return f"{three(distance)} ± {_error(error)}"


def _error(value: float) -> str:
    return f"{value:.0f}" if value >= 1 else f"{value:.1f}"
