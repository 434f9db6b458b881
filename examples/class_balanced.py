"""Many samples for a class-conditional FID: equally many of each class, written by `generate`.

Sample i has the label i mod 10. The run can be killed and started again, and extended: it first has
200 samples here, then 300, of which the second call draws only the last 100. The merged file has
the form that the evaluator of guided-diffusion reads, images in `arr_0` and labels in `arr_1`.

Needs scikit-learn, as does class_conditional.py, which defines the model.

python examples/class_balanced.py --out runs/class_balanced
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from class_conditional import NULL, STEPS, LabelledDigits

import fastddim

COUNTS = (200, 300)  # an FID takes 50,000


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/class_balanced"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = LabelledDigits().to(args.device).eval()
    merged = args.out / "samples.npz"
    for count in COUNTS:
        run = fastddim.generate(
            model,
            STEPS,
            args.out,
            stop=count,
            batch_size=64,
            conditions={"y": torch.arange(count) % 10},
            uncond_kwargs={"y": NULL},
            guidance_scale=2.0,
            merged=merged,
        )
        print(f"{run.stop} samples, SHA-256 {run.digest[:16]}…")
    with np.load(merged) as file:
        images, labels = file["arr_0"], file["arr_1"]
    print(f"{merged}: arr_0 {images.shape}, of each class {np.bincount(labels).tolist()}")


if __name__ == "__main__":
    main()
