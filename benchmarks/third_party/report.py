"""How near to the ODE's solution few steps come, on the galaxy networks that others trained.

    make third-party

installs them and runs this; cells that the result file has are not measured again, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import machine
from paper.sheets import Panel, sheet

import fastddim
from fastddim import philox
from fastddim.files import atomic_file
from fastddim.images import to_uint8
from third_party.galaxygrad import NETWORKS, load
from third_party.ode import OWN_EVALUATIONS, adaptive, own_sampler

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "third-party.json"
FIGURE = ROOT / "docs" / "figures" / "third-party.png"
INSTALLED = ROOT / "build" / "third-party"
WEIGHTS, KEPT = INSTALLED / "galaxygrad", INSTALLED / "samples"

STEPS = (4, 5, 6, 8, 10, 12, 15, 20)
TUNED_STEPS = (5, 10)
MANY_STEPS = (25, 30, 40, 50, 75, 100, 150, 200)
"""Tried until they are as near as the package's own sampler, on its few latents."""
REFERENCE_STEPS = 500
COUNT, FEW = 32, 8
"""Latents of a cell, and of one that takes many calls of the network."""
SHOWN = 2
"""Latents of the picture."""
SEED = 2026
METHODS = {"order 1": 1, "order 2": 2}


@dataclass(frozen=True)
class Cell:
    """One way of sampling: its samples are those of the first `count` latents of `seed`.

    `steps` is the number of network calls, None where the method finds it.
    """

    network: str
    method: str
    steps: int | None
    count: int = COUNT
    seed: int = SEED


def cells(name: str) -> Iterator[Cell]:
    """The cells of a network."""
    yield Cell(name, "accurate", None, FEW)
    for method in METHODS:
        yield from (Cell(name, method, steps) for steps in STEPS)
    yield from (Cell(name, "tuned", steps) for steps in TUNED_STEPS)
    yield Cell(name, "own sampler", OWN_EVALUATIONS, FEW)
    yield Cell(name, "adaptive", None, FEW)
    for method in METHODS:
        yield from (Cell(name, method, steps, FEW) for steps in MANY_STEPS)


def pictured(name: str) -> dict[Cell, str]:
    """The cells of a network that the picture shows above the reference, with their labels."""
    labels = {"order 2": "S = {}", "tuned": "{}, tuned"}
    return {
        Cell(name, method, steps): labels[method].format(steps)
        for steps in (5, 10)
        for method in labels
    }


class Subject:
    """A network, its latents, and what is worked out of them once."""

    def __init__(self, name: str, weights: Path) -> None:
        self.name = name
        self.path = path = weights / f"{NETWORKS[name]}.eqx"
        self.model = load(path)
        self.weights = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def latents(self, cell: Cell) -> Tensor:
        return philox.initial_latents((cell.count, *self.model.sample_shape), cell.seed)

    @cached_property
    def tuned(self) -> Mapping[int, Any]:
        """Steps tuned for this network, by their number, from an earlier call if there was one."""
        path = KEPT / f"{self.weights}-tuned.json"
        if not path.is_file():
            found = fastddim.tune(self.model, TUNED_STEPS, prediction=self.model.prediction)
            fastddim.models.write_tuned(path, found)
        return fastddim.models.read_tuned(path)

    def samples(self, cell: Cell) -> tuple[Tensor, int]:
        """The samples of a cell, and the calls of the network that they took."""
        x_T = self.latents(cell)
        if cell.method == "accurate":
            return adaptive(load(self.path).double(), x_T, 1e-6)
        if cell.method == "adaptive":
            return adaptive(self.model, x_T, 1e-3)
        if cell.method == "own sampler":
            return own_sampler(self.model, x_T), OWN_EVALUATIONS
        if cell.method == "tuned":
            return self.sample(x_T, self.tuned[cell.steps]), cell.steps
        order = METHODS[cell.method]
        return self.sample(x_T, cell.steps, spacing="trailing", order=order), cell.steps

    def sample(self, x_T: Tensor, steps: Any, **options: Any) -> Tensor:
        prediction = self.model.prediction
        return fastddim.sample(self.model, steps, x_T=x_T, prediction=prediction, **options)

    def kept(self, cell: Cell) -> Tensor:
        """The samples of a cell, from an earlier call if there was one."""
        path = self.path_of(cell)
        if not path.is_file():
            self.keep(cell, self.samples(cell)[0])
        return torch.load(path, weights_only=True)

    def keep(self, cell: Cell, samples: Tensor) -> None:
        with atomic_file(self.path_of(cell)) as file:
            torch.save(samples, file)

    def path_of(self, cell: Cell) -> Path:
        name = f"{cell.method}-{cell.steps}-{cell.count}-{cell.seed}".replace(" ", "-")
        return KEPT / f"{self.weights}-{name}.pt"

    def reference(self, count: int = COUNT) -> Tensor:
        """Samples of the first latents in many steps."""
        return self.kept(Cell(self.name, "order 2", REFERENCE_STEPS))[:count]


