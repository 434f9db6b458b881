"""Networks of diffusion policies, from free to heavy, in plain PyTorch.

Each predicts ε for a chunk of actions `[B, horizon, action_dim]` at timesteps `[B]`, given features
of the last observations `[B, features]`. Weights are random, since only the time matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HORIZON, ACTION_DIM = 16, 2
OBSERVATIONS, OBSERVATION_DIM = 2, 18
"""The number of observations for a chunk, and the features of each: push-T's nine keypoints."""

CONDITION = OBSERVATIONS * OBSERVATION_DIM


class StepEmbedding(nn.Sequential):
    """Timesteps `[B]` as vectors `[B, width]`: waves of geometric wavelengths, and two layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            Waves(width), nn.Linear(width, hidden), nn.Mish(), nn.Linear(hidden, width)
        )


class Waves(nn.Module):
    """Sines and cosines of timesteps (arXiv 1706.03762, section 3.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(width // 2) * (-math.log(10000) / (width // 2 - 1))
        self.frequencies: Tensor
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Convolution(nn.Module):
    """Convolution along time, group norm, Mish."""

    def __init__(self, channels_in: int, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(channels_in, channels, kernel, padding=kernel // 2),
            nn.GroupNorm(groups, channels),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.block(x)
        return output


class FilmBlock(nn.Module):
    """Two convolutions around a scale and a shift by the condition (arXiv 1709.07871), and a
    residual path.
    """

    def __init__(
        self, channels_in: int, channels: int, condition: int, kernel: int, groups: int
    ) -> None:
        super().__init__()
        self.conv1 = Convolution(channels_in, channels, kernel, groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * channels))
        self.conv2 = Convolution(channels, channels, kernel, groups)
        self.residual_conv = (
            nn.Identity() if channels_in == channels else nn.Conv1d(channels_in, channels, 1)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.cond_encoder(condition)[:, :, None].chunk(2, dim=1)
        changed = self.conv2(scale * self.conv1(x) + shift)
        output: Tensor = changed + self.residual_conv(x)
        return output


def levels_of(modules: nn.ModuleList) -> Any:
    """Two blocks and a change of resolution, for each level."""
    return modules


class ConditionalUnet(nn.Module):
    """The 1-D U-Net of Diffusion Policy (arXiv 2303.04137, section 3), as LeRobot configures it.

    Parameters have the names and shapes of LeRobot's `DiffusionConditionalUnet1d`, with the same
    defaults.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (512, 1024, 2048),
        *,
        action_dim: int = ACTION_DIM,
        condition: int = CONDITION,
        kernel: int = 5,
        groups: int = 8,
        step_width: int = 128,
    ) -> None:
        super().__init__()

        def block(channels_in: int, channels: int) -> FilmBlock:
            return FilmBlock(channels_in, channels, step_width + condition, kernel, groups)

        def level(channels_in: int, channels: int, resample: nn.Module) -> nn.ModuleList:
            blocks = block(channels_in, channels), block(channels, channels)
            return nn.ModuleList([*blocks, resample])

        first, last = widths[0], widths[-1]
        self.diffusion_step_encoder = StepEmbedding(step_width, 4 * step_width)
        self.down_modules = nn.ModuleList(
            level(before, width, nn.Conv1d(width, width, 3, stride=2, padding=1))
            for before, width in zip((action_dim, *widths[:-2]), widths[:-1], strict=True)
        )
        self.down_modules.append(level((action_dim, *widths)[-2], last, nn.Identity()))
        self.mid_modules = nn.ModuleList([block(last, last), block(last, last)])
        self.up_modules = nn.ModuleList(
            level(2 * width, before, nn.ConvTranspose1d(before, before, 4, stride=2, padding=1))
            for before, width in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.final_conv = nn.Sequential(
            Convolution(first, first, kernel, groups), nn.Conv1d(first, action_dim, 1)
        )

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor) -> Tensor:
        condition = torch.cat([self.diffusion_step_encoder(t), global_cond], dim=1)
        x = x.transpose(1, 2)
        skipped = []
        for first, second, resample in levels_of(self.down_modules):
            x = second(first(x, condition), condition)
            skipped.append(x)
            x = resample(x)
        for block in self.mid_modules:
            x = block(x, condition)
        for first, second, resample in levels_of(self.up_modules):
            x = torch.cat([x, skipped.pop()], dim=1)
            x = resample(second(first(x, condition), condition))
        output: Tensor = self.final_conv(x)
        return output.transpose(1, 2)


class TransformerPolicy(nn.Module):
    """The transformer of Diffusion Policy for low-dimensional observations (arXiv 2303.04137,
    section 3): actions attend to earlier actions, to the timestep and to the observations.
    """

    def __init__(self, *, width: int = 256, layers: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.actions = nn.Linear(ACTION_DIM, width)
        self.places = nn.Parameter(torch.zeros(1, HORIZON, width))
        self.observations = nn.Linear(OBSERVATION_DIM, width)
        self.condition_places = nn.Parameter(torch.zeros(1, 1 + OBSERVATIONS, width))
        self.step = Waves(width)
        self.encoder = nn.Sequential(
            nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        layer = nn.TransformerDecoderLayer(
            width,
            heads,
            4 * width,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.output = nn.Linear(width, ACTION_DIM)
        self.later: Tensor
        mask = nn.Transformer.generate_square_subsequent_mask(HORIZON)
        self.register_buffer("later", mask, persistent=False)

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor) -> Tensor:
        seen = self.observations(global_cond.unflatten(1, (OBSERVATIONS, OBSERVATION_DIM)))
        tokens = torch.cat([self.step(t)[:, None], seen], dim=1) + self.condition_places
        actions = self.actions(x) + self.places
        output: Tensor = self.output(
            self.decoder(actions, self.encoder(tokens), tgt_mask=self.later, tgt_is_causal=True)
        )
        return output


class MlpPolicy(nn.Module):
    """Three layers on actions, timestep and observation, as in diffusion Q-learning (arXiv
    2208.06193, appendix).
    """

    def __init__(self, *, width: int = 256, step_width: int = 16) -> None:
        super().__init__()
        numbers = HORIZON * ACTION_DIM
        self.step = StepEmbedding(step_width, 2 * step_width)
        self.layers = nn.Sequential(
            nn.Linear(numbers + step_width + CONDITION, width),
            nn.Mish(),
            nn.Linear(width, width),
            nn.Mish(),
            nn.Linear(width, width),
            nn.Mish(),
            nn.Linear(width, numbers),
        )

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor) -> Tensor:
        inputs = torch.cat([x.flatten(1), self.step(t), global_cond], dim=1)
        output: Tensor = self.layers(inputs)
        return output.view_as(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": MlpPolicy,
    "small U-Net": lambda: ConditionalUnet((64, 128, 256)),
    "transformer": TransformerPolicy,
    "default U-Net": ConditionalUnet,
}
"""The networks by name, the cheapest first."""


def make_policy(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of a policy, with the same random weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        network = NETWORKS[name]()
    return network.eval().requires_grad_(False)


def parameters_of(network: nn.Module) -> int:
    """The number of learnt parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def bytes_of(network: nn.Module) -> int:
    """The bytes that an evaluation has to read: the memory of the network's parameters."""
    return sum(parameter.nbytes for parameter in network.parameters())
