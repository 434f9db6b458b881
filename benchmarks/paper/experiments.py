"""Figures 5 and 6 and table 2 of the paper (arXiv 2010.02502), as images and as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from quality import features
from torch import Tensor

import fastddim
from fastddim import philox
from fastddim.choices import Spacing
from fastddim.cli.interpolate import mixed

SEED = 0
SPACING: Spacing = "uniform"
"""The paper's linear τ."""

SPACE = "classifier"


def same_latents(
    model: Any, step_counts: Sequence[int], eta: float, count: int
) -> dict[int, Tensor]:
    """Samples `[count, C, H, W]` of the same x_T, those of `SEED`, by number of steps."""
    return {
        steps: fastddim.sample(model, steps, spacing=SPACING, eta=eta, batch_size=count, seed=SEED)
        for steps in step_counts
    }


def consistency(name: str, samples: Mapping[int, Tensor]) -> dict[int, tuple[float, float]]:
    """The distance of the samples from those of the most steps, for each smaller number of steps.

    The distance is that of the classifier's features, averaged over the samples, as a multiple of
    the average distance between two samples of different x_T.

    Args:
        name: the data set, whose classifier is asked.
        samples: what `same_latents` gave.

    Returns:
        The mean and its standard error by number of steps.
    """
    seen = {
        steps: torch.from_numpy(features.features(SPACE, name, x)) for steps, x in samples.items()
    }
    finest = seen.pop(max(seen))
    unrelated = torch.pdist(finest).mean()
    distances = {steps: (x - finest).norm(dim=1) / unrelated for steps, x in seen.items()}
    return {
        steps: (d.mean().item(), d.std().item() / len(d) ** 0.5) for steps, d in distances.items()
    }


def between(model: Any, seeds: Sequence[int], frames: int, steps: int) -> Tensor:
    """The images between the samples of two seeds `[frames, C, H, W]`, or between those of four,
    row by row `[frames², C, H, W]`.

    The corner of a seed is the sample that is drawn with that seed.
    """
    ends = philox.initial_latents((len(seeds), *model.sample_shape), list(seeds))
    return fastddim.sample(model, steps, spacing=SPACING, x_T=mixed(ends, frames))


def reconstruct(model: Any, images: Tensor, steps: int, refine: int = 0) -> Tensor:
    """Images `[N, C, H, W]` encoded and decoded, in as many steps each."""
    latents = fastddim.invert(model, images, steps, spacing=SPACING, refine=refine)
    return fastddim.sample(model, steps, spacing=SPACING, x_T=latents)


def reconstruction_error(decoded: Tensor, images: Tensor) -> tuple[float, float]:
    """Mean squared error of a pixel in [0, 1], as in table 2, and its standard error."""
    errors = ((decoded.double() - images.double()) / 2).square().flatten(1).mean(1)
    return errors.mean().item(), errors.std().item() / len(errors) ** 0.5
