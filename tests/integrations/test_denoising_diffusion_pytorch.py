"""Live comparison with lucidrains' denoising-diffusion-pytorch."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch

from fastddim.integrations import denoising_diffusion_pytorch as fast

from ..support.dropins.lucidrains import (
    SHAPE,
    Model,
    compare,
    make,
    make_1d,
    make_guided,
    make_other,
)
from ..support.dropins.peers import (
    TOLERANCE,
    assert_same,
    default_dtype,
    lucidrains,
    lucidrains_module,
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
    """The result is as near to a float64 run of the same buffers as the peer's, over many draws:
    the peer rounds more often, but in a single draw either may be nearer.
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
    """At scale 1 the model's output is unpacked as a pair: of two samples, or with an error."""
    with default_dtype(torch.float64):
        diffusion = make_guided(
            torch.float64, objective=objective, use_cfg_plus_plus=plus_plus, ddim_sampling_eta=0.5
        )
        arguments = (torch.tensor([0, 3]), (2, 2, 6, 6), 1.0)
        method = fast.classifier_free_ddim_sample
        compare(diffusion, method, *arguments, tolerance=1e-10)
        with pytest.raises(ValueError, match="unpack"):
            method(diffusion, torch.tensor([0, 3, 1]), SHAPE, 1.0)


class TestSequences:
    @each_dtype
    @each_objective
    @pytest.mark.parametrize("self_condition", [False, True])
    def test_loops(self, self_condition, objective, dtype):
        with default_dtype(dtype):
            for schedule, eta, steps, normalize, kwargs in (
                ("cosine", 0.0, 13, True, {}),
                ("linear", 0.5, 59, False, {"clip_denoised": False}),
                ("cosine", 1.0, 7, True, {"return_noise": True}),
                ("linear", 1.0, 60, True, {"model_forward_kwargs": {"shift": 0.3}}),
                ("cosine", 2.5, 1, True, {"return_noise": True}),
                ("linear", 2.5, 13, True, {}),
            ):
                diffusion = make_1d(
                    dtype,
                    self_condition=self_condition,
                    objective=objective,
                    beta_schedule=schedule,
                    ddim_sampling_eta=eta,
                    sampling_timesteps=steps,
                    auto_normalize=normalize,
                )
                given = diffusion.model.given
                # Without the clip, x_0 of the first steps is large and so is its rounding.
                tolerance = TOLERANCE[dtype] * (1 if "clip_denoised" not in kwargs else 10)
                compare(diffusion, fast.ddim_sample_1d, (3, 2, 10), tolerance=tolerance, **kwargs)
                assert len(given) == 2 * steps
                assert_same(given[:steps], given[steps:], 2 * tolerance)

    @pytest.mark.parametrize("channel_first", [False, True])
    def test_through_sample(self, channel_first):
        diffusion = make_1d(torch.float32, channel_first=channel_first, ddim_sampling_eta=0.3)
        own = copy.copy(diffusion)
        fast.install(own)
        for kwargs in ({}, {"return_noise": True, "model_forward_kwargs": {"shift": 0.1}}):
            result, expected = same_draws(
                lambda: own.sample(2, **kwargs),  # noqa: B023
                lambda: diffusion.sample(2, **kwargs),  # noqa: B023
            )
            assert_same(result, expected, 1e-5)


