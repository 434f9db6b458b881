"""The paper's table 1 on the bundled models, and few steps including tuned ones: one cell for each
way of sampling.

    python benchmarks/quality/grid.py digits --count 10000
    python benchmarks/quality/grid.py fashion --count 2000 --seconds 3600
    python benchmarks/quality/grid.py digits --count 10000 --only tuned

Cells that the result file has for the same configuration are not drawn again, so a run that was
stopped continues where it ended.

    python benchmarks/quality/grid.py fashion --count 2000 --long --images all --draw --device cuda
    python benchmarks/quality/grid.py fashion --count 2000 --long --images all

The first of these commands draws all cells on a GPU, into files. The second judges them on another
machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import machine

import fastddim
from fastddim.files import atomic_file
from fastddim.images import from_uint8, to_uint8
from fastddim.processor import has_bfloat16
from quality import classifier
from quality.features import SPACES, features, floor, reference
from quality.frechet import bootstrap, distance, statistics

RESULTS = Path(__file__).resolve().parents[1] / "results"
BATCH = 500
STEPS = (5, 10, 20, 50, 100)
ALL_STEPS = 1000
FEW_STEPS = (4, 5, 6, 8, 10, 12, 15, 20)
"""The numbers of steps that bundled models have tuned steps for."""

TUNED = "tuned"
# The columns that distinguish one way of sampling from another, unless the steps are tuned.
KEY = ("weights", "steps", "eta", "variance", "spacing", "order", "count", "seed")
# The number of images of a cell that the slow feature space uses.
SLOW_COUNT = 2000


@dataclass(frozen=True)
class Cell:
    """One way of sampling: sample i is the i-th of `seed`.

    `variance="large"` is the paper's σ̂, as in its code: x_0 is clipped to ±1 and ε re-derived.
    `spacing="tuned"` stands for the model's tuned steps, with timesteps and weights of their own.
    """

    steps: int
    eta: float = 0.0
    variance: str = "small"
    spacing: str = "uniform"
    order: int = 1
    count: int = 10_000
    seed: int = 0

    @property
    def tuned(self) -> bool:
        """Tell whether the steps are the model's tuned ones."""
        return self.spacing == TUNED

    def draw(self, model: Any, start: int, stop: int) -> Tensor:
        """Samples `start` to `stop`, `[stop − start, C, H, W]`."""
        which = {"batch_size": stop - start, "sample_offset": start, "seed": self.seed}
        if self.tuned:
            return fastddim.sample(model, model.tuned[self.steps], **which)
        large = self.variance == "large"
        return fastddim.sample(
            model,
            self.steps,
            **which,
            eta=self.eta,
            variance=self.variance,
            spacing=self.spacing,
            order=self.order,
            clip=1.0 if large else None,
            rederive_eps=large,
        )

    def entry(self, weights: str, network: Any) -> dict[str, Any]:
        """The part of the row that describes the samples.

        Args:
            weights: fingerprint of the model's weights.
            network: network with its tuned steps, which a row names by their digest.
        """
        found = {"weights": weights, **asdict(self)}
        return found | {TUNED: tuned_digest(network.tuned[self.steps])} if self.tuned else found


def cells(count: int, *, long: bool) -> Iterator[Cell]:
    """All cells, each once and the most informative ones first; `long` adds 1000 steps."""
    groups = (group(count, long=long) for group in GROUPS.values())
    yield from dict.fromkeys(itertools.chain.from_iterable(groups))


def tuned_cells(count: int, *, long: bool) -> Iterator[Cell]:
    """The cells of tuned steps."""
    for steps in FEW_STEPS:
        yield Cell(steps, spacing=TUNED, count=count)


def few_cells(count: int, *, long: bool) -> Iterator[Cell]:
    """The cells that few tuned steps are compared with; `long` adds DDPM's 1000 steps."""
    for order, eta in ((2, 0.0), (1, 0.0), (1, 1.0)):
        for steps in FEW_STEPS:
            yield Cell(steps, eta, spacing="trailing", order=order, count=count)
    if long:
        yield Cell(ALL_STEPS, 1.0, count=count)


