"""Live comparison with k-diffusion's samplers, and with stable-diffusion-webui's `ddim`, written
out here.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastddim.integrations import k_diffusion, webui

from ..support.dropins.k_diffusion import LINEAR, denoiser, levels
from ..support.dropins.peers import (
    TOLERANCE,
    assert_same,
    k_diffusion_sampling,
    run_example,
    same_draws,
)
from ..support.dropins.webui import WebuiModel, peer_webui

SHAPES = [(3, 2, 7, 5), (2,), (1, 6)]


class Recorder(list):
    def __call__(self, values):
        self.append(dict(values))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("last", [0.0, 0.02])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 3.0])
def test_ancestral(eta, shape, last, dtype):
    peer = k_diffusion_sampling()
    sigmas = levels(dtype, last)
    x = torch.randn(shape, dtype=dtype) * sigmas[0]
    callbacks = [Recorder(), Recorder()]
    kwargs = {"extra_args": {"shift": 0.3}, "disable": True, "eta": eta, "s_noise": 1.1}
    own, expected = same_draws(*[
        lambda f=f, c=c: f(denoiser, x, sigmas, callback=c, **kwargs)
        for f, c in zip(
            (k_diffusion.sample_ddim, peer.sample_euler_ancestral), callbacks, strict=True
        )
    ])  # fmt: skip
    assert_same(own, expected, TOLERANCE[dtype])
    assert len(callbacks[0]) == len(sigmas) - 1
    assert_same(*callbacks, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_euler(dtype):
    peer = k_diffusion_sampling()
    x, sigmas = torch.randn(2, 3, 5, 5, dtype=dtype) * 16, levels(dtype)
    own = k_diffusion.sample_ddim(denoiser, x, sigmas, disable=True)
    expected = peer.sample_euler(denoiser, x, sigmas, disable=True)
    assert_same(own, expected, TOLERANCE[dtype])


def test_noise_sampler():
    peer = k_diffusion_sampling()
    x, sigmas = torch.randn(2, 3, dtype=torch.float64) * 16, levels(torch.float64)
    asked = []

    def noise_sampler(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return torch.randn_like(x) + sigma - sigma_next

    own, expected = same_draws(*[
        lambda f=f: f(denoiser, x, sigmas, None, None, True, 0.7, 0.9, noise_sampler)
        for f in (k_diffusion.sample_ddim, peer.sample_euler_ancestral)
    ])  # fmt: skip
    assert_same(own, expected, 1e-10)
    assert_same(asked[: len(asked) // 2], asked[len(asked) // 2 :], 0)


def test_upwards():
    """Rising levels give numbers at η > 0, although they have no meaning."""
    peer = k_diffusion_sampling()
    x, sigmas = torch.randn(2, 3, dtype=torch.float64), levels(torch.float64).flip(0)[1:]
    for eta in (0.0, 0.5):
        own, expected = same_draws(*[
            lambda f=f, eta=eta: f(denoiser, x, sigmas, disable=True, eta=eta)
            for f in (k_diffusion.sample_ddim, peer.sample_euler_ancestral)
        ])  # fmt: skip
        assert own.isfinite().all()
        assert_same(own, expected, 1e-10)


@pytest.mark.parametrize("dtypes", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64),
    (torch.float64, torch.float32),
], ids=str)  # fmt: skip
def test_state_of_another_dtype_than_the_levels(dtypes):
    """The result is no further from the run in float64 than the peer's, which computes a part in
    x's dtype.
    """
    peer = k_diffusion_sampling()
    x, sigmas = torch.randn(2, 3, 50).to(dtypes[0]), levels(dtypes[1])[-4:]
    noise = torch.randn(3, *x.shape).to(dtypes[0])
    asked = []

    def run(sampler, x, sigmas, noise):
        def model(x, sigma):
            asked.append((x.dtype, sigma.dtype, sigma))
            return x * 0.5  # exact in every dtype

        draws = iter(noise)
        sampling = {"eta": 0.5, "noise_sampler": lambda sigma, sigma_next: next(draws)}
        return sampler(model, x, sigmas, disable=True, **sampling)

    own = run(k_diffusion.sample_ddim, x, sigmas, noise)
    expected = run(peer.sample_euler_ancestral, x, sigmas, noise)
    assert own.dtype == expected.dtype
    assert_same(asked[:3], asked[3:], 0)
    if dtypes == (torch.float64, torch.float32):
        assert_same(own, expected, 1e-10)
    exact = run(peer.sample_euler_ancestral, x.double(), sigmas.double(), noise.double())
    error, its_error = ((v.double() - exact).abs().max() for v in (own, expected))
    assert error <= its_error + 1e-7


def test_eta_is_that_of_ddim():
    """η is that of DDIM: the same run in DDIM's own variables, by `fastddim.step`."""
    import fastddim

    alphas = LINEAR[[900, 600, 300, 50]]
    sigmas = ((1 - alphas) / alphas) ** 0.5
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    noise = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    draws = iter(noise)
    own = k_diffusion.sample_ddim(
        denoiser,
        x / alphas[0].sqrt(),
        sigmas,
        disable=True,
        eta=0.6,
        noise_sampler=lambda sigma, sigma_next: next(draws),
    )
    for i, z in enumerate(noise):
        x_0 = denoiser(x / alphas[i].sqrt(), sigmas[i].expand(2))
        x = fastddim.step(x, x_0, alphas[i], alphas[i + 1], eta=0.6, prediction="sample", noise=z)
    assert_same(own, x / alphas[-1].sqrt(), 1e-12)