class TestOtherClasses:
    @each_dtype
    @each_objective
    @pytest.mark.parametrize("self_condition", [False, True])
    def test_guided(self, self_condition, objective, dtype):
        with default_dtype(dtype):
            for eta, steps in ((0.0, 13), (0.7, 59), (1.0, 1)):
                diffusion = make_other(
                    "guided_diffusion",
                    dtype,
                    Model(self_condition),
                    objective=objective,
                    ddim_sampling_eta=eta,
                    sampling_timesteps=steps,
                )
                for every in (False, True):
                    arguments = (SHAPE, every, None, {"ignored": 1})
                    compare(
                        diffusion, fast.guided_ddim_sample, *arguments, tolerance=TOLERANCE[dtype]
                    )

    def test_guided_through_sample(self):
        diffusion = make_other("guided_diffusion", torch.float32, ddim_sampling_eta=0.3)
        own = copy.copy(diffusion)
        fast.install(own)
        result, expected = same_draws(lambda: own.sample(2), lambda: diffusion.sample(2))
        assert_same(result, expected, 1e-5)

    @each_objective
    def test_repaint(self, objective):
        with default_dtype(torch.float64):
            diffusion = make_other(
                "repaint",
                torch.float64,
                image_size=SHAPE[2:],
                objective=objective,
                ddim_sampling_eta=0.4,
            )
            for every in (False, True):
                compare(diffusion, fast.ddim_sample, SHAPE, every, tolerance=1e-10)

    @pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
    def test_learned_variance(self, objective, monkeypatch):
        """A model with a learned variance has twice the channels, which its own `model_predictions`
        splits.
        """

        class Learned(Model):
            out_dim = 4

            def forward(self, x, time, x_self_cond=None):
                output = super().forward(x, time, x_self_cond)
                return torch.cat([output, 0.3 * output], dim=1)

        peer = lucidrains_module("learned_gaussian_diffusion")
        # Names that its module uses and does not import.
        monkeypatch.setattr(peer, "partial", functools.partial, raising=False)
        monkeypatch.setattr(peer, "identity", lambda x: x, raising=False)
        with default_dtype(torch.float64):
            diffusion = peer.LearnedGaussianDiffusion(
                Learned(),
                image_size=SHAPE[2:],
                timesteps=60,
                sampling_timesteps=13,
                objective=objective,
                ddim_sampling_eta=0.4,
            ).double()
            for every in (False, True):
                compare(diffusion, fast.ddim_sample, SHAPE, every, tolerance=1e-10)
            fast.install(diffusion)
            assert diffusion.sample(batch_size=2).shape == (2, *SHAPE[1:])

    DROP_INS = (
        fast.ddim_sample,
        fast.ddim_sample_1d,
        fast.guided_ddim_sample,
        fast.classifier_free_ddim_sample,
    )

    def test_each_refuses_the_others(self):
        made = (
            make(torch.float32),
            make_1d(torch.float32),
            make_other("guided_diffusion", torch.float32),
            make_guided(torch.float32),
        )
        for diffusion, right in zip(made, self.DROP_INS, strict=True):
            fast.install(diffusion)
            assert diffusion.ddim_sample.__func__ is right
            for wrong in self.DROP_INS:
                diffusion.ddim_sample = types.MethodType(wrong, diffusion)
                if wrong is not right:
                    message = f"^self: .* for {wrong.__name__}, got a .* for {right.__name__}$"
                    with pytest.raises(TypeError, match=message):
                        diffusion.ddim_sample(SHAPE, return_noise=True)

    @pytest.mark.parametrize(
        "name",
        [
            "continuous_time_gaussian_diffusion.ContinuousTimeGaussianDiffusion",
            "v_param_continuous_time_gaussian_diffusion.VParamContinuousTimeGaussianDiffusion",
            "elucidated_diffusion.ElucidatedDiffusion",
            "simple_diffusion.GaussianDiffusion",
        ],
    )
    def test_no_other_class_of_the_package_has_one(self, name):
        module, _, name = name.partition(".")
        cls = getattr(lucidrains_module(module), name)
        assert not hasattr(cls, "ddim_sample")
        with pytest.raises(TypeError, match=f"^diffusion: expected .* got {name}$"):
            fast.install(cls)
        diffusion = cls.__new__(cls)
        for method in self.DROP_INS:
            with pytest.raises(TypeError, match=r"^self: expected .* which has no ddim_sample$"):
                method(diffusion, SHAPE)

    def test_weighted_objectives_have_no_ddim(self):
        """With weighted objectives the peer's own class fails, and so does ours."""
        peer = lucidrains_module("weighted_objective_gaussian_diffusion")

        class Weighted(Model):
            out_dim = 6

        with pytest.raises(AssertionError, match="ddim sampling cannot be used"):
            peer.WeightedObjectiveGaussianDiffusion(
                Weighted(), image_size=6, timesteps=60, sampling_timesteps=13
            )


def test_example():
    peer, _ = lucidrains()

    class GaussianDiffusion(peer.GaussianDiffusion):
        pass

    stand_in = types.SimpleNamespace(GaussianDiffusion=GaussianDiffusion)
    names = run_example(fast, {"denoising_diffusion_pytorch": stand_in}, model=Model())
    assert GaussianDiffusion.ddim_sample is fast.ddim_sample
    assert names["images"].shape == (2, 2, 16, 16)
    assert ((names["images"] >= 0) & (names["images"] <= 1)).all()
