"""A classifier for each data set, whose features serve to judge samples.

    python benchmarks/quality/classifier.py digits

trains a classifier and writes it into `benchmarks/quality/classifiers/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastddim.files import atomic_file

FOLDER = Path(__file__).parent / "classifiers"
CLASSES, FEATURES = 10, 64
EPOCHS = {"digits": 60, "fashion": 8}
BATCH, LEARNING_RATE, SEED = 128, 2e-3, 0


class Classifier(nn.Module):
    """Four convolutions and two linear layers; `features` are the inputs of the last layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * (size // 4) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Features `[N, 64]` of images `[N, 1, H, W]` in [−1, 1]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, 10]`."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _convolution(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]


def load(name: str) -> Classifier:
    """The trained classifier of a data set, in eval mode."""
    model = Classifier(size={"digits": 8, "fashion": 28}[name])
    model.load_state_dict(safetensors.torch.load_file(FOLDER / f"{name}.safetensors"))
    return model.eval().requires_grad_(False)


def fit(images: Tensor, classes: Tensor, epochs: int) -> Classifier:
    """Train on the images, each shifted by up to a pixel whenever it is used."""
    torch.manual_seed(SEED)
    model = Classifier(images.shape[-1])
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images))
        index, order = order[:BATCH], order[BATCH:]
        shift = torch.randint(-1, 2, (2,)).tolist()
        batch = F.pad(images[index], (1, 1, 1, 1), value=-1).roll(shift, dims=(2, 3))
        loss = F.cross_entropy(model(batch[:, :, 1:-1, 1:-1]), classes[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, classes: Tensor) -> float:
    """The share of the images whose class is found."""
    found = torch.cat([model(part).argmax(dim=1) for part in images.split(1000)])
    return (found == classes).float().mean().item()


def write(model: Classifier, name: str, record: dict[str, Any]) -> None:
    """Write weights and record into `FOLDER`."""
    FOLDER.mkdir(exist_ok=True)
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    with atomic_file(FOLDER / f"{name}.safetensors") as file:
        file.write(safetensors.torch.save(state))
    with atomic_file(FOLDER / f"{name}.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def main() -> None:
    """Train and write the classifier named on the command line."""
    import data

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(EPOCHS))
    name = parser.parse_args().name
    torch.set_num_threads(1)
    images = data.load(name)
    model = fit(images.images, images.classes, EPOCHS[name])
    share = accuracy(model, images.held_out_images, images.held_out_classes)
    record = {
        "data": name,
        "test_accuracy": round(share, 4),
        "test_images": len(images.held_out_images),
        "train_images": len(images.images),
        "epochs": EPOCHS[name],
        "parameters": sum(value.numel() for value in model.parameters()),
    }
    write(model, name, record)
    print(record)


if __name__ == "__main__":
    main()