def test_example():
    names = run_example(k_diffusion)
    assert names["image"].shape == (2, 3, 32, 32)
    assert names["image"].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 3.0])
def test_webui(eta, shape, dtype):
    model, x = WebuiModel(LINEAR.to(dtype)), torch.randn(shape, dtype=dtype)
    for steps in (1, 7, 20, 300):
        timesteps = (torch.arange(0, 1000, 1000 // steps) + 1).clip(0, 999)
        callbacks = [Recorder(), Recorder()]
        own, expected = same_draws(*[
            lambda f=f, c=c, ts=timesteps: f(model, x, ts, {"scale": 0.9}, c, True, eta)
            for f, c in zip((webui.ddim, peer_webui), callbacks, strict=True)
        ])  # fmt: skip
        assert_same(own, expected, TOLERANCE[dtype])
        assert_same(*callbacks, TOLERANCE[dtype])


def test_webui_promotes():
    """A model that answers in float32 makes the state float32."""
    alphas = WebuiModel(LINEAR.float())
    model = lambda x, t: alphas(x, t).float()  # noqa: E731
    model.inner_model = alphas.inner_model
    x, timesteps = torch.randn(2, 3, 5).half(), torch.tensor([1, 200, 400])
    own, expected = same_draws(
        lambda: webui.ddim(model, x, timesteps, disable=True, eta=0.5),
        lambda: peer_webui(model, x, timesteps, eta=0.5),
    )
    assert own.dtype == expected.dtype == torch.float32
    # The stand-in for the original rounds the state and epsilon to half in the first step.
    assert_same(own, expected, 2 * torch.finfo(torch.float16).eps)


def test_webui_draws_from_its_own_generators(monkeypatch):
    hijack = types.SimpleNamespace(torch=types.SimpleNamespace(randn_like=torch.ones_like))
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", hijack)
    model, x = WebuiModel(LINEAR), torch.randn(2, 3, dtype=torch.float64)
    timesteps = torch.tensor([1, 200, 400])
    own = webui.ddim(model, x, timesteps, disable=True, eta=1.0)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    assert_same(own, peer_webui(model, x, timesteps, eta=1.0), 1e-10)


def test_webui_example():
    names = run_example(webui, model=WebuiModel(LINEAR.float()))
    assert names["image"].shape == (2, 4, 64, 64)
    assert names["image"].isfinite().all()
