"""Small models and diffusions of lucidrains', and the comparison with ours."""

from __future__ import annotations

import copy
import types

import torch
from torch import nn

from .peers import assert_same, lucidrains, lucidrains_module, same_draws

SHAPE = (3, 2, 6, 10)


class Model(nn.Module):
    """The part of a Unet that the peer needs."""

    channels = out_dim = 2
    random_or_learned_sinusoidal_cond = False

    def __init__(self, self_condition=False):
        super().__init__()
        self.self_condition = self_condition
        self.given = []

    def forward(self, x, time, x_self_cond=None):
        self.given.append((time, x_self_cond))
        mixed = x if x_self_cond is None else x + 0.5 * x_self_cond
        return torch.tanh(mixed * 1.3) * (0.4 + time.to(x.dtype).reshape(-1, 1, 1, 1) / 100)


def make(dtype, **kwargs):
    peer, _ = lucidrains()
    model = Model(kwargs.pop("self_condition", False))
    kwargs = {"image_size": SHAPE[2:], "timesteps": 60, "sampling_timesteps": 13, **kwargs}
    return peer.GaussianDiffusion(model, **kwargs).to(dtype)


def compare(diffusion, method, *arguments, tolerance, **kwargs):
    own = copy.copy(diffusion)
    own.ddim_sample = types.MethodType(method, own)
    result, expected = same_draws(
        lambda: own.ddim_sample(*arguments, **kwargs),
        lambda: diffusion.ddim_sample(*arguments, **kwargs),
    )
    assert_same(result, expected, tolerance)
    return result


class GuidedModel(Model):
    """A model with the guidance of the peer's own Unet."""

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


class SequenceModel(Model):
    """A model of `[B, C, N]`, or `[B, N, C]`, with arguments of the user's."""

    def forward(self, x, time, x_self_cond=None, shift=0.0):
        self.given.append((time, x_self_cond))
        mixed = x if x_self_cond is None else x + 0.5 * x_self_cond
        return torch.tanh(mixed * 1.3 + shift) * (0.4 + time.to(x.dtype).reshape(-1, 1, 1) / 100)


def make_1d(dtype, self_condition=False, **kwargs):
    peer = lucidrains_module("denoising_diffusion_pytorch_1d")
    kwargs = {"seq_length": 10, "timesteps": 60, "sampling_timesteps": 13, **kwargs}
    return peer.GaussianDiffusion1D(SequenceModel(self_condition), **kwargs).to(dtype)


def make_other(module, dtype, model=None, **kwargs):
    peer = lucidrains_module(module)
    kwargs = {"image_size": 6, "timesteps": 60, "sampling_timesteps": 13, **kwargs}
    return peer.GaussianDiffusion(model or Model(), **kwargs).to(dtype)
