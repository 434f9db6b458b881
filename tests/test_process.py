"""The Gaussians of the paper against brute-force algebra, sampling, and other published forms.

Throughout, a, p and s are α_t, α_{t−1} and σ_t.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from fastddim import Schedule, process
from fastddim.plan import Update, coefficient_row

from .helpers import GaussianModel, SmallNet, ddim_step, linear_alphas

# A handful of float64 operations on numbers near 1.
TOLERANCE = 1e-12

# Standard errors that an estimate of fixed seed may be off.
ERRORS = 4

NUMBER = st.floats(-3, 3)


def close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def affine(gaussian_of, like):
    """(slope, intercept) of a mean that is slope·x + intercept with a scalar slope."""
    intercept = gaussian_of(torch.zeros_like(like)).mean
    slope = gaussian_of(torch.ones_like(like)).mean - intercept
    return slope, intercept


def log_density(x, mean, variance):
    return -((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)) / 2


def before(alphas):
    """α_{t−1} of every t."""
    return np.concatenate([[1.0], alphas[:-1]])


@st.composite
def walks(draw):
    """(alphas, sigmas) of a random decreasing schedule with admissible σ > 0."""
    alphas = np.cumprod(draw(st.lists(st.floats(0.1, 0.999), min_size=2, max_size=6)))
    shares = draw(st.lists(st.floats(0.01, 1.0), min_size=len(alphas), max_size=len(alphas)))
    # Any σ_1 will do, also one above 1.
    limits = np.sqrt(1 - before(alphas))
    limits[0] = 2.0
    return alphas, np.array(shares) * limits


@st.composite
def steps(draw):
    """(a, p, s) of one step with p < 1."""
    p = draw(st.floats(0.01, 0.999))
    a = p * draw(st.floats(0.0, 0.999))
    return a, p, math.sqrt(1 - p) * draw(st.floats(0.01, 1.0))


@given(a=st.floats(0, 1))
def test_marginal(a):
    x_0 = normal(4, 3)
    mean, variance = process.marginal(x_0, a)
    close(mean, math.sqrt(a) * x_0.numpy())
    close(variance, 1 - a)


def test_marginal_is_what_add_noise_draws():
    schedule = Schedule.linear()
    x_0, z, t = normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([0, 500, 999])
    mean, variance = process.marginal(x_0, schedule.alphas_cumprod[t])
    close(schedule.add_noise(x_0, t, z), mean + variance.sqrt() * z)


def test_sigma_by_hand():
    # √((1 − 0.6)/(1 − 0.5))·√(1 − 0.5/0.6) = √0.8·√(1/6); with the second root misprinted as
    # (1 − a)/p it would be √0.8·√(5/6).
    assert process.sigma(0.5, 0.6, 1.0).item() == pytest.approx(math.sqrt(2 / 15), rel=1e-14)
    assert process.sigma(0.5, 0.6, 0.25).item() == pytest.approx(math.sqrt(2 / 15) / 4, rel=1e-14)
    assert process.sigma_hat(0.5, 0.6).item() == pytest.approx(math.sqrt(1 / 6), rel=1e-14)


@given(step=steps(), eta=st.floats(0, 1))
def test_sigmas_are_those_of_the_sampler(step, eta):
    a, p, _ = step
    row = coefficient_row(a, p, Update(eta=eta))
    close(process.sigma(a, p, eta), row.pn)
    close(process.sigma_hat(a, p), coefficient_row(a, p, Update(eta=1, variance="large")).pn)


@given(step=steps())
def test_posterior_written_out(step):
    a, p, s = step
    x_t, x_0 = normal(2, 5), normal(2, 5, seed=1)
    mean, variance = process.posterior(x_t, x_0, a, p, s)
    x, y = x_t.numpy(), x_0.numpy()
    close(mean, math.sqrt(p) * y + math.sqrt(max(1 - p - s**2, 0)) * (x - math.sqrt(a) * y) / math.sqrt(1 - a))
    close(variance, s**2)


@given(walk=walks())
def test_lemma_1_exactly(walk):
    """From q(x_T | x_0) down, integrating each posterior over the marginal before it."""
    alphas, sigmas = walk
    x_0 = normal(2, 3)
    mean, variance = process.marginal(x_0, alphas[-1])
    for t in range(len(alphas) - 1, 0, -1):
        a, p, s = alphas[t], alphas[t - 1], sigmas[t]
        slope, intercept = affine(lambda x: process.posterior(x, x_0, a, p, s), x_0)  # noqa: B023
        own = process.posterior(x_0, x_0, a, p, s).variance
        mean, variance = slope * mean + intercept, slope**2 * variance + own
        close(mean, math.sqrt(p) * x_0.numpy())
        close(variance, np.full(x_0.shape, 1 - p))
