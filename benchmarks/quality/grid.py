"""The paper's table 1 on the bundled models: one cell for each way of sampling.

    python benchmarks/quality/grid.py digits --count 10000
    python benchmarks/quality/grid.py fashion --count 2000 --seconds 3600

Cells that the result file has for the same configuration are not drawn again, so a run that was
stopped goes on where it was.

    python benchmarks/quality/grid.py fashion --count 2000 --long --images all --draw --device cuda
    python benchmarks/quality/grid.py fashion --count 2000 --long --images all

draws all of them on a GPU first, into files, and judges them elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
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
# A cell in the slow feature space looks at this many of its images.
SLOW_COUNT = 2000


@dataclass(frozen=True)
class Cell:
    """One way of sampling: sample i is the i-th of `seed`.

    `variance="large"` is the paper's σ̂, as its code has it: x_0 clipped to ±1 and ε re-derived.
    """

    steps: int
    eta: float = 0.0
    variance: str = "small"
    spacing: str = "uniform"
    order: int = 1
    count: int = 10_000
    seed: int = 0

    def draw(self, model: Any, start: int, stop: int) -> Tensor:
        """Samples `start` to `stop`, `[stop − start, C, H, W]`."""
        large = self.variance == "large"
        return fastddim.sample(
            model,
            self.steps,
            batch_size=stop - start,
            sample_offset=start,
            seed=self.seed,
            eta=self.eta,
            variance=self.variance,
            spacing=self.spacing,
            order=self.order,
            clip=1.0 if large else None,
            rederive_eps=large,
        )


def cells(count: int, *, long: bool) -> Iterator[Cell]:
    """The table of the paper, most telling cells first; `long` adds the columns of 1000 steps."""
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


class Network(torch.nn.Module):
    """The bundled model, computing in bfloat16 where the device does; takes and returns float32."""

    def __init__(self, name_or_path: str, *, compiled: bool, device: str = "cpu") -> None:
        super().__init__()
        model = fastddim.models.load(name_or_path, device=device)
        self.sample_shape, self.schedule = model.sample_shape, model.schedule
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


def draw(cell: Cell, network: Any) -> tuple[Tensor, dict[str, Any]]:
    """A cell's samples on the CPU, and what its row says of how they were drawn."""
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
    """Write what `draw` gives, with 8 bits a pixel, which is all that is judged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez_compressed(file, images=to_uint8(images), row=json.dumps(row))


def stored(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """The images and the row that `store` wrote."""
    with np.load(path) as file:
        return from_uint8(file["images"]), json.loads(str(file["row"]))


def image_file(folder: Path, weights: str, cell: Cell) -> Path:
    """The file of a cell's samples under `--images`."""
    return folder / ("-".join([weights, *map(str, asdict(cell).values())]) + ".npz")


def measure(
    cell: Cell, network: Any, name: str, spaces: tuple[str, ...], path: Path | None = None
) -> dict[str, Any]:
    """Compare a cell's samples with the real images, in each space.

    They are those in the file `path`, and drawn where there is none.
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
    """Measure the cells that `path` lacks, and write it after each; returns what it holds.

    Args:
        name: the data set, "digits" or "fashion".
        path: of the result file, made if missing.
        wanted: the cells.
        model: whose samples, default the bundled model of that name.
        seconds: no cell is begun later than this.
        compiled: whether the network goes through `torch.compile`.
        device: where samples are drawn.
        images: the folder of samples that are drawn already, if any.
    """
    model = model or name
    result = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    weights = fingerprint(model)
    done = {_key(row) for row in result["rows"]}
    network = Network(model, compiled=compiled, device=device)
    provenance = machine()
    began = time.monotonic()
    for cell in wanted:
        spaces = SPACES if cell.spacing == "uniform" else SPACES[:1]
        entry = {"weights": weights, **asdict(cell)}
        if _key(entry) in done:
            continue
        if time.monotonic() - began > seconds:
            break
        drawn = image_file(images, weights, cell) if images else None
        entry |= measure(cell, network, name, spaces, drawn)
        entry |= {"commit": provenance["commit"]}
        result["rows"].append(entry)
        result |= {"data": name, "machine": provenance, **_context(name)}
        with atomic_file(path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        print(entry, flush=True)
    return result


def draw_all(model: str, wanted: Iterator[Cell], images: Path, device: str) -> None:
    """Draw the cells that the folder `images` lacks, and measure nothing."""
    weights, network = fingerprint(model), Network(model, compiled=False, device=device)
    for cell in wanted:
        path = image_file(images, weights, cell)
        if not path.is_file():
            samples, row = draw(cell, network)
            store(path, samples, row)
            print(f"{path.name}: {row['seconds']} s", flush=True)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("weights", "steps", "eta", "variance", "spacing", "order", "count", "seed")
    return tuple(row[name] for name in names)


def _context(name: str) -> dict[str, Any]:
    """The numbers that the distances are compared with."""
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
    option("--device", default="cpu", help="where samples are drawn, default cpu")
    option("--images", type=Path, help="folder of samples that are drawn already")
    option("--draw", action="store_true", help="draw into --images, and measure nothing")
    args = parser.parse_args()
    if args.draw and args.images is None:
        parser.error("--draw: expected a folder, --images")
    torch.set_num_threads(args.threads)
    path = args.results or RESULTS / f"quality-{args.name}.json"
    wanted = cells(args.count, long=args.long)
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
