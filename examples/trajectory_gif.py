"""A GIF from noise to images: every state of one run.

python examples/trajectory_gif.py --out runs/trajectory.gif
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import fastddim


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/trajectory.gif"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = fastddim.models.load("digits", device=args.device)
    # [51, 16, 1, 8, 8]: x_T, and the state after each step; the last states are the samples.
    trajectory = fastddim.sample(model, 50, batch_size=16, seed=0, return_trajectory=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fastddim.images.save_gif(args.out, trajectory)
    print(args.out)


if __name__ == "__main__":
    main()
