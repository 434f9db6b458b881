"""Markdown tables from result files, and their places in the README.

`python benchmarks/tables.py` rewrites the tables of the README and of docs/gpu.md from the
committed results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gpu_tables
import version_tables
from gpu_results import measured_results
from markdown_cells import duration, gain, table, three, two

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = ROOT / "fastddim" / "models" / "weights"
CONTENDERS = ("fastddim", "fastddim in place", "diffusers", "eager", "torch.compile")


@cache
def result_of(name: str) -> Any:
    """What a result file holds, read once."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def steps_as_markdown(result: dict[str, Any]) -> str:
    """Time of one step as a multiple of the floor, `torch.add(x, e, out=o)`."""
    header = ["case", "floor", *CONTENDERS]
    rows = []
    for row in result["rows"]:
        cells = [row["case"], duration(row["timings"]["floor"]["seconds"])]
        cells += [_ratio(row["timings"].get(name)) for name in CONTENDERS]
        rows.append(cells)
    return f"{table(header, rows)}\n\n{_paired(result['machine'])}"


def dropins_as_markdown(result: dict[str, Any]) -> str:
    """Time of a step of the original and of the drop-in, and of the draw they have in common."""
    header = ["", "case", "original", "fastddim", "faster", "the draw"]
    rows = []
    for row in result["rows"]:
        timings, steps = row["timings"], row["steps"]
        seconds = [timings[name]["seconds"] / steps for name in ("original", "fastddim")]
        noisy = row["eta"] > 0
        cells = [row["case"], f"η = {row['eta']:g}, {'×'.join(map(str, row['shape']))}"]
        cells += [*map(duration, seconds), _ratio(timings["original"])]
        cells += [duration(timings["draw"]["seconds"]) if noisy else "–"]
        rows.append(cells)
    return f"{table(header, rows)}\n\n{_paired(result['machine'])}"


LOOP_CONTENDERS = ("diffusers", "official", "fastddim, compiled model", "torch.compile")


def loops_as_markdown(result: dict[str, Any]) -> str:
    """Time of a loop, and how many times longer the others take."""
    header = ["model", "", "fastddim, a step", *LOOP_CONTENDERS]
    rows = []
    for row in result["rows"]:
        timings = row["timings"]
        case = f"η = {row['eta']:g}, {'×'.join(map(str, row['shape']))}"
        cells = [row["case"], case, duration(timings["fastddim"]["seconds"] / row["steps"])]
        cells += [_ratio(timings[name]) for name in LOOP_CONTENDERS]
        rows.append(cells)
    return f"{table(header, rows)}\n\n{_paired(result['machine'])}"


def sampling_as_markdown(result: dict[str, Any]) -> str:
    """Gains over 1000 steps of DDPM, those of fewer steps and of the loop apart; and quality."""
    header = ["model", "S", "fastddim", "diffusers' DDIM", "fewer steps", "faster loop", "together"]
    header += ["η = 1", "order 2", "distance", "of order 2", "of DDPM, S = 1000"]
    rows = []
    for row in result["rows"]:
        timings, steps = row["timings"], row["steps"]
        cells = [row["case"], str(steps)]
        cells += [duration(timings[name]["seconds"]) for name in ("fastddim", "diffusers")]
        cells += [f"{gain(value)}×" for value in gains(row)]
        cells += [duration(timings[f"fastddim, {how}"]["seconds"]) for how in ("η = 1", "order 2")]
        rows.append([*cells, *_distances(row["case"], steps)])
    return f"{table(header, rows)}\n\n{_paired(result['machine'])}"


def gains(row: dict[str, Any]) -> tuple[float, float, float]:
    """By how much fewer steps, a faster loop, and both shorten DDPM's 1000 steps."""
    timings = row["timings"]
    fewer, together = (1 / timings[name]["ratio"] for name in ("diffusers", "fastddim"))
    return fewer, timings["diffusers against fastddim"]["ratio"], together


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
    quality: dict[str, Any], steps: int, eta: float, order: int = 1
) -> tuple[float, float] | None:
    """Distance and error of a cell with the uniform spacing, in the classifier's features."""
    for row in quality["rows"]:
        plain = (row["spacing"], row["variance"]) == ("uniform", "small")
        if plain and (row["steps"], row["eta"], row["order"]) == (steps, eta, order):
            return row["classifier"]["distance"], row["classifier"]["error"]
    return None


def _distances(case: str, steps: int) -> list[str]:
    data, _, network = case.partition(" ")
    if network != "U-Net":
        return ["–"] * 3
    quality = quality_of(data)
    found = [distance_of(quality, steps, 0.0, order) for order in (1, 2)]
    return ["–" if cell is None else _cell(*cell) for cell in (*found, baseline_of(quality))]


@dataclass(frozen=True)
class EqualQuality:
    """The fewest steps with which samples are as good as DDPM's of 1000 steps."""

    steps: int
    eta: float
    distance: float
    error: float
    close: bool  # within 5 % of DDPM's too
    speedup: float  # over diffusers' loop of DDPM


