"""`prediction="score"`, against formulas in float64, and on data with a known score."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import Schedule, Stream
from fastddim.plan import Update, coefficient_row, inversion_row, unchecked_row

from .support.environment import CPU_IMPLS
from .support.models import GaussianModel

LINEAR = Schedule.linear()
SHAPE = (2, 3, 4, 5)
STEPS = ((0.9999, 1.0), (0.5, 0.9), (0.02, 0.7), (4e-5, 6e-5))


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class GaussianScore(GaussianModel):
    """The exact score for data N(mean, scale²·I)."""

    def density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) of each sample, up to a constant."""
        a = self.alphas_cumprod[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        variance = a * self.scale**2 + 1 - a
        return -((x - a.sqrt() * self.mean).square() / (2 * variance)).flatten(1).sum(1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return -(x - a.sqrt() * self.mean) / (a * self.scale**2 + 1 - a)


SCORE, EPSILON = GaussianScore(LINEAR.alphas_cumprod), GaussianModel(LINEAR.alphas_cumprod)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_step(impl: str) -> None:
    """ε = −√(1−ᾱ)·score and x_0 = (x + (1−ᾱ)·score)/√ᾱ."""
    x, score = draws(*SHAPE), draws(*SHAPE, seed=1)
    for (a, p), clip in itertools.product(STEPS, (None, 0.7)):
        own, own_x_0 = fastddim.step(
            x, score, a, p, prediction="score", clip=clip, return_x0=True, impl=impl
        )
        x_0 = (x + (1 - a) * score) / math.sqrt(a)
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        expected = math.sqrt(p) * x_0 - math.sqrt((1 - p) * (1 - a)) * score
        tolerance = {"rtol": 1e-12, "atol": 1e-13 / math.sqrt(a)}
        torch.testing.assert_close(own, expected, **tolerance)
        torch.testing.assert_close(own_x_0, x_0, **tolerance)


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    x, t = draws(4, 3).requires_grad_(), torch.tensor([0, 10, 500, 999])
    (gradient,) = torch.autograd.grad(SCORE.density(x, t).sum(), x)
    torch.testing.assert_close(gradient, SCORE(x, t))


KINDS: list[dict[str, Any]] = [
    {},
    {"eta": 1.0},
    {"eta": 0.5, "clip": 0.8, "rederive_eps": True},
    {"order": 2},
    {"denoised_fn": lambda x_0, t: x_0 * 0.9},
    {"dynamic_thresholding_ratio": 0.9},
]


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
def test_samples_are_those_of_epsilon(impl: str, kind: dict[str, Any]) -> None:
    common = {"steps": 20, "x_T": draws(*SHAPE), "seed": 3, "impl": impl, **kind}
    expected = fastddim.sample(EPSILON, **common)
    own = fastddim.sample(SCORE, prediction="score", **common)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
    assert (own - fastddim.sample(SCORE, **common)).abs().max() > 0.1


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_whole_runs_reach_the_data(impl: str) -> None:
    """Whole runs reach the data: the ODE keeps the number of standard deviations of a state from
    the mean.
    """
    x_T = draws(1000)
    a = LINEAR.alphas_cumprod[999]
    x_0 = fastddim.sample(SCORE, 1000, x_T=x_T, prediction="score", impl=impl)
    off = (x_T - a.sqrt() * SCORE.mean) / (a * SCORE.scale**2 + 1 - a).sqrt()
    torch.testing.assert_close(x_0, SCORE.mean + SCORE.scale * off, rtol=0, atol=0.02)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("kind", [{}, {"order": 2}, {"refine": 2}], ids=str)
def test_inversion(impl: str, kind: dict[str, Any]) -> None:
    data = 0.5 + 0.3 * draws(*SHAPE)
    common = {"x_0": data, "steps": 20, "impl": impl, **kind}
    expected = fastddim.invert(EPSILON, **common)
    own = fastddim.invert(SCORE, prediction="score", **common)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def test_the_first_step_up_is_the_forward_process() -> None:
    """From ᾱ = 1 the state is √ᾱ·x_0 + √(1−ᾱ)·ε."""
    x_0, score, a = 0.7, -1.3, 0.9
    row = inversion_row(a, 1.0, Update(prediction="score"))
    predicted = row.cx * x_0 + row.cm * score
    assert predicted == pytest.approx(x_0, rel=1e-14)
    x_t = row.k0 * predicted + row.kx * x_0 + row.km * score
    epsilon = -math.sqrt(1 - a) * score
    assert x_t == pytest.approx(math.sqrt(a) * x_0 + math.sqrt(1 - a) * epsilon, rel=1e-14)
    assert row.ex * x_0 + row.em * score == pytest.approx(epsilon, rel=1e-14)


def test_clean_data_have_no_score_to_step_from() -> None:
    """At ᾱ = 1, ε would be the score times 0: noise forgotten, not found."""
    update = Update(prediction="score")
    with pytest.raises(ValueError, match=r"^alpha_t: expected a value below 1 .* got 1"):
        coefficient_row(1.0, 0.9, update)
    one = torch.ones(1, dtype=torch.float64)
    row = unchecked_row(one, 0.9 * one, update)
    assert row.em == row.cm == 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance(scale: float, rescale: float) -> None:
    """ε is linear in the score, so is guidance; its rescale knows no units."""
    x, scores = draws(*SHAPE), draws(4, *SHAPE[1:], seed=1)
    a, p = 0.3, 0.6
    kind = {"guidance_scale": scale, "guidance_rescale": rescale}
    own = fastddim.step(x, scores, a, p, prediction="score", **kind)
    expected = fastddim.step(x, -math.sqrt(1 - a) * scores, a, p, **kind)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_gradients(impl: str) -> None:
    x, score = (draws(2, 3, seed=i).requires_grad_() for i in (0, 1))
    a, p = 0.3, 0.6

    def both(x: Tensor, score: Tensor) -> Any:
        return fastddim.step(x, score, a, p, prediction="score", return_x0=True, impl=impl)

    assert torch.autograd.gradcheck(both, (x, score))
    gradients = torch.autograd.grad(both(x, score)[0].sum(), (x, score))
    of_score = math.sqrt(p / a) * (1 - a) - math.sqrt((1 - p) * (1 - a))
    for got, value in zip(gradients, (math.sqrt(p / a), of_score), strict=True):
        np.testing.assert_allclose(got.numpy(), value, rtol=1e-13)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_requests_of_a_stream(impl: str) -> None:
    stream = Stream(SCORE, shape=(2, 5), prediction="score", impl=impl)
    tickets = [stream.submit(steps, seed=steps, eta=0.5) for steps in (3, 7, 4)]
    stream.run()
    for ticket, steps in zip(tickets, (3, 7, 4), strict=True):
        alone = fastddim.sample(
            SCORE, steps, shape=(1, 5), prediction="score", seed=steps, eta=0.5, impl=impl
        )
        assert torch.equal(ticket.result(), alone)


def test_a_run_says_so_in_its_manifest(tmp_path: Any) -> None:
    common = {"out": tmp_path / "run", "stop": 3, "shape": (2, 1, 4, 4)}
    kind = {"model_id": "gaussian", "format": "safetensors", **common}
    first = fastddim.generate(SCORE, 3, prediction="score", **kind)
    assert fastddim.generate(SCORE, 3, prediction="score", **kind).digest == first.digest
    with pytest.raises(ValueError, match=r"prediction: \"score\" in the folder, \"epsilon\" here"):
        fastddim.generate(SCORE, 3, **kind)
