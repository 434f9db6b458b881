"""Against lucidrains' denoising-diffusion-pytorch, live."""

from __future__ import annotations

import copy
import types

import pytest
import torch

from fastddim.integrations import denoising_diffusion_pytorch as fast

from ..support.dropins.lucidrains import SHAPE, Model, compare, make
from ..support.dropins.peers import (
    TOLERANCE,
    assert_same,
    default_dtype,
    lucidrains,
    run_example,
    same_draws,
)

OBJECTIVES = ["pred_noise", "pred_x0", "pred_v"]

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)


@each_dtype
@each_objective
@pytest.mark.parametrize("self_condition", [False, True])
def test_loops(self_condition, objective, dtype):
    with default_dtype(dtype):
        for schedule, eta, steps, normalize, shape in (
            ("sigmoid", 0.0, 13, True, SHAPE),
            ("cosine", 0.5, 59, False, (1, 2, 5, 3)),
            ("linear", 1.0, 7, True, SHAPE),
            ("cosine", 1.0, 60, True, SHAPE),
            ("sigmoid", 2.5, 1, True, SHAPE),
            ("sigmoid", 2.5, 13, True, SHAPE),
        ):
            diffusion = make(
                dtype,
                self_condition=self_condition,
                objective=objective,
                beta_schedule=schedule,
                ddim_sampling_eta=eta,
                sampling_timesteps=steps,
                auto_normalize=normalize,
            )
            given = diffusion.model.given
            for return_all in (False, True):
                given.clear()
                compare(diffusion, fast.ddim_sample, shape, return_all, tolerance=TOLERANCE[dtype])
                assert len(given) == 2 * steps
                assert_same(given[:steps], given[steps:], 2 * TOLERANCE[dtype])


def test_through_sample():
    diffusion = make(torch.float32, ddim_sampling_eta=0.3)
    own = copy.copy(diffusion)
    own.ddim_sample = types.MethodType(fast.ddim_sample, own)
    result, expected = same_draws(
        lambda: own.sample(batch_size=2), lambda: diffusion.sample(batch_size=2)
    )
    assert_same(result, expected, 1e-5)
    assert result.is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_objective
def test_half_precision_buffers(objective, dtype):
    """As near to the float64 run of the same buffers as the peer, over many draws: the peer rounds
    more often, but where either rounds up is chance.
    """
    steps = 3
    diffusion = make(dtype, objective=objective, sampling_timesteps=steps, ddim_sampling_eta=0.0)
    exact = copy.deepcopy(diffusion).double()
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(32):
        torch.manual_seed(seed)
        x_T = torch.randn(SHAPE, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch, default_dtype(dtype):
            patch.setattr(torch, "randn", lambda *_, x_T=x_T, **__: x_T)
            results = fast.ddim_sample(diffusion, SHAPE), diffusion.ddim_sample(SHAPE)
            patch.setattr(torch, "randn", lambda *_, x_T=x_T, **__: x_T.double())
            truth = exact.ddim_sample(SHAPE)
        assert {result.dtype for result in results} == {dtype}
        errors += torch.stack([(result.double() - truth).abs().mean() for result in results])
    assert errors[0] <= 1.25 * errors[1]


class GuidedModel(Model):
    """With the guidance of the peer's own Unet."""

    cond_drop_prob = 0.5

    def forward(self, x, time, classes, cond_drop_prob=None):
        kept = 1.0 - cond_drop_prob
        shift = kept * (classes.to(x.dtype).reshape(-1, 1, 1, 1) + 1) / 5
        return super().forward(x + shift, time) - 0.1 * shift

    def forward_with_cond_scale(self, *args, **kwargs):
        return lucidrains()[1].Unet.forward_with_cond_scale(self, *args, **kwargs)


def make_guided(dtype, **kwargs):
    _, peer = lucidrains()
    kwargs = {"image_size": 6, "timesteps": 60, "sampling_timesteps": 13, **kwargs}
    return peer.GaussianDiffusion(GuidedModel(), **kwargs).to(dtype)


@each_dtype
@each_objective
@pytest.mark.parametrize("plus_plus", [False, True])
def test_classifier_free(plus_plus, objective, dtype):
    classes = torch.tensor([0, 3, 1])
    with default_dtype(dtype):
        for schedule, eta, steps, kwargs in (
            ("cosine", 0.0, 13, {}),
            ("linear", 0.5, 59, {"cond_scale": 2.5, "rescaled_phi": 0.0}),
            ("cosine", 1.0, 7, {"clip_denoised": False}),
            ("linear", 1.0, 1, {"cond_scale": 0.5}),
            ("linear", 3.0, 7, {}),
        ):
            diffusion = make_guided(
                dtype,
                objective=objective,
                beta_schedule=schedule,
                ddim_sampling_eta=eta,
                sampling_timesteps=steps,
                use_cfg_plus_plus=plus_plus,
            )
            compare(
                diffusion,
                fast.classifier_free_ddim_sample,
                classes,
                SHAPE,
                tolerance=TOLERANCE[dtype],
                **kwargs,
            )


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
@pytest.mark.parametrize("plus_plus", [False, True])
def test_classifier_free_at_scale_1(plus_plus, objective):
    """The model's output is unpacked as a pair then: of two samples, or else it fails."""
    with default_dtype(torch.float64):
        diffusion = make_guided(
            torch.float64, objective=objective, use_cfg_plus_plus=plus_plus, ddim_sampling_eta=0.5
        )
        arguments = (torch.tensor([0, 3]), (2, 2, 6, 6), 1.0)
        method = fast.classifier_free_ddim_sample
        compare(diffusion, method, *arguments, tolerance=1e-10)
        with pytest.raises(ValueError, match="unpack"):
            method(diffusion, torch.tensor([0, 3, 1]), SHAPE, 1.0)


def test_example():
    peer, _ = lucidrains()

    class GaussianDiffusion(peer.GaussianDiffusion):
        pass

    stand_in = types.SimpleNamespace(GaussianDiffusion=GaussianDiffusion)
    names = run_example(fast, {"denoising_diffusion_pytorch": stand_in}, model=Model())
    assert GaussianDiffusion.ddim_sample is fast.ddim_sample
    assert names["images"].shape == (2, 2, 16, 16)
    assert ((names["images"] >= 0) & (names["images"] <= 1)).all()