def equal_quality(
    quality: dict[str, Any], timed: Sequence[dict[str, Any]], order: int, etas: Sequence[float]
) -> EqualQuality | None:
    """None where no number of steps below DDPM's that was timed is enough.

    Enough is a distance that is larger by no more than the bootstrap's error of the difference; of
    several η with as many steps, the one with the smallest distance counts.

    Args:
        quality: the quality results of a model.
        timed: the rows of `bench_sampling.py` of the same model, fewest steps first.
    """
    baseline = baseline_of(quality)
    for row in (row for row in timed if row["steps"] < 1000):
        found = [
            (*cell, eta)
            for eta in etas
            if (cell := distance_of(quality, row["steps"], eta, order)) is not None
            and cell[0] - baseline[0] <= math.hypot(cell[1], baseline[1])
        ]
        if found:
            distance, error, eta = min(found)
            close = distance <= 1.05 * baseline[0]
            speedup = 1 / row["timings"][_timed_as(order, eta)]["ratio"]
            return EqualQuality(row["steps"], eta, distance, error, close, speedup)
    return None


def _timed_as(order: int, eta: float) -> str:
    """The contender of `bench_sampling.py`; noise takes as long at any η."""
    if order == 2:
        return "fastddim, order 2"
    return "fastddim, η = 1" if eta else "fastddim"


EQUAL_QUALITY: tuple[tuple[str, int, tuple[float, ...]], ...] = (
    ("η = 0, order 2", 2, (0.0,)),
    ("η = 0", 1, (0.0,)),
    ("best of all η", 1, (0.0, 0.2, 0.5, 1.0)),
)
"""What the headline looks for: its name, the order, and the η."""


def headline_as_markdown(result: dict[str, Any]) -> str:
    """What the results say, in the README's first lines."""
    header = ["", "steps", "faster", "Fréchet distance", "DDPM's, 1000 steps"]
    rows, bests = [], []
    for data in ("digits", "fashion"):
        quality = quality_of(data)
        timed = [row for row in result["rows"] if row["case"] == f"{data} U-Net"]
        found = {
            label: equal_quality(quality, timed, order, etas)
            for label, order, etas in EQUAL_QUALITY
        }
        if not any(found.values()):
            found = {"any of these": None}
        for label, one in found.items():
            cells = [f"{data}, {label}", *_equal_quality(one)]
            rows.append([*cells, _spread(*baseline_of(quality))])
        bests += found.values()
    measured = measured_results()
    rows += [row for gpu, found in measured.items() for row in gpu_tables.headline_rows(gpu, found)]
    loops = result_of("loops-cpu")["rows"]
    ratios = {row["case"]: row["timings"]["diffusers"]["ratio"] for row in loops if row["eta"] == 0}
    best = bests[0]
    assert best is not None
    return "\n".join(
        [
            f"**Digits as good as DDPM's of 1000 steps in {best.steps} steps, "
            f"{gain(best.speedup)} times faster** than those in diffusers' loop, with the same "
            "model and batch. The fewest steps whose distance exceeds DDPM's by no more than the "
            "bootstrap's error, bold where it is within 5 % as well:",
            "",
            table(header, rows),
            "",
            "With the same number of steps, diffusers' loop takes "
            f"{gain(ratios['null model'])} times as long around a model that costs nothing, "
            f"{gain(ratios['policy head'])} times around a policy head of 112 numbers, and "
            f"{gain(ratios['digits U-Net'])} times around the digits' U-Net: there the model "
            "decides.",
            *(
                sentence
                for gpu, found in measured.items()
                for sentence in gpu_tables.headline_sentence(gpu, found)
            ),
            "",
            _provenance(result["machine"]),
            *(found.provenance for found in measured.values()),
        ]
    )


def _equal_quality(found: EqualQuality | None) -> list[str]:
    if found is None:
        return ["none measured below 1000", "–", "–"]
    distance = _spread(found.distance, found.error)
    noise = f" at η = {found.eta:g}" if found.eta else ""
    return [
        f"{found.steps}{noise}",
        f"{gain(found.speedup)}×",
        f"**{distance}**" if found.close else distance,
    ]


def _spread(distance: float, error: float) -> str:
    return f"{three(distance)} ± {error:.2g}"


