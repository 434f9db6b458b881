"""Trained models on images they were not trained on: the results of the paper's experiments."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import fastddim

# Table 2 of arXiv 2010.02502: mean squared reconstruction error per dimension of CIFAR10 test
# images in [0, 1]. Smaller grey images are easier, so these are upper bounds here.
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009}

FASHION = Path(__file__).parent / "data" / "fashion_test.npz"


@pytest.fixture(scope="module")
def digits():
    """(training images, their labels, held-out images), split as the model's record says."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[360:]], data.target[order[360:]], images[order[:360]]


@pytest.fixture(scope="module")
def digits_model():
    return fastddim.models.load("digits")


@pytest.fixture(scope="module")
def same_latents(digits_model):
    """Samples at η = 0 of one x_T, by number of steps."""
    return {
        steps: fastddim.sample(digits_model, steps, batch_size=16, seed=1)
        for steps in (5, 10, 20, 50, 100)
    }


def error(own, expected):
    """Mean squared error per dimension, of images in [0, 1]."""
    return ((own - expected) / 2).square().mean().item()


def check_table_2(model, images, step_counts):
    errors = {}
    for steps in step_counts:
        z = fastddim.invert(model, images, steps)
        errors[steps] = error(fastddim.sample(model, steps, x_T=z), images)
        # A code in latent space, not the image itself.
        assert 0.4 < z.std() < 1.1
        assert error(z, images) > 0.03
    assert all(later < earlier for earlier, later in itertools.pairwise(errors.values())), errors
    assert all(errors[steps] < TABLE_2[steps] for steps in step_counts), errors


@pytest.mark.parametrize(
    "steps", [(10, 20, 50), pytest.param((10, 20, 50, 100), marks=pytest.mark.deep)], ids=str
)
def test_reconstruction_of_digits(digits, digits_model, steps):
    check_table_2(digits_model, digits[2][:24], steps)


def test_reconstruction_of_fashion():
    with np.load(FASHION) as data:
        images = torch.from_numpy(data["images"][:6]).float()[:, None] / 127.5 - 1
    check_table_2(fastddim.models.load("fashion"), images, (10, 20, 50))


def test_same_latents_give_the_same_digits(same_latents):
    """Figure 5: with η = 0 the image belongs to x_T, and the more steps the closer."""
    errors = [error(same_latents[steps], same_latents[100]) for steps in (5, 10, 20, 50)]
    assert all(later < earlier / 2 for earlier, later in itertools.pairwise(errors)), errors
    assert errors[1] < 0.005
    strangers = error(same_latents[100], same_latents[100].roll(1, 0))
    assert strangers > 0.05


def test_noise_decides_otherwise(digits_model, same_latents):
    """Noise decides as well: with η = 1 the step noise changes the image, so the same x_T tells
    little.
    """
    drawn = fastddim.sample(digits_model, 20, batch_size=16, seed=1, eta=1.0)
    assert error(drawn, same_latents[100]) > 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_look_like_digits(digits, digits_model, eta):
    """Samples look like digits: as close to a training image as an unseen real digit is, and of
    every class.
    """
    images, labels, held_out = digits
    drawn = fastddim.sample(digits_model, 20, batch_size=120, eta=eta)

    def nearest(x):
        return torch.cdist(x.flatten(1), images.flatten(1)).min(1)

    distance, index = nearest(drawn)
    real = nearest(held_out).values.median()
    assert distance.median() < 1.2 * real
    # Not copies either.
    assert distance.median() > 0.5 * real
    pixels = held_out.flatten(1)
    shuffled = pixels[:, torch.randperm(pixels.shape[1])]
    for noise in (torch.randn(120, 64).clamp(-1, 1), shuffled):
        assert nearest(noise).values.median() > 2.5 * real
    assert np.bincount(labels[index], minlength=10).min() >= 4
    assert drawn.abs().max() < 1.5


def test_clipping_keeps_the_range(digits_model):
    drawn = fastddim.sample(digits_model, 10, batch_size=32, clip=1.0)
    assert drawn.abs().max() <= 1
