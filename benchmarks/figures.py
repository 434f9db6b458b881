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
from collections.abc import Iterator, Mapping, Sequence
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
from paper.plots import Level, Line, Plot, plots
from paper.sheets import Panel, sheet
from paper.style import BLUE, FAINT, GREEN, ORANGE, PURPLE, TEXT
from paper.timeline import timeline
from quality import data
from quality.grid import fingerprint
from quality_tables import FEW_KINDS, PAPER_RECONSTRUCTION, baseline_of

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
    rows = work.read("consistency")["rows"]
    panels = []
    for name in work.names:
        lines = []
        for eta, color, marker in ((0.0, BLUE, "o"), (1.0, ORANGE, "s")):
            own = [row for row in rows if (row["data"], row["eta"]) == (name, eta)]
            lines.append(
                Line(
                    f"η = {eta:g}",
                    [row["steps"] for row in own],
                    [row["distance"] for row in own],
                    color,
                    marker,
                    error=[row["error"] for row in own],
                )
            )
        panels.append(
            Plot(
                f"{name}: S steps against {own[0]['reference_steps']}",
                lines,
                "steps S",
                "distance of features, relative",
                [Level("two images of different $x_T$", 1.0)],
            )
        )
    plots(work.figures / "consistency-distance.png", panels)


def interpolation(work: Work) -> None:
    """Figure 6: images between the images of two latents, and of four."""
    strips, squares = [], []
    for name in work.names:
        model = fastddim.models.load(name)
        title = f"{name}, {work.between_steps} steps"
        strip = [experiments.between(model, p, work.frames, work.between_steps) for p in PAIRS]
        weights = np.linspace(0, 1, work.frames)
        columns = [f"{weight:.1f}" if weight % 1 else f"{weight:g}" for weight in weights]
        columns[0] = "α = 0"
        strips.append([Panel(title, np.stack([to_uint8(x) for x in strip]), columns)])
        square = experiments.between(model, CORNERS, work.square, work.between_steps)
        squares.append(Panel(title, _table(square, work.square)))
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
    rows = work.read("reconstruction")["rows"]
    panels = []
    for name in work.names:
        lines = []
        for refine, color, marker in ((0, BLUE, "o"), (work.refine, GREEN, "^")):
            own = [row for row in rows if (row["data"], row["refine"]) == (name, refine)]
            lines.append(
                Line(
                    f"refine={refine}" if refine else "fastddim.invert",
                    [row["steps"] for row in own],
                    [row["mse"] for row in own],
                    color,
                    marker,
                    error=[row["error"] for row in own],
                )
            )
        steps = [steps for steps in PAPER_RECONSTRUCTION if steps in lines[0].x]
        errors = [PAPER_RECONSTRUCTION[s] for s in steps]
        lines.append(Line("the paper, CIFAR10", steps, errors, FAINT, "x", (0, (4, 3))))
        panels.append(Plot(name, lines, "steps S, each way", "squared error of a pixel"))
    plots(work.figures / "reconstruction-error.png", panels)


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
    panels = []
    rows = work.read("sampling-cpu")["rows"]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case and "diffusers" in row["timings"]]
        steps = [row["steps"] for row in own]
        lines = [
            Line(label, steps, [row["timings"][key]["seconds"] for row in own], color, marker)
            for label, key, color, marker in (
                ("diffusers' DDIM", "diffusers", ORANGE, "s"),
                ("fastddim", "fastddim", BLUE, "o"),
            )
        ]
        level = Level("diffusers' DDPM, S = 1000", own[0]["timings"]["DDPM"]["seconds"], FAINT)
        batch = own[0]["shape"][0]
        panels.append(Plot(f"{case}, batch of {batch}", lines, "steps S", "seconds", [level]))
    plots(work.figures / "sampling.png", panels, columns=3)


def plot_timeline(work: Work) -> None:
    """The loop of a robot in time, for light and dark pages; nothing in it is measured."""
    timeline(work.figures / "timeline.png")


def plot_policies(work: Work) -> None:
    """Arrivals of a trained policy, and what its chunks of actions miss, by steps."""
    result = work.read("policy-success")
    plots(work.figures / "policy-success.png", [arrivals_plot(result), actions_plot(result)])


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
    level = Level("DDPM, 100 steps", 100 * own["success"], below=True, error=100 * own["error"])
    title, ylabel = "episodes that arrive", "percent"
    return Plot(title, lines, "steps S", ylabel, [level], linear=True)


def actions_plot(result: dict[str, Any]) -> Plot:
    """One line for each way to solve the ODE in few steps."""
    lines = [
        Line(way, [row["steps"] for row in rows], [row["distance"] for row in rows], color, marker)
        for way, color, marker, rows in _ways(result, "distance")
    ]
    return Plot("distance to the exact solution", lines, "steps S", "root mean square, speeds")


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


def quality_plot(result: dict[str, Any]) -> Plot:
    """One line for each kind of few steps that a model was measured with, and DDPM's level."""
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
            lines.append(Line(kind.label, steps, distances, color, marker, error=errors))
    distance, error = baseline_of(result)
    level = Level("DDPM, 1000 calls", distance, FAINT, below=True, error=error)
    return Plot(result["data"], lines, "calls of the model", "Fréchet distance", [level])


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
