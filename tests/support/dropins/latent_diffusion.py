"""A small LatentDiffusion, the peer's sampler of it, and the comparison with ours."""

from __future__ import annotations

import copy

import torch

from fastddim.integrations import latent_diffusion as fast

from .peers import assert_same, ldm_ddim, same_draws

T = 40


class DDPM:
    """The methods that LatentDiffusion has from its base, which the peer names so too."""

    def at(self, name, t):
        return getattr(self, name)[t].reshape(-1, 1, 1, 1)

    def predict_start_from_z_and_v(self, x, t, v):
        a, s = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return a * x - s * v

    def predict_eps_from_z_and_v(self, x, t, v):
        a, s = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return a * v + s * x


class Latent(DDPM):
    """The part of a LatentDiffusion that the sampler needs; buffers are rounded from
    float64 ones.
    """

    num_timesteps = T
    device = torch.device("cpu")

    def __init__(self, parameterization="eps", dtype=torch.float32):
        betas = torch.linspace(0.01**0.5, 0.3**0.5, T, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.parameterization = parameterization
        self.betas, self.alphas_cumprod = betas.to(dtype), alphas.to(dtype)
        self.alphas_cumprod_prev = torch.cat([alphas.new_ones(1), alphas[:-1]]).to(dtype)
        self.sqrt_alphas_cumprod = alphas.sqrt().to(dtype)
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas).sqrt().to(dtype)
        self.first_stage_model = self
        self.asked = []

    def apply_model(self, x, t, c):
        self.asked.append((x, t, c))
        time = t.to(x.dtype).reshape(-1, 1, 1, 1) / T
        return torch.tanh(x * (0.6 + 0.3 * time) + total(c).to(x.dtype)[:, None, None, None])

    def quantize(self, x_0):
        return (x_0 * 4).round() / 4, "loss", "indices"

    def q_sample(self, x_0, t):
        signal, noise = self.at("sqrt_alphas_cumprod", t), torch.randn_like(x_0)
        return signal * x_0 + self.at("sqrt_one_minus_alphas_cumprod", t) * noise


def total(c):
    """The sum of every tensor in a condition."""
    if isinstance(c, dict | list):
        return sum(total(v) for v in (c.values() if isinstance(c, dict) else c))
    return c


def make(parameterization="eps", *, steps=10, eta=0.5, discretize="uniform"):
    """The peer's sampler, with a model in torch's default dtype."""
    model = Latent(parameterization, torch.get_default_dtype())
    sampler = ldm_ddim().DDIMSampler(model)
    sampler.make_schedule(steps, ddim_discretize=discretize, ddim_eta=eta, verbose=False)
    # The peer looks for it in the model, where nothing puts it.
    model.ddim_sigmas_for_original_num_steps = sampler.ddim_sigmas_for_original_num_steps
    return sampler


def fast_of(sampler):
    own = copy.copy(sampler)
    fast.install(own)
    return own


def compare(sampler, run, tolerance):
    """Asserts the same results, from the same calls of the model."""
    asked = sampler.model.asked
    asked.clear()
    own, expected = same_draws(lambda: run(fast_of(sampler)), lambda: run(sampler))
    assert_same(own, expected, tolerance)
    half = len(asked) // 2
    assert_same(asked[:half], asked[half:], 10 * tolerance)
    return own


def scaled(sampler, out, index, original):
    """x_0 times √ᾱ, as it is in the state: x_0 itself has the state's rounding over √ᾱ."""
    a = (sampler.model.alphas_cumprod if original else sampler.ddim_alphas)[index]
    return out[0], out[1] * a**0.5