def measure(subject: Subject, cell: Cell) -> dict[str, Any]:
    """The root mean square of the differences to the reference, over pixels and latents.

    `error` is its standard error, `median` that of the latents' own distances, `of_few` the same
    mean of the first latents alone, and `apart` the distance of two samples of different latents.
    """
    reference = subject.reference(cell.count).double()
    began = time.perf_counter()
    samples, calls = subject.samples(cell)
    seconds = time.perf_counter() - began
    if cell in pictured(cell.network):
        subject.keep(cell, samples)
    squares = (samples.double() - reference).square().flatten(1).mean(1)
    distance = squares.mean().sqrt()
    row = {
        "distance": distance.item(),
        "error": (squares.std() / len(squares) ** 0.5 / (2 * distance)).item(),
        "median": squares.median().sqrt().item(),
        "of_few": squares[:FEW].mean().sqrt().item(),
        "apart": (reference - reference.roll(1, 0)).square().mean().sqrt().item(),
    }
    return {name: float(f"{value:.4g}") for name, value in row.items()} | {
        "calls": calls,
        "seconds": round(seconds, 1),
    }


def run(path: Path, weights: Path, names: list[str], seconds: float = float("inf")) -> bool:
    """Measure the cells that `path` lacks, and write it after each; returns whether all are there.

    Args:
        path: of the result file, made if missing.
        weights: folder of the networks' files.
        names: of the networks.
        seconds: no cell is begun later than this.
    """
    result = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    done = {key(row) for row in result["rows"]}
    provenance = machine()
    began = time.monotonic()
    for name in names:
        subject = Subject(name, weights)
        for cell in cells(name):
            entry = {"weights": subject.weights, **asdict(cell)}
            if key(entry) in done or unneeded(cell, result["rows"]):
                continue
            if time.monotonic() - began > seconds:
                return False
            entry |= measure(subject, cell) | {"commit": provenance["commit"]}
            result["rows"].append(entry)
            result |= {"machine": provenance, "reference_steps": REFERENCE_STEPS}
            with atomic_file(path) as file:
                file.write((json.dumps(result, indent=1) + "\n").encode())
            print(entry, flush=True)
    return True


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("weights", "network", "method", "steps", "count", "seed"))


def unneeded(cell: Cell, rows: list[dict[str, Any]]) -> bool:
    """Whether a cell of many steps follows one that was as near as the package's own sampler."""
    if cell.steps not in MANY_STEPS:
        return False
    own = [row for row in rows if row["network"] == cell.network]
    (goal,) = (row["of_few"] for row in own if row["method"] == "own sampler")
    return any(row["method"] == cell.method and row["of_few"] <= goal for row in own)


def draw(path: Path, weights: Path, names: list[str], *, columns: int = 5) -> None:
    """Write the picture: for each network the same latents in few steps, tuned, and in many."""
    panels = []
    for name in names:
        subject = Subject(name, weights)
        rows = {label: subject.kept(cell)[:SHOWN] for cell, label in pictured(name).items()}
        rows["reference"] = reference = subject.reference(SHOWN)
        black, white = reference.quantile(0.01).item(), reference.max().item()
        images = np.stack([to_uint8(2 * (x - black) / (white - black) - 1) for x in rows.values()])
        labels = () if len(panels) % columns else tuple(rows)
        # Noise of 256 levels would make a large file.
        panels.append(Panel(name, images // 8 * 8, rows=labels))
    sheet(path, [panels[i : i + columns] for i in range(0, len(panels), columns)])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("networks", nargs="*", default=list(NETWORKS), metavar="|".join(NETWORKS))
    option("--results", type=Path, default=RESULTS)
    option("--figure", type=Path, default=FIGURE)
    option("--weights", type=Path, default=WEIGHTS, help="folder of the networks' files")
    option("--seconds", type=float, default=float("inf"), help="begin no cell later than this")
    option("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    KEPT.mkdir(parents=True, exist_ok=True)
    if run(args.results, args.weights, args.networks, args.seconds):
        draw(args.figure, args.weights, args.networks)


if __name__ == "__main__":
    main()
