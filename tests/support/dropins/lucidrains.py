"""A small model and diffusion of lucidrains', and the comparison with ours."""

from __future__ import annotations

import copy
import types

import torch
from torch import nn

from .peers import assert_same, lucidrains, same_draws

SHAPE = (3, 2, 6, 10)


class Model(nn.Module):
    """What the peer asks of a Unet."""

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
