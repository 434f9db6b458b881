"""Spherical interpolation, equation 67 of arXiv 2010.02502."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastddim

SHAPE = (3, 2, 4, 4)


def equation_67(z_0, z_1, alpha):
    """The interpolation as printed, per sample, with the angle from the inner product."""
    mixed = np.empty_like(z_0)
    for i, (first, second) in enumerate(zip(z_0, z_1, strict=True)):
        inner = (first * second).sum()
        theta = math.acos(inner / (np.linalg.norm(first) * np.linalg.norm(second)))
        mixed[i] = (
            math.sin((1 - alpha) * theta) * first + math.sin(alpha * theta) * second
        ) / math.sin(theta)
    return mixed


def latents(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(2)]


@given(st.floats(-1, 2))
def test_equation_67(alpha):
    z_0, z_1 = latents()
    own = fastddim.slerp(z_0, z_1, alpha)
    assert own.shape == SHAPE
    expected = equation_67(z_0.numpy(), z_1.numpy(), alpha)
    np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.tensor])
def test_many_weights(as_given):
    z_0, z_1 = latents()
    weights = [0.0, 0.3, 0.5, 1.0]
    given = (
        torch.tensor(weights, dtype=torch.float64)
        if as_given is torch.tensor
        else as_given(weights)
    )
    own = fastddim.slerp(z_0, z_1, given)
    assert own.shape == (4, *SHAPE)
    for i, weight in enumerate(weights):
        assert torch.equal(own[i], fastddim.slerp(z_0, z_1, weight))
    assert own.flatten(0, 1).shape == (12, *SHAPE[1:])


def test_ends_and_middle():
    z_0, z_1 = latents()
    torch.testing.assert_close(fastddim.slerp(z_0, z_1, 0), z_0, rtol=1e-14, atol=0)
    torch.testing.assert_close(fastddim.slerp(z_0, z_1, 1), z_1, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        fastddim.slerp(z_0, z_1, 0.25), fastddim.slerp(z_1, z_0, 0.75), rtol=1e-13, atol=1e-14
    )


def test_stays_on_the_sphere():
    z_0, z_1 = (z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in latents())
    path = fastddim.slerp(z_0, z_1, torch.linspace(0, 1, 9, dtype=torch.float64))
    norms = path.flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-13, atol=0)
    # Equal weights give equal angles.
    cosines = (path[1:] * path[:-1]).flatten(2).sum(2)
    torch.testing.assert_close(cosines, cosines[:1].expand_as(cosines), rtol=1e-13, atol=0)


def test_angle_is_per_sample():
    z_0, z_1 = latents()
    own = fastddim.slerp(z_0, z_1, 0.3)
    for i in range(3):
        assert torch.equal(own[i], fastddim.slerp(z_0[i : i + 1], z_1[i : i + 1], 0.3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_rounded_once(dtype):
    z_0, z_1 = (z.to(dtype) for z in latents())
    own = fastddim.slerp(z_0, z_1, 0.3)
    assert own.dtype == dtype
    exact = fastddim.slerp(z_0.double(), z_1.double(), 0.3)
    assert torch.equal(own, exact.to(dtype))


class TestDegenerate:
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)

    def straight(self, z_0, z_1):
        return torch.stack([(1 - w) * z_0 + w * z_1 for w in self.weights])

    @pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
    def test_parallel_latents_go_straight(self, factor):
        z_0, _ = latents()
        own = fastddim.slerp(z_0, factor * z_0, self.weights)
        torch.testing.assert_close(own, self.straight(z_0, factor * z_0), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("angle", [1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
    def test_nearly_parallel_latents_are_accurate(self, angle):
        """Nearly parallel latents are accurate, although the acos of their inner product would have
        lost the angle.
        """
        z_0 = torch.zeros(1, 4, dtype=torch.float64)
        z_1 = torch.zeros(1, 4, dtype=torch.float64)
        z_0[0, 0] = 1.0
        z_1[0, 0], z_1[0, 1] = math.cos(angle), math.sin(angle)
        own = fastddim.slerp(z_0, z_1, self.weights)[:, 0]
        expected = torch.stack([(self.weights * angle).cos(), (self.weights * angle).sin()], dim=1)
        torch.testing.assert_close(own[:, :2], expected, rtol=1e-9, atol=0)

    def test_one_degenerate_sample_leaves_the_others(self):
        z_0, z_1 = latents()
        z_1[1] = z_0[1]
        own = fastddim.slerp(z_0, z_1, 0.3)
        expected = equation_67(z_0[[0, 2]].numpy(), z_1[[0, 2]].numpy(), 0.3)
        np.testing.assert_allclose(own[[0, 2]].numpy(), expected, rtol=1e-12)
        torch.testing.assert_close(own[1], z_0[1], rtol=1e-12, atol=0)

    def test_scale_does_not_overflow(self):
        z_0, z_1 = latents()
        for factor in (1e-150, 1e150):
            own = fastddim.slerp(factor * z_0, factor * z_1, 0.3)
            torch.testing.assert_close(
                own / factor, fastddim.slerp(z_0, z_1, 0.3), rtol=1e-12, atol=1e-13
            )


def test_inputs_are_not_modified():
    z_0, z_1 = latents()
    before = z_0.clone(), z_1.clone()
    fastddim.slerp(z_0, z_1, [0.2, 0.4])
    assert torch.equal(z_0, before[0])
    assert torch.equal(z_1, before[1])


def test_gradients_flow():
    z_0, z_1 = (z[:, :1, :2, :2].clone().requires_grad_() for z in latents())
    assert torch.autograd.gradcheck(lambda a, b: fastddim.slerp(a, b, [0.3, 0.6]), (z_0, z_1))
