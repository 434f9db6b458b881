"""Features of a run besides the plain loop, against transcriptions in NumPy float64: order 2,
refined inversion, a function of x_0, masks, values that change from step to step.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch

import fastddim
from fastddim import Sampler, Schedule, philox, select_timesteps
from fastddim.plan import PREDICTIONS

from .support.environment import CPU_IMPLS
from .support.models import GaussianModel, SmallNet, elementwise_model, elementwise_numpy
from .support.paper import ddim_step, guided, linear_alphas
from .support.probes import NoSync

SHAPE = (2, 3, 4, 5)
S = 12
ALPHAS = linear_alphas()
LINEAR = Schedule.linear()


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def levels(steps=S, spacing="trailing"):
    """[(timestep, ᾱ, ᾱ of the next)] of a run."""
    timesteps = select_timesteps(1000, steps, spacing).tolist()
    alphas = [*ALPHAS[timesteps], 1.0]
    return list(zip(timesteps, alphas, alphas[1:], strict=False))


def close(own, expected, tolerance=1e-10):
    np.testing.assert_allclose(own.numpy(), expected, rtol=tolerance, atol=tolerance)
    assert np.abs(expected).max() > 0.1


def sigma(alpha):
    return math.sqrt((1 - alpha) / alpha)


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestSchedules:
    """Schedules of an option: a sequence instead of a number, one value a step."""

    def test_eta_and_temperature(self, impl):
        etas = np.linspace(1.0, 0.0, S).tolist()
        factors = np.linspace(0.5, 1.5, S).tolist()
        x_T, noise = draws(*SHAPE), draws(S, *SHAPE, seed=1)
        own = fastddim.sample(
            elementwise_model, S, x_T=x_T, noise=noise, eta=etas, temperature=factors, impl=impl
        )
        x = x_T.numpy()
        for s, (t, a, p) in enumerate(levels()):
            z = factors[s] * noise[s].numpy()
            x, _ = ddim_step(x, elementwise_numpy(x, t), a, p, eta=etas[s], z=z)
        close(own, x)

    def test_guidance(self, impl):
        scales = np.linspace(0.0, 7.0, S).tolist()
        x_T = draws(*SHAPE)

        def model(x, t):
            return elementwise_model(x, t) * torch.tensor([1.0, 1.0, 0.5, 0.25]).view(4, 1, 1, 1)

        own = fastddim.sample(model, S, x_T=x_T, guidance_scale=scales, impl=impl)
        x, strengths = x_T.numpy(), np.array([1.0, 1.0, 0.5, 0.25]).reshape(4, 1, 1, 1)
        for s, (t, a, p) in enumerate(levels()):
            output = elementwise_numpy(np.concatenate([x, x]), t) * strengths
            x, _ = ddim_step(x, guided(output, scales[s]), a, p)
        close(own, x)

    def test_values_per_sample_in_a_step(self, impl):
        per_sample = torch.tensor([0.0, 1.0])
        etas = [0.5, per_sample, *[0.0] * (S - 2)]
        x_T, noise = draws(*SHAPE), draws(S, *SHAPE, seed=1)
        own = fastddim.sample(elementwise_model, S, x_T=x_T, noise=noise, eta=etas, impl=impl)
        for b, second in enumerate((0.0, 1.0)):
            alone = fastddim.sample(
                elementwise_model,
                S,
                x_T=x_T[b : b + 1],
                noise=noise[:, b : b + 1],
                eta=[0.5, second, *[0.0] * (S - 2)],
                impl=impl,
            )
            assert torch.equal(own[b : b + 1], alone)

    def test_no_noise_is_read_at_eta_0(self, impl):
        noise = draws(S, *SHAPE)
        noise[1::2] = math.nan
        own = fastddim.sample(
            elementwise_model, S, x_T=draws(*SHAPE), noise=noise, eta=[1.0, 0.0] * 6, impl=impl
        )
        assert own.isfinite().all()

    def test_temperature_scales_the_noise_of_a_seed(self, impl):
        x_T = draws(*SHAPE)
        kind = {"x_T": x_T, "eta": 1.0, "seed": 5, "impl": impl}
        noise = torch.stack(
            [
                philox.normal(philox.make_keys(5, 2, step_index=s), SHAPE[1:], philox.STEP_NOISE)
                for s in range(S)
            ]
        ).double()
        own = fastddim.sample(elementwise_model, S, temperature=0.3, **kind)
        given = fastddim.sample(elementwise_model, S, noise=0.3 * noise, **kind)
        torch.testing.assert_close(own, given, rtol=1e-12, atol=1e-12)
        silent = fastddim.sample(elementwise_model, S, temperature=0.0, **kind)
        assert not torch.allclose(silent, own, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": [0.0, 1.0]}, "eta: expected one value a step, 12, got 2 of them"),
        ({"eta": [0.0] * 11 + [-1.0]}, "eta[11]: expected a finite number >= 0, got -1"),
        ({"eta": [0.0] * 11 + ["1"]}, "eta[11]: expected a number, got"),
        ({"eta": "1"}, "eta: expected a number, got"),
        ({"temperature": -0.5}, "temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": [1.0] * 13}, "temperature: expected one value a step, 12, got 13"),
        ({"guidance_scale": []}, "guidance_scale: expected one value a step, 12, got 0"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: expected 0 without guidance_scale"),
        (
            {"guidance_rescale": 1.5, "guidance_scale": 2.0},
            "guidance_rescale: expected a number in [0, 1], got 1.5",
        ),
        ({"dynamic_thresholding_ratio": 0.0}, "dynamic_thresholding_ratio: expected a number in"),
        ({"dynamic_thresholding_ratio": 1.01}, "dynamic_thresholding_ratio: expected a number in"),
        (
            {"dynamic_thresholding_ratio": 0.9, "clip": 1.0},
            "clip: expected None with dynamic_thresholding_ratio, got 1.0",
        ),
        (
            {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 0.5},
            "sample_max_value: expected a finite number >= 1, got 0.5",
        ),
        (
            {"sample_max_value": 2.0},
            "sample_max_value: expected None without dynamic_thresholding_ratio, got 2.0",
        ),
        ({"order": 3}, "order: expected one of 1, 2, got 3"),
        ({"order": 2, "eta": 0.5}, "order: expected 1 with eta > 0"),
        ({"denoised_fn": 1}, "denoised_fn: expected a callable, got int"),
        (
            {"denoised_fn": lambda x_0, t: None},
            "denoised_fn's result: expected a tensor, got None",
        ),
        (
            {"denoised_fn": lambda x_0, t: x_0[:1]},
            "denoised_fn's result: expected the shape of the state",
        ),
        ({"mask": torch.ones(2)}, "known: expected data with mask, got None"),
        ({"known": torch.ones(SHAPE)}, "mask: expected a weight of known, got None"),
        (
            {"mask": torch.ones(7), "known": torch.ones(SHAPE)},
            "mask: expected a shape that broadcasts to (2, 3, 4, 5), got (7,)",
        ),
        (
            {"mask": 1.0, "known": torch.ones(SHAPE)},
            "mask: expected a floating-point or bool tensor, got 1.0",
        ),
        (
            {"mask": torch.ones(5), "known": torch.ones(3)},
            "known: expected the shape of the state, (2, 3, 4, 5), got (3,)",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fastddim.sample(elementwise_model, S, shape=SHAPE, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine": -1}, "refine: expected an integer in [0, 100], got -1"),
        ({"refine": 1.0}, "refine: expected an integer, got 1.0"),
        ({"refine": 2, "order": 2}, "refine: expected 0 at order 2"),
        ({"order": 0}, "order: expected one of 1, 2, got 0"),
    ],
)
def test_bad_input_of_invert(arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fastddim.invert(elementwise_model, draws(*SHAPE), S, **arguments)


def adams_bashforth(model, x, visited):
    """Two steps of dx̄/dσ = ε in the variables of eq. 14; `visited` is [(timestep, ᾱ)] and ends
    at ᾱ = 1.
    """
    before = None
    for (t, a), (_, p) in itertools.pairwise(visited):
        scaled, eps, h = x / math.sqrt(a), model(x, t, a), sigma(p) - sigma(a)
        slope = eps
        if before is not None:
            old, old_h = before
            slope = eps + h / (2 * old_h) * (eps - old)
        x, before = (scaled + h * slope) * math.sqrt(p), (eps, h)
    return x


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestOrder2:
    @pytest.mark.parametrize("spacing", ["uniform", "quadratic", "trailing"])
    def test_is_adams_bashforth(self, impl, spacing):
        x_T = draws(*SHAPE)
        own = fastddim.sample(elementwise_model, S, x_T=x_T, order=2, spacing=spacing, impl=impl)
        visited = [(t, a) for t, a, _ in levels(S, spacing)] + [(None, 1.0)]
        expected = adams_bashforth(lambda x, t, a: elementwise_numpy(x, t), x_T.numpy(), visited)
        close(own, expected)

    @pytest.mark.parametrize("prediction", ["sample", "v_prediction", "score"])
    def test_predictions(self, impl, prediction):
        """The epsilon of the step before is that of its own state, for every prediction type."""
        x_T = draws(*SHAPE)
        own = fastddim.sample(
            elementwise_model, S, x_T=x_T, order=2, prediction=prediction, impl=impl
        )

        def eps(x, t, a):
            m = elementwise_numpy(x, t)
            if prediction == "sample":
                return (x - math.sqrt(a) * m) / math.sqrt(1 - a)
            if prediction == "score":
                return -math.sqrt(1 - a) * m
            return math.sqrt(a) * m + math.sqrt(1 - a) * x

        visited = [(t, a) for t, a, _ in levels()] + [(None, 1.0)]
        close(own, adams_bashforth(eps, x_T.numpy(), visited))

    def test_guidance_and_a_model_in_half_precision(self, impl):
        net, x_T = SmallNet().to(torch.bfloat16), draws(*SHAPE).float()
        kind = {"x_T": x_T, "order": 2, "guidance_scale": 1.0, "impl": impl}
        guided_run = fastddim.sample(net, S, **kind)
        plain = fastddim.sample(net, S, **{**kind, "guidance_scale": None})
        torch.testing.assert_close(guided_run, plain, rtol=0.02, atol=0.02)
        first_order = fastddim.sample(net, S, **{**kind, "order": 1})
        assert (guided_run - plain).abs().max() < 0.2 * (guided_run - first_order).abs().max()

    def test_clipped_and_rederived(self, impl):
        """The epsilon of a clipped step is the re-derived one, in the history too."""
        x_T = draws(*SHAPE)
        kind = {"clip": 0.8, "rederive_eps": True}
        own = fastddim.sample(elementwise_model, S, x_T=x_T, order=2, impl=impl, **kind)

        def eps(x, t, a):
            x_0 = (x - math.sqrt(1 - a) * elementwise_numpy(x, t)) / math.sqrt(a)
            return (x - math.sqrt(a) * x_0.clip(-0.8, 0.8)) / math.sqrt(1 - a)

        visited = [(t, a) for t, a, _ in levels()] + [(None, 1.0)]
        close(own, adams_bashforth(eps, x_T.numpy(), visited))

    def test_first_step_is_of_order_1(self, impl):
        x_T = draws(*SHAPE)
        for steps in (1, [700]):
            one = fastddim.sample(elementwise_model, steps, x_T=x_T, order=2, impl=impl)
            assert torch.equal(one, fastddim.sample(elementwise_model, steps, x_T=x_T, impl=impl))

    def test_calls_of_a_sampler_do_not_leak_into_each_other(self, impl):
        sampler = Sampler(elementwise_model, S, shape=SHAPE, order=2, impl=impl)
        first = sampler(seed=1)
        sampler(seed=2)
        assert torch.equal(sampler(seed=1), first)

    def test_zero_terminal_snr(self, impl):
        """At zero terminal SNR σ is infinite: there is no slope to extrapolate from, and no result
        is infinite.
        """
        own = fastddim.sample(
            elementwise_model,
            S,
            x_T=draws(*SHAPE),
            schedule=LINEAR.zero_terminal_snr(),
            spacing="trailing",
            prediction="v_prediction",
            order=2,
            impl=impl,
        )
        assert own.isfinite().all()


# T is large so that the timesteps are as good as continuous, and the first one as good as clean.
FINE = Schedule.linear(20000, 5e-6, 1e-3)


def gaussian_flow(x, a, p):
    """The exact solution of eq. 14 for the data of GaussianModel, from ᾱ = a to ᾱ = p."""
    mean, scale = 0.5, 0.3
    spread = [math.sqrt(scale**2 + sigma(v) ** 2) for v in (a, p)]
    return (mean + (x / math.sqrt(a) - mean) * spread[1] / spread[0]) * math.sqrt(p)


def convergence(errors):
    """The observed order: the slope of log error against log S."""
    steps = sorted(errors)
    logs = [math.log2(errors[s]) for s in steps]
    return np.polyfit([math.log2(s) for s in steps], logs, 1)[0]


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence_of_sampling(order):
    model, x_T = GaussianModel(FINE.alphas_cumprod), draws(64)
    errors = {}
    for steps in (20, 40, 80, 160):
        timesteps = select_timesteps(FINE.T, steps, "quadratic")
        own = fastddim.sample(model, timesteps, x_T=x_T, schedule=FINE, order=order)
        first = FINE.alphas_cumprod[timesteps[0]].item()
        errors[steps] = (own - gaussian_flow(x_T, first, 1.0)).abs().max().item()
    assert convergence(errors) == pytest.approx(-order, abs=0.12), errors


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence_of_inversion(order):
    model, x_0 = GaussianModel(FINE.alphas_cumprod), 0.5 + 0.3 * draws(64)
    errors = {}
    for steps in (20, 40, 80, 160):
        timesteps = select_timesteps(FINE.T, steps, "quadratic")
        own = fastddim.invert(model, x_0, timesteps, schedule=FINE, order=order)
        last = FINE.alphas_cumprod[timesteps[0]].item()
        errors[steps] = (own - gaussian_flow(x_0, 1.0, last)).abs().max().item()
    assert convergence(errors) == pytest.approx(-order, abs=0.25), errors


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_inversion_of_order_2_evaluates_the_model_where_a_step_starts(impl):
    seen, x_0 = [], draws(*SHAPE)

    def model(x, t):
        seen.append(t[0].item())
        return elementwise_model(x, t)

    own = fastddim.invert(model, x_0, S, order=2, impl=impl)
    timesteps = select_timesteps(1000, S).flip(0).tolist()
    assert seen == [timesteps[0], *timesteps[:-1]]
    # The first step is that of order 1: the model at its end.
    a = ALPHAS[timesteps[0]]
    first = math.sqrt(a) * (x_0.numpy() + sigma(a) * elementwise_numpy(x_0.numpy(), timesteps[0]))
    visited = [(t, ALPHAS[t]) for t in timesteps]
    old = elementwise_numpy(x_0.numpy(), timesteps[0])
    x, old_h = first, sigma(a)
    for (t, a), (_, p) in itertools.pairwise(visited):
        eps, h = elementwise_numpy(x, t), sigma(p) - sigma(a)
        slope = eps + h / (2 * old_h) * (eps - old)
        x, old, old_h = (x / math.sqrt(a) + h * slope) * math.sqrt(p), eps, h
    close(own, x, 1e-9)


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestRefine:
    def test_is_a_fixed_point_iteration(self, impl):
        x_0 = draws(*SHAPE)
        for k in (0, 1, 3):
            own = fastddim.invert(elementwise_model, x_0, S, refine=k, impl=impl)
            x, below = x_0.numpy(), 1.0
            for t in select_timesteps(1000, S).flip(0).tolist():
                a, guess = ALPHAS[t], x
                for _ in range(k + 1):
                    eps = elementwise_numpy(guess, t)
                    guess = (x / math.sqrt(below) + (sigma(a) - sigma(below)) * eps) * math.sqrt(a)
                x, below = guess, a
            close(own, x)

    def test_inverts_sampling(self, impl):
        """An iterated inversion makes the round trip exact: `sample` solves the same equation."""
        x_0 = 0.5 + 0.3 * draws(*SHAPE)
        model = GaussianModel(LINEAR.alphas_cumprod)
        errors = {}
        for k in (0, 1, 2, 5, 40):
            z = fastddim.invert(model, x_0, 20, refine=k, impl=impl)
            back = fastddim.sample(model, 20, x_T=z, impl=impl)
            errors[k] = (back - x_0).abs().max().item()
        assert errors[40] < 1e-9, errors
        for fewer, more in itertools.pairwise((0, 1, 2, 5)):
            assert errors[more] < 0.5 * errors[fewer], errors

    def test_guided_and_in_half_precision(self, impl):
        net = SmallNet().to(torch.bfloat16)
        x_0 = draws(*SHAPE).float()
        kind = {"refine": 2, "impl": impl}
        own = fastddim.invert(net, x_0, S, guidance_scale=1.0, **kind)
        plain = fastddim.invert(net, x_0, S, **kind)
        torch.testing.assert_close(own, plain, rtol=0.02, atol=0.02)

    def test_a_callback_sees_each_step_once(self, impl):
        seen = []
        fastddim.invert(
            elementwise_model,
            draws(*SHAPE),
            S,
            refine=3,
            impl=impl,
            callback=lambda *a: seen.append(a),
        )
        assert [s for s, *_ in seen] == list(range(S))


def test_round_trip_of_a_trained_model_is_better_refined(record_property):
    model = fastddim.models.load("digits")
    x_0 = fastddim.sample(model, 100, batch_size=8, seed=3)
    errors = {}
    for k in (0, 1, 2):
        z = fastddim.invert(model, x_0, 20, refine=k)
        errors[k] = (fastddim.sample(model, 20, x_T=z) - x_0).pow(2).mean().sqrt().item()
        record_property(f"round-trip error, refine={k}", errors[k])
        print(f"round-trip error at 20 steps, refine={k}: {errors[k]:.4f}")
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestDenoisedFn:
    """A function between the predicted x_0 and the direction."""

    @pytest.mark.parametrize("rederive_eps", [False, True])
    @pytest.mark.parametrize("clip", [None, 0.7])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_against_a_transcription(self, impl, rederive_eps, clip, prediction):
        x_T, noise, eta = draws(*SHAPE), draws(S, *SHAPE, seed=1), 0.6
        times, seen = [], []

        def denoised_fn(x_0, t):
            times.append(t.tolist())
            return x_0.mul_(0.9).add_(0.05)

        own = fastddim.sample(
            elementwise_model,
            S,
            x_T=x_T,
            noise=noise,
            eta=eta,
            clip=clip,
            rederive_eps=rederive_eps,
            prediction=prediction,
            denoised_fn=denoised_fn,
            impl=impl,
            callback=lambda s, t, x, x_0: seen.append(x_0),
        )
        x = x_T.numpy()
        for s, (t, a, p) in enumerate(levels()):
            m = elementwise_numpy(x, t)
            _, x_0 = ddim_step(x, m, a, p, prediction=prediction)
            eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
            x_0 = x_0 * 0.9 + 0.05
            x_0 = x_0 if clip is None else x_0.clip(-clip, clip)
            if rederive_eps:
                eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
            deviation = eta * math.sqrt((1 - p) / (1 - a) * (1 - a / p))
            x = math.sqrt(p) * x_0 + math.sqrt(1 - p - deviation**2) * eps
            x = x + deviation * noise[s].numpy()
            np.testing.assert_allclose(seen[s].numpy(), x_0, atol=1e-9)
        close(own, x, 1e-9)
        assert times == [[t] * 2 for t, *_ in levels()]

    @pytest.mark.parametrize("order", [1, 2])
    def test_identity_changes_nothing(self, impl, order):
        kind = {"x_T": draws(*SHAPE), "order": order, "impl": impl}
        for extra in (
            {},
            {"clip": 0.5},
            {"clip": 0.5, "rederive_eps": True},
            {"dynamic_thresholding_ratio": 0.8},
            {"guidance_scale": 2.0, "guidance_rescale": 0.7, "dynamic_thresholding_ratio": 0.8},
            {"guidance_scale": torch.tensor([1.0, 3.0])},
            {} if order == 2 else {"eta": torch.tensor([0.0, 1.0]), "seed": 4},
        ):
            hooked = fastddim.sample(
                SmallNet().double(), S, denoised_fn=lambda x_0, t: x_0, **kind, **extra
            )
            plain = fastddim.sample(SmallNet().double(), S, **kind, **extra)
            torch.testing.assert_close(hooked, plain, rtol=1e-9, atol=1e-9)

    def test_a_result_of_another_dtype(self, impl):
        own = fastddim.sample(
            elementwise_model,
            S,
            x_T=draws(*SHAPE).float(),
            denoised_fn=lambda x_0, t: x_0.double() * 0.5,
            impl=impl,
        )
        same = fastddim.sample(
            elementwise_model,
            S,
            x_T=draws(*SHAPE).float(),
            denoised_fn=lambda x_0, t: x_0 * 0.5,
            impl=impl,
        )
        assert torch.equal(own, same)


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestFitted:
    """Dynamic thresholding and guidance rescale through whole loops."""

    @pytest.mark.parametrize("limit", [None, 1.2])
    def test_thresholding(self, impl, limit):
        x_T = 2 * draws(*SHAPE)
        own = fastddim.sample(
            elementwise_model,
            S,
            x_T=x_T,
            dynamic_thresholding_ratio=0.9,
            sample_max_value=limit,
            rederive_eps=True,
            impl=impl,
        )
        x = x_T.numpy()
        for t, a, p in levels():
            x_0 = (x - math.sqrt(1 - a) * elementwise_numpy(x, t)) / math.sqrt(a)
            s = np.quantile(abs(x_0), 0.9, axis=(1, 2, 3), keepdims=True)
            s = s.clip(1.0, limit or math.inf)
            x_0 = x_0.clip(-s, s) / s
            eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
            x = math.sqrt(p) * x_0 + math.sqrt(1 - p) * eps
        close(own, x, 1e-9)

    def test_guidance_rescale(self, impl):
        x_T, strengths = draws(*SHAPE), np.array([1.0, 1.0, 0.5, 0.25]).reshape(4, 1, 1, 1)
        own = fastddim.sample(
            lambda x, t: elementwise_model(x, t) * torch.from_numpy(strengths),
            S,
            x_T=x_T,
            guidance_scale=5.0,
            guidance_rescale=0.7,
            impl=impl,
        )
        x = x_T.numpy()
        for t, a, p in levels():
            output = elementwise_numpy(np.concatenate([x, x]), t) * strengths
            m, conditional = guided(output, 5.0), output[2:]
            deviations = [v.std((1, 2, 3), ddof=1, keepdims=True) for v in (conditional, m)]
            m = 0.7 * m * deviations[0] / deviations[1] + 0.3 * m
            x, _ = ddim_step(x, m, a, p)
        close(own, x, 1e-9)


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestMask:
    def transcription(self, x_T, mask, known, noise, eta=0.0, timesteps=None):
        visited = levels() if timesteps is None else timesteps
        first = visited[0][1]
        z_of_known = (x_T - math.sqrt(first) * known) / math.sqrt(1 - first)
        x = x_T
        for s, (t, a, p) in enumerate(visited):
            x, _ = ddim_step(x, elementwise_numpy(x, t), a, p, eta=eta, z=noise[s])
            there = math.sqrt(p) * known + math.sqrt(1 - p) * z_of_known
            x = mask * there + (1 - mask) * x
        return x

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize(
        "mask",
        [
            torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)),
            torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5,
            torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64),
            torch.tensor(1.0),
        ],
        ids=["soft", "bool", "row", "number"],
    )
    def test_against_a_transcription(self, impl, eta, mask):
        x_T, known, noise = draws(*SHAPE), draws(*SHAPE, seed=1), draws(S, *SHAPE, seed=2)
        own = fastddim.sample(
            elementwise_model, S, x_T=x_T, noise=noise, eta=eta, mask=mask, known=known, impl=impl
        )
        weight = mask.double().expand(SHAPE).numpy()
        close(own, self.transcription(x_T.numpy(), weight, known.numpy(), noise.numpy(), eta))

    def test_known_data_come_out_as_they_went_in(self, impl):
        known = draws(*SHAPE, seed=1).float()
        mask = torch.zeros(SHAPE)
        mask[..., :2] = 1
        own = fastddim.sample(
            SmallNet(), S, shape=SHAPE, seed=3, eta=1.0, mask=mask, known=known, impl=impl
        )
        torch.testing.assert_close(own[..., :2], known[..., :2], rtol=1e-6, atol=1e-6)
        assert (own[..., 2:] - known[..., 2:]).abs().min() > 0

    def test_the_model_sees_the_blended_state(self, impl):
        inputs, known = [], torch.full(SHAPE, 0.25)

        def model(x, t):
            inputs.append(x.clone())
            return elementwise_model(x, t)

        states = fastddim.sample(
            model,
            S,
            shape=SHAPE,
            mask=torch.ones(1),
            known=known,
            guidance_scale=1.5,
            return_trajectory=True,
            impl=impl,
        )
        for x, state in zip(inputs, states, strict=False):
            assert torch.equal(x, torch.cat([state, state]))

    def test_from_noised_data(self, impl):
        """A run may start from noised data: the known part goes on with the noise in it."""
        known, z = draws(*SHAPE, seed=1), draws(*SHAPE, seed=2)
        timesteps = [400, 200, 50]
        a = ALPHAS[400]
        x_T = math.sqrt(a) * known + math.sqrt(1 - a) * z
        states = fastddim.sample(
            elementwise_model,
            timesteps,
            x_T=x_T,
            mask=torch.ones(1),
            known=known,
            return_trajectory=True,
            impl=impl,
        )
        for state, p in zip(states[1:], [ALPHAS[200], ALPHAS[50], 1.0], strict=True):
            close(state, (math.sqrt(p) * known + math.sqrt(1 - p) * z).numpy())

    @pytest.mark.parametrize(
        ("values", "got"),
        [
            ([0.0, 255.0], "values from 0 to 255"),
            ([-0.5, 1.0], "values from -0.5 to 1"),
            ([0.5, math.nan], "NaN"),
            ([1.0, math.inf], "values from 1 to inf"),
        ],
        ids=["bytes", "negative", "NaN", "infinity"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    def test_values_outside_of_0_and_1_are_refused(self, impl, dtype, values, got):
        given = {
            "mask": torch.tensor(values, dtype=dtype).repeat(5)[:5],
            "known": torch.zeros(SHAPE),
        }
        expected = rf"^mask: expected values in \[0, 1\], got {got}$"
        with pytest.raises(ValueError, match=expected):
            fastddim.sample(elementwise_model, S, shape=SHAPE, impl=impl, **given)
        with pytest.raises(ValueError, match=expected):
            Sampler(elementwise_model, S, shape=SHAPE, impl=impl)(**given)
        stream = fastddim.Stream(elementwise_model, shape=SHAPE, masked=True, impl=impl)
        with pytest.raises(ValueError, match=expected):
            stream.submit(S, mask=given["mask"], known=torch.zeros(1, *SHAPE[1:]))

    @pytest.mark.parametrize("call", ["sample", "Sampler", "Stream"])
    def test_values_that_are_not_read_make_nan_of_the_result(self, impl, call):
        """Values that are not read make NaN of the result, as on an accelerator; a mask that has
        derivatives is not looked at either.
        """

        def drawn(mask):
            common = {"mask": mask, "seed": 1}
            if call == "Stream":
                stream = fastddim.Stream(elementwise_model, shape=SHAPE, masked=True, impl=impl)
                ticket = stream.submit(S, known=torch.zeros(1, *SHAPE[1:]), **common)
                stream.run()
                return ticket.result()
            sampler = Sampler(elementwise_model, S, shape=SHAPE, impl=impl)
            known = torch.zeros(SHAPE)
            if call == "Sampler":
                return sampler(known=known, **common)
            return fastddim.sample(
                elementwise_model, S, shape=SHAPE, known=known, impl=impl, **common
            )

        mask = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0])
        whole = drawn(mask)
        assert torch.equal(drawn(mask.clone().requires_grad_()), whole)
        mask[3], mask[4] = 255.0, -1e-3
        broken = drawn(mask.requires_grad_())
        assert broken[..., 3:].isnan().all()
        assert torch.equal(broken[..., :3], whole[..., :3])

    def test_calls_with_and_without(self, impl):
        sampler = Sampler(SmallNet(), S, shape=SHAPE, eta=1.0, impl=impl)
        plain = sampler(seed=1)
        known = [{"mask": torch.ones(1), "known": torch.full(SHAPE, v)} for v in (0.5, -0.5)]
        first, second = (sampler(seed=1, **kind) for kind in known)
        assert torch.allclose(first, -second, atol=1e-6)
        assert torch.equal(sampler(seed=1), plain)


FEATURES = [
    {"order": 2, "clip": 0.8},
    {"denoised_fn": lambda x_0, t: x_0 * 0.9},
    {"denoised_fn": lambda x_0, t: x_0 * 0.9, "rederive_eps": True, "eta": 1.0},
    {"dynamic_thresholding_ratio": 0.9, "eta": [1.0, 0.5, 0.0, 0.0]},
    {"guidance_scale": [1.0, 2.0, 3.0, 2.0], "guidance_rescale": 0.5, "temperature": 0.5},
]


@pytest.mark.parametrize("kind", FEATURES, ids=range(len(FEATURES)))
@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_does_not_wait(kind, masked):
    sampler = Sampler(SmallNet(), 4, shape=SHAPE, **kind)
    extra = {"mask": torch.ones(5) * 0.5, "known": torch.ones(SHAPE)} if masked else {}
    expected = sampler(seed=3, **extra)
    x_T, samples = philox.initial_latents(SHAPE, 3), philox.check_samples(3, 2)
    with NoSync():
        own = sampler._loop.run(x_T, samples=samples, **extra)
    assert torch.equal(own, expected)


@pytest.mark.parametrize("kind", FEATURES, ids=range(len(FEATURES)))
def test_implementations_agree(kind):
    results = [
        fastddim.sample(SmallNet(), 4, shape=SHAPE, seed=4, impl=impl, **kind) for impl in CPU_IMPLS
    ]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)
