"""The paper's figures 5 and 6 and table 2 on the bundled models, and plots of what was measured.

    python benchmarks/figures.py                  # all; minutes, for some take 1000 steps
    python benchmarks/figures.py reconstruction   # one of them
    python benchmarks/figures.py --plots          # the plots alone, of the numbers that are there

Pictures go to docs/figures/, numbers to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import machine
from paper import experiments
from paper.hero import hero
from paper.measured import (
    actions_plot,
    arrivals_plot,
    consistency_plot,
    quality_plot,
    reconstruction_plot,
    requests_plots,
    sampling_plot,
)
from paper.plots import Plot, plots
from paper.rows import bars, dots
from paper.sheets import Panel, sheet
from paper.speed import cpu_time, gpu_time, update_dots
from paper.timeline import timeline
from quality import data
from quality.grid import fingerprint

import fastddim
from fastddim.files import atomic_file
from fastddim.images import Images, to_uint8

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ((0, 1), (2, 3), (0, 3))
CORNERS = (0, 1, 2, 3)
"""Seeds: of the ends of the strips, and of the corners of the square."""


@dataclass(frozen=True)
class Work:
    """The images to draw, their numbers of steps, and the folder of the results.

    The default is what is committed. Fashion costs ten times as much an image as digits.
    """

    names: Sequence[str] = ("digits", "fashion")
    consistency_steps: Sequence[int] = (10, 20, 50, 100, 1000)
    consistency_counts: Mapping[str, int] = field(
        default_factory=lambda: {"digits": 64, "fashion": 32}
    )
    between_steps: int = 50
    frames: int = 11
    square: int = 5
    reconstruction_steps: Mapping[str, Sequence[int]] = field(
        default_factory=lambda: {
            "digits": (10, 20, 50, 100, 200, 1000),
            "fashion": (10, 20, 50, 100, 200),
        }
    )
    reconstruction_counts: Mapping[str, int] = field(
        default_factory=lambda: {"digits": 64, "fashion": 32}
    )
    refine: int = 2
    shown: int = 5
    shown_steps: Sequence[int] = (10, 20, 100)
    results: Path = ROOT / "benchmarks" / "results"
    figures: Path = ROOT / "docs" / "figures"

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a result file."""
        with atomic_file(self.results / f"{name}.json") as file:
            file.write((json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n").encode())

    def read(self, name: str) -> Any:
        """The content of a result file."""
        return json.loads((self.results / f"{name}.json").read_text())


def consistency(work: Work) -> None:
    """Figure 5: the same x_T in different numbers of steps, and how far the images are apart."""
    layout, rows = [], []
    for name in work.names:
        model, panels = fastddim.models.load(name), []
        for eta, title in ((0.0, "DDIM (η = 0)"), (1.0, "η = 1")):
            count = work.consistency_counts[name]
            samples = experiments.same_latents(model, work.consistency_steps, eta, count)
            for steps, (distance, error) in experiments.consistency(name, samples).items():
                rows.append(
                    {
                        "data": name,
                        "weights": fingerprint(name),
                        "eta": eta,
                        "steps": steps,
                        "reference_steps": max(samples),
                        "count": count,
                        "seed": experiments.SEED,
                        "distance": _rounded(distance),
                        "error": _rounded(error),
                    }
                )
            images = np.stack([to_uint8(x[: work.shown]) for x in samples.values()], axis=1)
            panels.append(
                Panel(f"{name}, {title}", images, columns=[f"S = {steps}" for steps in samples])
            )
        layout.append(panels)
    sheet(work.figures / "consistency.png", layout)
    work.write("consistency", rows)


def readme(work: Work) -> None:
    """The README's picture: images of the last model by calls, and their Fréchet distances."""
    hero(work.figures / "hero.png", work.read(f"quality-{work.names[-1]}"))


def plot_consistency(work: Work) -> None:
    """Distance to the image of most steps, by steps."""
    plots(
        work.figures / "consistency-distance.png", _by_model(work, "consistency", consistency_plot)
    )


def interpolation(work: Work) -> None:
    """Figure 6: images between the images of two latents, and of four."""
    strips, squares = [], []
    for name in work.names:
        model = fastddim.models.load(name)
        title = f"{name}, {work.between_steps} steps"
        strip = [experiments.between(model, p, work.frames, work.between_steps) for p in PAIRS]
        images = np.stack([to_uint8(x) for x in strip])
        seeds = [f"seeds {a}, {b}" for a, b in PAIRS]
        strips.append([Panel(title, images, _weights("α", work.frames), seeds)])
        square = experiments.between(model, CORNERS, work.square, work.between_steps)
        across, down = (_weights(weight, work.square) for weight in "αβ")
        squares.append(Panel(title, _table(square, work.square), across, down))
    sheet(work.figures / "interpolation.png", strips)
    sheet(work.figures / "interpolation-square.png", [squares])


def reconstruction(work: Work) -> None:
    """Table 2: held-out images encoded and decoded, and what that loses."""
    panels, rows = [], []
    for name in work.names:
        model, count = fastddim.models.load(name), work.reconstruction_counts[name]
        originals = data.load(name).held_out_images[:count]
        shown = [originals]
        for steps in work.reconstruction_steps[name]:
            for refine in (0, work.refine):
                decoded = experiments.reconstruct(model, originals, steps, refine)
                mse, error = experiments.reconstruction_error(decoded, originals)
                rows.append(
                    {
                        "data": name,
                        "weights": fingerprint(name),
                        "refine": refine,
                        "steps": steps,
                        "count": count,
                        "mse": _rounded(mse),
                        "error": _rounded(error),
                    }
                )
                if steps in work.shown_steps and refine == 0:
                    shown.append(decoded)
        labels = ["original", *(f"S = {steps}" for steps in work.shown_steps)]
        images = np.stack([to_uint8(x[: work.shown]) for x in shown])
        panels.append(Panel(name, images, rows=[] if panels else labels))
    sheet(work.figures / "reconstruction.png", [panels])
    work.write("reconstruction", rows)


def plot_reconstruction(work: Work) -> None:
    """Error by steps, with the paper's."""
    panels = _by_model(work, "reconstruction", reconstruction_plot)
    plots(work.figures / "reconstruction-error.png", panels)


def _by_model(work: Work, name: str, plot: Callable[[list[dict[str, Any]]], Plot]) -> list[Plot]:
    """A plot of the rows of each model."""
    rows = work.read(name)["rows"]
    return [plot([row for row in rows if row["data"] == own]) for own in work.names]


def plot_quality(work: Work) -> None:
    """Fréchet distance by calls of the model, with DDPM's of 1000, of the models measured."""
    panels = [
        quality_plot(work.read(f"quality-{name}"))
        for name in work.names
        if (work.results / f"quality-{name}.json").is_file()
    ]
    plots(work.figures / "quality.png", panels)


def plot_sampling(work: Work) -> None:
    """Wall time by steps (the paper's figure 4), with that of DDPM's 1000 steps."""
    cases = _by_case(work.read("sampling-cpu")["rows"])
    panels = [sampling_plot(case, rows) for case, rows in cases.items()]
    plots(work.figures / "sampling.png", panels, columns=3)


def plot_requests(work: Work) -> None:
    """Requests served a second and their latency, one after the other and in a stream."""
    cases = _by_case(work.read("stream-cpu")["rows"])
    panels = [plot for rows in cases.values() for plot in requests_plots(rows)]
    plots(work.figures / "requests.png", panels)


def _by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def plot_update(work: Work) -> None:
    """One update as a multiple of the floor."""
    dots(work.figures / "update.png", update_dots(work.read("step-cpu")["rows"]))


def plot_time(work: Work) -> None:
    """The parts of a step's time by network, on a CPU and on a GPU."""
    names = ("loops-cpu", "step-cpu", "policies-cpu", "gpu-h100")
    loops, steps, policies, gpu = (work.read(name)["rows"] for name in names)
    bars(work.figures / "time.png", [cpu_time(loops, steps, policies), gpu_time(gpu)])


def plot_timeline(work: Work) -> None:
    """The loop of a robot in time; nothing in it is measured."""
    timeline(work.figures / "timeline.png")


def plot_policies(work: Work) -> None:
    """Arrivals of a trained policy, and what its chunks of actions miss, by steps."""
    result = work.read("policy-success")
    plots(work.figures / "policy-success.png", [arrivals_plot(result), actions_plot(result)])


EXPERIMENTS = {
    "consistency": consistency,
    "interpolation": interpolation,
    "reconstruction": reconstruction,
    "hero": readme,
}
PLOTS = {
    "consistency": plot_consistency,
    "reconstruction": plot_reconstruction,
    "quality": plot_quality,
    "sampling": plot_sampling,
    "requests": plot_requests,
    "update": plot_update,
    "time": plot_time,
    "timeline": plot_timeline,
    "policies": plot_policies,
}


def draw(which: Sequence[str], work: Work, *, only_plots: bool = False) -> None:
    """Draw the pictures of some experiments, after measuring them unless `only_plots`."""
    work.figures.mkdir(parents=True, exist_ok=True)
    for name in which:
        if name in EXPERIMENTS and not only_plots:
            EXPERIMENTS[name](work)
        if name in PLOTS:
            PLOTS[name](work)


def _weights(name: str, frames: int) -> list[str]:
    """Labels of `frames` weights from 0 to 1."""
    return [f"{name} = 0", *(f"{weight:.2g}" for weight in np.linspace(0, 1, frames)[1:])]


def _table(images: Tensor, columns: int) -> Images:
    pixels = to_uint8(images)
    return pixels.reshape(-1, columns, *pixels.shape[1:])


def _rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple({**EXPERIMENTS, **PLOTS})
    parser.add_argument("which", nargs="*", default=names, metavar="|".join(names))
    parser.add_argument("--plots", action="store_true", help="draw nothing with a model")
    parser.add_argument(
        "--threads", type=int, default=1, help="default 1, whose rounding the README shows"
    )
    args = parser.parse_args()
    if unknown := set(args.which) - set(names):
        parser.error(f"expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    draw(args.which, Work(), only_plots=args.plots)


if __name__ == "__main__":
    main()
