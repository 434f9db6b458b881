"""Start from an image instead of noise: a sketch becomes a digit.

The sketch is noised to a timestep t and denoised from there. The higher t is, the less of the
sketch is left. Each row of the picture is one draw of the noise: the sketch, then the results from
t = 199, 399, …

python examples/img2img.py --out runs/img2img.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastddim

SKETCH = """
. . # # # # . .
. . . . . # . .
. . . . . # . .
. . . # # # . .
. . . . . # . .
. . . . . # . .
. . . . . # . .
. . # # # # . .
"""
STARTS = (199, 399, 599, 799)
VARIATIONS = 4


def read_sketch() -> Tensor:
    """float32 `[1, 1, 8, 8]` in [−1, 1]."""
    pixels = [[1.0 if mark == "#" else -1.0 for mark in row.split()] for row in SKETCH.split("\n")]
    return torch.tensor([row for row in pixels if row])[None, None]


def vary(model: fastddim.models.UNet, x_0: Tensor, start: int) -> Tensor:
    """Noise `x_0` to the first timestep up to `start`, and denoise from there."""
    every = fastddim.select_timesteps(model.schedule.T, 100).tolist()
    timesteps = [t for t in every if t <= start]
    x_t = model.schedule.add_noise(x_0, timesteps[0], seed=0)
    return fastddim.sample(model, timesteps, x_T=x_t)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/img2img.png"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = fastddim.models.load("digits", device=args.device)
    sketch = read_sketch().to(args.device).repeat(VARIATIONS, 1, 1, 1)
    columns = [sketch, *(vary(model, sketch, start) for start in STARTS)]
    table = torch.stack(columns, dim=1).flatten(0, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fastddim.images.save_png(args.out, table, columns=len(columns))
    print(args.out)


if __name__ == "__main__":
    main()
