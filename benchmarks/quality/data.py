"""The data of the bundled models with labels, split as for training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import train


@dataclass(frozen=True)
class Labelled:
    """Images `[N, C, H, W]` in [−1, 1] and classes `[N]`: to train on, and held out."""

    images: Tensor
    classes: Tensor
    held_out_images: Tensor
    held_out_classes: Tensor


def load(name: str) -> Labelled:
    """The data of the bundled model `name`.

    Raises:
        SystemExit: Fashion-MNIST is not installed; the message says how to get it.
    """
    return _digits() if name == "digits" else _fashion(train.FASHION_MNIST)


def _digits() -> Labelled:
    from sklearn.datasets import load_digits

    data = train.digits_data()
    classes = torch.from_numpy(load_digits().target)
    held_out, trained_on = train.digits_order(len(classes)).tensor_split([train.HELD_OUT])
    return Labelled(data.train, classes[trained_on], data.held_out, classes[held_out])


def _fashion(folder: Path) -> Labelled:
    data = train.fashion_data(folder)
    classes, held_out = (
        torch.from_numpy(train.read_idx(folder / f"{part}-labels-idx1-ubyte.gz").copy()).long()
        for part in ("train", "t10k")
    )
    return Labelled(data.train, classes, data.held_out, held_out)
