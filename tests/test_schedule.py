"""Schedules against formulas written out here, and against diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastddim import Schedule, philox

from .support.optional import optional
from .support.paper import linear_alphas

diffusers = optional("diffusers")


def product(betas):
    """ᾱ_t = Π (1 − β), one factor at a time."""
    alphas, value = [], 1.0
    for beta in betas:
        value *= 1.0 - beta
        alphas.append(value)
    return np.array(alphas)


def scaled_linear(T, start, end):
    step = (math.sqrt(end) - math.sqrt(start)) / (T - 1)
    return product([(math.sqrt(start) + step * i) ** 2 for i in range(T)])


def cosine(T, s=0.008, cap=0.999):
    def f(u):
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    return product([min(1 - f((i + 1) / T) / f(i / T), cap) for i in range(T)])


def sigmoid(T, start=-3.0, end=3.0, tau=1.0, cap=0.999):
    """The listing of arXiv 2212.11972: start, end and their blend are all divided by tau."""

    def logistic(v):
        return 1 / (1 + math.exp(-v / tau))

    def gamma(u):
        low, high = logistic(start), logistic(end)
        return (high - logistic(u * (end - start) + start)) / (high - low)

    return product([min(1 - gamma((i + 1) / T) / gamma(i / T), cap) for i in range(T)])


def logistic_betas(T, start, end):
    """diffusers' "sigmoid": a logistic curve in β from −6 to 6."""
    return product([start + (end - start) / (1 + math.exp(6 - 12 * i / (T - 1))) for i in range(T)])


def close(schedule, expected, relative=1e-12):
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.alphas_cumprod.device.type == "cpu"
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), expected, rtol=relative, atol=0)


@pytest.mark.parametrize("T", [1, 2, 10, 1000, 4000])
def test_linear(T):
    close(Schedule.linear(T), linear_alphas(T))
    close(Schedule.linear(T, 1e-5, 0.011), linear_alphas(T, 1e-5, 0.011))
    assert Schedule.linear(T).T == T


def test_linear_default_is_the_papers():
    a = Schedule.linear().alphas_cumprod
    assert len(a) == 1000
    assert a[0].item() == pytest.approx(1 - 1e-4, rel=1e-15)
    assert (1 - a[1] / a[0]).item() == pytest.approx(1e-4 + (0.02 - 1e-4) / 999, rel=1e-12)
    assert (1 - a[-1] / a[-2]).item() == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_scaled_linear(T):
    close(Schedule.scaled_linear(T), scaled_linear(T, 0.00085, 0.012))
    close(Schedule.scaled_linear(T, 1e-4, 0.02), scaled_linear(T, 1e-4, 0.02))


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_cosine(T):
    # 1 − f(u + 1/T)/f(u) cancels: near u = 1 both sides lose a few digits.
    close(Schedule.cosine(T), cosine(T), 1e-9)
    close(Schedule.cosine(T, s=0.02, max_beta=0.99), cosine(T, 0.02, 0.99), 1e-9)


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_sigmoid(T):
    close(Schedule.sigmoid(T), sigmoid(T), 1e-9)
    close(Schedule.sigmoid(T, 0.0, 3.0, 0.7, 0.99), sigmoid(T, 0.0, 3.0, 0.7, 0.99), 1e-9)


@pytest.mark.parametrize(
    "as_given", [np.array, list, tuple, torch.tensor], ids=lambda f: f.__name__
)
def test_from_betas_and_alphas_cumprod_keep_float64(as_given):
    betas = np.linspace(1e-4, 0.02, 50)
    given = torch.tensor(betas) if as_given is torch.tensor else as_given([float(b) for b in betas])
    close(Schedule.from_betas(given), product(betas))
    expected = product(betas)
    given = torch.tensor(expected) if as_given is torch.tensor else as_given(expected.tolist())
    assert np.array_equal(Schedule.from_alphas_cumprod(given).alphas_cumprod.numpy(), expected)