def stream_as_markdown(result: dict[str, Any]) -> str:
    """Throughput and latency of requests one after the other, and of those that share a batch."""
    header = ["model", "load", "requests/s", "", "median", "", "95 %", ""]
    rows = [["", "", *["one by one", "stream"] * 3]]
    for row in result["rows"]:
        cells = [row["case"], f"{row['load']:g}"]
        timings = [row["timings"][name] for name in ("one after the other", "stream")]
        cells += [three(timing["requests_per_second"]) for timing in timings]
        for name in ("latency_median", "latency_95"):
            cells += [duration(timing[name]) for timing in timings]
        rows.append(cells)
    slots = f"{result['rows'][0]['slots']} slots."
    return f"{table(header, rows)}\n\n{_provenance(result['machine'])} {slots}"


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
    """Table 1 of the paper in each feature space."""
    blocks = []
    for space, title in (
        ("classifier", "features of a classifier of the data"),
        ("efficientnet-lite0", "features of EfficientNet-Lite0"),
    ):
        found: dict[str, dict[int, str]] = {}
        for row in result["rows"]:
            if space in row:
                distance, error = row[space]["distance"], row[space]["error"]
                found.setdefault(_kind(row), {})[row["steps"]] = _cell(distance, error)
        counts = sorted({row[space]["count"] for row in result["rows"] if space in row})
        floor = result["floors"][space]
        blocks.append(_by_steps(f"{result['data']}: {title}", found))
        blocks.append(
            f"{' or '.join(f'{count:,}' for count in counts)} samples a cell, ± the bootstrap's "
            f"standard deviation. Real against real, {floor['count']:,} images: "
            f"{three(floor['distance'])}."
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
    # Rows that do not say so are from before a CPU without bfloat16 was allowed for.
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
        f"Mean squared error of a pixel in [0, 1]; held-out images, {images}. "
        f"torch {machine['torch']}, fastddim {machine['fastddim']} at {machine['commit']}."
    )
    return _by_steps("encoded and decoded", found) + "\n\n" + note


def paper_as_markdown(_: dict[str, Any]) -> str:
    """Table 1 of the paper itself."""
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
                    found.setdefault(f"η = {eta:g}, {seen}", {})[steps] = _cell(*distance)
    return _by_steps(f"{data}, by training", found)


def images_seen(training: dict[str, Any]) -> int:
    """Of a run of `examples/train.py`, by its record, and of the runs that it goes on from."""
    seen: int = training["steps_done"] * training["batch"]
    return seen + (images_seen(training["start"]) if training.get("start") else 0)


def _kind(row: dict[str, Any]) -> str:
    name = "σ̂" if row["variance"] == "large" else f"η = {row['eta']:g}"
    name += ", order 2" if row["order"] == 2 else ""
    return name if row["spacing"] == "uniform" else f"{name}, {row['spacing']}"


def _by_steps(title: str, found: dict[str, dict[int, str]]) -> str:
    columns = sorted({steps for cells in found.values() for steps in cells})
    rows = [
        [kind, *(found[kind].get(steps, "–") for steps in columns)]
        for kind in sorted(found, key=lambda kind: ("σ" in kind, kind))
    ]
    return table([title, *(f"S = {steps}" for steps in columns)], rows)


def _cell(distance: float, error: float) -> str:
    return f"{three(distance)} ± {_error(error)}"


def _error(value: float) -> str:
    return f"{value:.0f}" if value >= 1 else f"{value:.1f}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step-cpu": steps_as_markdown,
    "dropins-cpu": dropins_as_markdown,
    "loops-cpu": loops_as_markdown,
    "stream-cpu": stream_as_markdown,
    "sampling-cpu": sampling_as_markdown,
    "quality-digits": quality_as_markdown,
    "quality-fashion": quality_as_markdown,
    "reconstruction": reconstruction_as_markdown,
}
"""What makes the table of each result file."""

SUMMARIES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "headline": ("sampling-cpu", headline_as_markdown),
    "quality-paper": ("quality-digits", paper_as_markdown),
    "quality-training": ("quality-fashion-earlier", training_as_markdown),
}
"""Further places in the README, the result file that each is of, and what makes them."""


def blocks() -> dict[str, str]:
    """What stands in each marked place of the README."""
    made = {name: (name, as_markdown) for name, as_markdown in TABLES.items()}
    return {
        "gpu": gpu_tables.readme_as_markdown(measured_results()),
        **{
            place: as_markdown(result_of(name))
            for place, (name, as_markdown) in {**made, **SUMMARIES}.items()
        },
    }


PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "README.md": blocks,
    "docs/gpu.md": gpu_tables.blocks,
    "docs/versions.md": version_tables.blocks,
}
"""Files with marked places, and what stands in them."""


def updated(text: str, made: dict[str, str]) -> str:
    """The text of a page with `made` in its marked places."""
    for place, content in made.items():
        begin, end = f"<!-- {place}:begin -->", f"<!-- {place}:end -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def _ratio(timing: dict[str, float] | None) -> str:
    return "–" if timing is None else f"{gain(timing['ratio'])}×"


def _paired(machine: dict[str, Any]) -> str:
    return f"{_provenance(machine)} Median of the ratios taken round by round in one process."


def _provenance(machine: dict[str, Any]) -> str:
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{machine['cpu']} ({machine['instruction_set']}), {threads}, torch {machine['torch']}, "
        f"diffusers {machine['diffusers']}, fastddim {machine['fastddim']} at {machine['commit']}."
    )


if __name__ == "__main__":
    for name, made in PAGES.items():
        page = ROOT / name
        page.write_text(updated(page.read_text(), made()))