def paper_cells(count: int, *, long: bool) -> Iterator[Cell]:
    """The paper's table, most informative cells first; `long` adds the columns of 1000 steps."""
    for eta, variance in ((0.0, "small"), (1.0, "small"), (1.0, "large")):
        for steps in STEPS:
            yield Cell(steps, eta, variance, count=count)
    for steps in STEPS:
        yield Cell(steps, order=2, count=count)
    if long:
        yield Cell(ALL_STEPS, 1.0, count=count)
    for spacing in ("trailing", "quadratic"):
        for steps in STEPS:
            yield Cell(steps, spacing=spacing, count=count)
            yield Cell(steps, spacing=spacing, order=2, count=count)
            yield Cell(steps, 1.0, spacing=spacing, count=count)
    for eta in (0.2, 0.5):
        for steps in STEPS:
            yield Cell(steps, eta, count=count)
    if long:
        yield Cell(ALL_STEPS, 0.0, count=count)
        yield Cell(ALL_STEPS, 1.0, "large", count=count)
        for eta in (0.2, 0.5):
            yield Cell(ALL_STEPS, eta, count=count)


GROUPS: dict[str, Callable[..., Iterator[Cell]]] = {
    "tuned": tuned_cells,
    "few": few_cells,
    "paper": paper_cells,
}


class Network(torch.nn.Module):
    """The bundled model, computing in bfloat16 if the device does; takes and returns float32."""

    def __init__(self, name_or_path: str, *, compiled: bool, device: str = "cpu") -> None:
        super().__init__()
        model = fastddim.models.load(name_or_path, device=device)
        self.sample_shape, self.schedule = model.sample_shape, model.schedule
        self.tuned = model.tuned
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.device_type = torch.device(device).type
        narrow = has_bfloat16() if self.device_type == "cpu" else torch.cuda.is_bf16_supported()
        self.precision = "bfloat16" if narrow else "float32"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        enabled = self.precision == "bfloat16"
        with torch.autocast(self.device_type, torch.bfloat16, enabled=enabled):
            output: Tensor = self.model(x, t)
        return output.float()