def test_a_schedule_owns_its_numbers():
    for given in (torch.tensor([0.9, 0.5], dtype=torch.float64), np.array([0.9, 0.5])):
        schedule = Schedule.from_alphas_cumprod(given)
        given[0] = 0.1
        assert schedule.alphas_cumprod.tolist() == [0.9, 0.5]


def test_equality():
    assert Schedule.linear() == Schedule.linear()
    assert hash(Schedule.linear()) == hash(Schedule.linear())
    assert Schedule.linear() != Schedule.linear(beta_end=0.021)
    assert Schedule.linear() != Schedule.linear(999)
    assert Schedule.linear() != "linear"


@pytest.mark.parametrize(
    "schedule",
    [Schedule.linear(), Schedule.scaled_linear(), Schedule.cosine(100), Schedule.sigmoid(100)],
    ids=["linear", "scaled_linear", "cosine", "sigmoid"],
)
def test_zero_terminal_snr(schedule):
    """Algorithm 1 of arXiv 2305.08891."""
    root = np.sqrt(schedule.alphas_cumprod.numpy())
    first, last = root[0], root[-1]
    rescaled = schedule.zero_terminal_snr()
    a = rescaled.alphas_cumprod.numpy()
    np.testing.assert_allclose(
        a, ((root - last) * first / (first - last)) ** 2, rtol=1e-13, atol=1e-300
    )
    assert a[-1] == 0.0
    assert a[0] == pytest.approx(schedule.alphas_cumprod[0].item(), rel=1e-14)
    np.testing.assert_allclose(rescaled.zero_terminal_snr().alphas_cumprod.numpy(), a, rtol=1e-14)


DIFFUSERS = {
    "linear": ({"beta_schedule": "linear"}, linear_alphas()),
    "scaled_linear": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        scaled_linear(1000, 0.00085, 0.012),
    ),
    "squaredcos_cap_v2": ({"beta_schedule": "squaredcos_cap_v2"}, cosine(1000)),
    "T=100": (
        {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2},
        linear_alphas(100, 0.001, 0.2),
    ),
    "trained_betas": ({"trained_betas": [0.01, 0.3, 0.2]}, product([0.01, 0.3, 0.2])),
}


@pytest.mark.parametrize(("config", "expected"), DIFFUSERS.values(), ids=DIFFUSERS)
def test_from_diffusers(config, expected):
    if "trained_betas" in config:
        config = {**config, "num_train_timesteps": 3}
    scheduler = diffusers.DDIMScheduler(**config)
    # diffusers multiplies 1000 factors in float32.
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), expected, rtol=3e-5)
    own = Schedule.from_diffusers(scheduler)
    assert torch.equal(own.alphas_cumprod, scheduler.alphas_cumprod.double())
    relative = 1e-9 if config.get("beta_schedule") == "squaredcos_cap_v2" else 1e-12
    close(Schedule.from_diffusers(scheduler.config), expected, relative)
    close(Schedule.from_diffusers(dict(scheduler.config)), expected, relative)


def test_from_diffusers_sigmoid():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    expected = logistic_betas(1000, 1e-4, 0.02)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), expected, rtol=3e-5)
    close(Schedule.from_diffusers(scheduler.config), expected)
    assert torch.equal(
        Schedule.from_diffusers(scheduler).alphas_cumprod, scheduler.alphas_cumprod.double()
    )


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_from_diffusers_rescaled(beta_schedule):
    scheduler = diffusers.DDIMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=True)
    for schedule in (Schedule.from_diffusers(scheduler), Schedule.from_diffusers(scheduler.config)):
        assert schedule.alphas_cumprod[-1] == 0.0
    plain = Schedule.from_diffusers(diffusers.DDIMScheduler(beta_schedule=beta_schedule).config)
    exact = Schedule.from_diffusers(scheduler.config)
    assert exact == plain.zero_terminal_snr()
    # diffusers goes from √ᾱ to β and back in float32: an absolute error of about 1000·2⁻²⁴.
    np.testing.assert_allclose(
        exact.alphas_cumprod.numpy(), scheduler.alphas_cumprod.numpy(), rtol=0, atol=6e-5
    )


