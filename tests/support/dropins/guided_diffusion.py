"""A small model and the objects of guided-diffusion."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastddim.integrations import guided_diffusion

from .peers import guided_diffusion as load_peer


def make(kind="EPSILON", variance="FIXED_SMALL", *, spaced="ddim20", rescale=False, T=100):
    """The peer's object."""
    peer = load_peer()
    arguments = {
        "betas": peer.get_named_beta_schedule("linear", T),
        "model_mean_type": peer.ModelMeanType[kind],
        "model_var_type": peer.ModelVarType[variance],
        "loss_type": peer.LossType.MSE,
        "rescale_timesteps": rescale,
    }
    if spaced is None:
        return peer.GaussianDiffusion(**arguments)
    return peer.SpacedDiffusion(peer.space_timesteps(T, spaced), **arguments)


def fast(diffusion):
    own = copy.copy(diffusion)
    guided_diffusion.install(own)
    return own


class Model(nn.Module):
    """A model of C or, with a learned variance, 2C channels."""

    def __init__(self, learned=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.learned = learned

    def forward(self, x, t, shift=0.0):
        t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000
        output = torch.tanh(x * self.scale.to(x.dtype)) * (0.5 + t) + shift
        return torch.cat([output, 0.1 * output], dim=1) if self.learned else output