def fingerprint(name_or_path: str) -> str:
    """The first 16 digits of the SHA-256 of a model's weights."""
    path = fastddim.models.locate(name_or_path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def tuned_digest(steps: fastddim.TunedSteps) -> str:
    """The first 16 digits of the SHA-256 of all that samples of tuned steps depend on."""
    numbers = json.dumps([steps.timesteps, steps.direction, steps.history])
    return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def available(wanted: Iterable[Cell], network: Any) -> Iterator[Cell]:
    """The cells that a model can draw, since not all models have tuned steps."""
    return (cell for cell in wanted if not cell.tuned or cell.steps in network.tuned)


def draw(cell: Cell, network: Any) -> tuple[Tensor, dict[str, Any]]:
    """A cell's samples on the CPU, and the part of its row that says how they were drawn."""
    began = time.perf_counter()
    images = torch.cat(
        [
            cell.draw(network, start, min(start + BATCH, cell.count)).cpu()
            for start in range(0, cell.count, BATCH)
        ]
    )
    row = {"seconds": round(time.perf_counter() - began, 1), "network": network.precision}
    if network.device_type == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
    return images, row


def store(path: Path, images: Tensor, row: dict[str, Any]) -> None:
    """Write the result of `draw`, with 8 bits a pixel, since only these are judged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez_compressed(file, images=to_uint8(images), row=json.dumps(row))


def stored(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read the images and the row that `store` wrote."""
    with np.load(path) as file:
        return from_uint8(file["images"]), json.loads(str(file["row"]))


def image_file(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The file of the samples that `Cell.entry` describes, under `--images`."""
    return folder / ("-".join(map(str, entry.values())) + ".npz")


def measure(
    cell: Cell, network: Any, name: str, spaces: tuple[str, ...], path: Path | None = None
) -> dict[str, Any]:
    """Compare a cell's samples with the real images, in each space.

    The samples are read from the file `path`, or drawn if there is none.
    """
    images, row = stored(path) if path and path.is_file() else draw(cell, network)
    for space in spaces:
        seen = images if space == "classifier" else images[:SLOW_COUNT]
        values = features(space, name, seen)
        real = reference(space, name)
        row[space] = {
            "count": len(values),
            "distance": round(distance(statistics(values), real), 3),
            "error": round(bootstrap(values, real), 3),
        }
    return row


def run(
    name: str,
    path: Path,
    wanted: Iterator[Cell],
    *,
    model: str | None = None,
    seconds: float = float("inf"),
    compiled: bool = True,
    device: str = "cpu",
    images: Path | None = None,
) -> dict[str, Any]:
    """Measure the cells that `path` lacks, write the file after each, and return its content.

    A row of tuned steps replaces the row of other tuned steps of the same number.

    Args:
        name: the data set, "digits" or "fashion".
        path: path of the result file, made if missing.
        wanted: the cells.
        model: model to sample from; by default the bundled model of that name.
        seconds: time after which no cell is begun.
        compiled: whether the network is compiled by `torch.compile`.
        device: device that samples are drawn on.
        images: folder of samples that are already drawn, if any.
    """
    model = model or name
    result = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    weights = fingerprint(model)
    done = {(_key(row), row.get(TUNED)) for row in result["rows"]}
    network = Network(model, compiled=compiled, device=device)
    provenance = machine()
    began = time.monotonic()
    for cell in available(wanted, network):
        spaces = SPACES if cell.spacing in ("uniform", TUNED) else SPACES[:1]
        entry = cell.entry(weights, network)
        if (_key(entry), entry.get(TUNED)) in done:
            continue
        if time.monotonic() - began > seconds:
            break
        drawn = image_file(images, entry) if images else None
        entry |= measure(cell, network, name, spaces, drawn)
        entry |= {"commit": provenance["commit"]}
        others = [row for row in result["rows"] if _key(row) != _key(entry)]
        result["rows"] = [*others, entry]
        result |= {"data": name, "machine": provenance, **_context(name)}
        with atomic_file(path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        print(entry, flush=True)
    return result


def draw_all(model: str, wanted: Iterator[Cell], images: Path, device: str) -> None:
    """Draw the cells that the folder `images` lacks, without measuring them."""
    weights, network = fingerprint(model), Network(model, compiled=False, device=device)
    for cell in available(wanted, network):
        path = image_file(images, cell.entry(weights, network))
        if not path.is_file():
            samples, row = draw(cell, network)
            store(path, samples, row)
            print(f"{path.name}: {row['seconds']} s", flush=True)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _context(name: str) -> dict[str, Any]:
    """The numbers to compare the distances with."""
    floors = {}
    for space in SPACES:
        value, count = floor(space, name)
        floors[space] = {"distance": round(value, 3), "count": count}
    record = json.loads((classifier.FOLDER / f"{name}.json").read_text())
    return {"floors": floors, "classifier": record}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("name", choices=("digits", "fashion"))
    option("--count", type=int, required=True, help="samples of each cell")
    option("--model", help="a model's folder, default the bundled model")
    option("--results", type=Path, help="default benchmarks/results/quality-<name>.json")
    option("--seconds", type=float, default=float("inf"), help="begin no cell later than this")
    option("--threads", type=int, default=torch.get_num_threads())
    option("--long", action="store_true", help="1000 steps too")
    option("--only", choices=GROUPS, help="tuned steps, what few are compared with, or the paper's")
    option("--device", default="cpu", help="where samples are drawn, default cpu")
    option("--images", type=Path, help="folder of samples that are drawn already")
    option("--draw", action="store_true", help="draw into --images, and measure nothing")
    args = parser.parse_args()
    if args.draw and args.images is None:
        parser.error("--draw: expected a folder, --images")
    torch.set_num_threads(args.threads)
    path = args.results or RESULTS / f"quality-{args.name}.json"
    wanted = GROUPS.get(args.only, cells)(args.count, long=args.long)
    if args.draw:
        draw_all(args.model or args.name, wanted, args.images, args.device)
        return
    run(
        args.name,
        path,
        wanted,
        model=args.model,
        seconds=args.seconds,
        compiled=args.device == "cpu",
        device=args.device,
        images=args.images,
    )


if __name__ == "__main__":
    main()