def test_from_diffusers_does_not_follow_the_scheduler():
    scheduler = diffusers.DDIMScheduler()
    schedule = Schedule.from_diffusers(scheduler)
    scheduler.alphas_cumprod.zero_()
    assert schedule.alphas_cumprod[0] > 0.99


def test_cosine_betas_are_diffusers():
    alphas = np.append(1.0, Schedule.cosine().alphas_cumprod.numpy())
    own = 1 - alphas[1:] / alphas[:-1]
    peer = diffusers.schedulers.scheduling_ddim.betas_for_alpha_bar(1000)
    np.testing.assert_allclose(own, peer.numpy(), rtol=2e-7, atol=1e-12)


class TestAddNoise:
    def test_formula(self):
        x, z = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
        a = linear_alphas()
        for t in (0, 17, 999):
            expected = math.sqrt(a[t]) * x.numpy() + math.sqrt(1 - a[t]) * z.numpy()
            for given in (t, torch.tensor(t), torch.full((3,), t), np.int64(t)):
                np.testing.assert_allclose(
                    Schedule.linear().add_noise(x, given, z).numpy(), expected, rtol=1e-12
                )

    def test_timestep_per_sample(self):
        x, z = torch.randn(3, 4), torch.randn(3, 4)
        schedule = Schedule.linear()
        mixed = schedule.add_noise(x, torch.tensor([0, 500, 999]), z)
        for i, t in enumerate((0, 500, 999)):
            assert torch.equal(mixed[i], schedule.add_noise(x[i : i + 1], t, z[i : i + 1])[0])

    def test_agrees_with_diffusers(self):
        scheduler = diffusers.DDIMScheduler()
        x, z, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 400, 999])
        expected = scheduler.add_noise(x, z, t)
        own = Schedule.from_diffusers(scheduler).add_noise(x, t, z)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)

    def test_default_noise_is_what_sampling_starts_from(self):
        x = torch.randn(2, 3, 4)
        a = linear_alphas()[600]
        noised = Schedule.linear().add_noise(x, 600, seed=5, sample_offset=3)
        z = philox.initial_latents(x.shape, 5, sample_offset=3)
        expected = math.sqrt(a) * x.double() + math.sqrt(1 - a) * z.double()
        torch.testing.assert_close(noised.double(), expected, rtol=1e-6, atol=1e-6)
        each = Schedule.linear().add_noise(x, 600, seed=[7, 8])
        assert torch.equal(each[1:], Schedule.linear().add_noise(x[1:], 600, seed=8))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtype_rounded_once(self, dtype):
        x, z = torch.randn(2, 500).to(dtype), torch.randn(2, 500).to(dtype)
        a = linear_alphas()[321]
        exact = math.sqrt(a) * x.double() + math.sqrt(1 - a) * z.double()
        noised = Schedule.linear().add_noise(x, 321, z)
        assert noised.dtype == dtype
        # float32 arithmetic of two terms is far below one half-precision rounding.
        unit = torch.finfo(dtype).eps / 2
        magnitude = math.sqrt(a) * x.double().abs() + math.sqrt(1 - a) * z.double().abs()
        slack = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        subnormal = torch.finfo(dtype).smallest_normal * unit
        assert (
            (noised.double() - exact).abs() <= unit * exact.abs() + slack * magnitude + subnormal
        ).all()

    def test_inputs_are_not_modified(self):
        x, z = torch.ones(2, 3), torch.ones(2, 3)
        Schedule.linear().add_noise(x, 5, z)
        assert (x == 1).all()
        assert (z == 1).all()
