"""The score networks in the wheel of galaxygrad 0.2.1, in PyTorch.

They are mixers (arXiv 2105.01601) of images of galaxies with one channel, trained on the
variance-preserving process ᾱ(t) = e^−t for t in [0, 10] (arXiv 2011.13456, eq. 11 with β = 1).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastddim.schedule import Schedule

LAST_TIME = 10.0
FIRST_TIME = 1e-4
"""The first time of the schedule: its noise, σ = 0.01, is invisible in data of unit size."""

NETWORKS = {
    "hsc-32": "eqx_hsc_ScoreNet32",
    "hsc-64": "eqx_hsc_ScoreNet64",
    "hsc-log-32": "eqx_hsc_LogNet32",
    "hsc-log-64": "eqx_hsc_LogNet64",
    "ztf-32": "eqx_ZTF_ScoreNet32",
    "ztf-64": "eqx_ZTF_ScoreNet64",
    "lsst-60": "eqx_lsst_ScoreNet60",
    "quasar-72": "eqx_quasar_lens72",
    "roman-120": "eqx_roman_Scorenet120",
}
"""The files of the wheel without their suffix, by survey and size of the images."""


def galaxy_schedule(T: int = 1000) -> Schedule:
    """ᾱ = e^−t at T times of EDM's grid (arXiv 2206.00364, eq. 5), where σ^(1/ρ) is uniform, ρ = 7.

    Uniform times in [0, 10] would leave few with noise as small as the details of an image.
    """
    rho = 7
    first, last = (np.sqrt(np.expm1(time)) for time in (FIRST_TIME, LAST_TIME))
    sigmas = np.linspace(first ** (1 / rho), last ** (1 / rho), T) ** rho
    return Schedule.from_alphas_cumprod(1 / (1 + sigmas**2))


class Mixer(nn.Module):
    """One block: an MLP over the patches of each channel, then one over the channels of each patch.

    Args:
        channels, patches: shape of the states `[B, channels, patches]`.
        widths: widths of the hidden layers of the two MLPs.
    """

    def __init__(self, channels: int, patches: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.across_patches = _mlp(patches, widths[0])
        self.across_channels = _mlp(channels, widths[1])
        self.norm_patches = nn.LayerNorm([channels, patches])
        self.norm_channels = nn.LayerNorm([patches, channels])

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.across_patches(self.norm_patches(h))
        h = h.mT
        return (h + self.across_channels(self.norm_channels(h))).mT


class ScoreNetwork(nn.Module):
    """The score ∇ log p_t(x) of images `[B, 1, H, W]`, by timestep or by time.

    Attributes:
        schedule: ᾱ of the timesteps that `forward` takes.
        sample_shape: (C, H, W).
        prediction: "score", which `forward` returns.
    """

    prediction = "score"
    times: Tensor

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        *,
        patch: int = 4,
        channels: int = 64,
        widths: tuple[int, int] = (512, 512),
        blocks: int = 4,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        colours, height, width = sample_shape
        patches = (height // patch) * (width // patch)
        # The order is that of the arrays in a file, from which `load` reads the parameters.
        self.split = nn.Conv2d(colours + 1, channels, patch, stride=patch)
        self.join = nn.ConvTranspose2d(channels, colours, patch, stride=patch)
        self.blocks = nn.Sequential(*(Mixer(channels, patches, widths) for _ in range(blocks)))
        self.norm = nn.LayerNorm([channels, patches])
        self.sample_shape = sample_shape
        self.schedule = schedule or galaxy_schedule()
        self.register_buffer("times", -self.schedule.alphas_cumprod.log(), persistent=False)

    def score(self, x: Tensor, time: float | Tensor) -> Tensor:
        """The score at a time in [0, 10], a number or a tensor `[B]`."""
        time = torch.as_tensor(time, device=x.device).to(x.dtype) / LAST_TIME
        plane = time.reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        h = self.split(torch.cat([x, plane], dim=1))
        mixed = self.norm(self.blocks(h.flatten(2)))
        joined: Tensor = self.join(mixed.reshape(h.shape))
        return joined

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at the timesteps t `[B]` of the schedule."""
        return self.score(x, self.times[t])


def load(path: str | os.PathLike[str], schedule: Schedule | None = None) -> ScoreNetwork:
    """The network in an `.eqx` file, in eval mode and without gradients."""
    arrays = read_arrays(path)
    # A file holds the weights of the patches in and out, then eight arrays of layers and four of
    # norms a block, then a norm and the last time.
    patch_in, patch_out, first = arrays[0], arrays[2], arrays[4]
    channels, patch = patch_in.shape[0], patch_in.shape[-1]
    widths = (first.shape[0], arrays[8].shape[0])
    side = patch * round(first.shape[1] ** 0.5)
    network = ScoreNetwork(
        (patch_out.shape[0], side, side),
        patch=patch,
        channels=channels,
        widths=widths,
        blocks=(len(arrays) - 7) // 12,
        schedule=schedule,
    )
    # A transposed convolution of JAX uses its kernel unchanged; PyTorch's is the adjoint of a
    # convolution, which flips the kernel and swaps its channels.
    arrays[2] = np.flip(patch_out, (2, 3)).swapaxes(0, 1)
    with torch.no_grad():
        for parameter, array in zip(network.parameters(), arrays[:-1], strict=True):
            parameter.copy_(torch.from_numpy(array.reshape(parameter.shape).copy()))
    return network.eval().requires_grad_(False)


def read_arrays(path: str | os.PathLike[str]) -> list[np.ndarray]:
    """The arrays of an `.eqx` file, which holds one record of `numpy.save` after another."""
    arrays = []
    with Path(path).open("rb") as file:
        while file.peek(1):
            arrays.append(np.load(file, allow_pickle=False))
    return arrays


def _mlp(size: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, size))
