"""A small U-Net that predicts the noise in an image: the architecture of the bundled models.

This is DDPM's network (arXiv 2006.11239, appendix B) in miniature: residual blocks that get the
timestep, self-attention at the lowest resolution, and skip connections from the way down to the way
up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastddim.choices import Prediction
from fastddim.elementary import sqrt
from fastddim.schedule import Schedule
from fastddim.tuned import TunedSteps


@dataclass(frozen=True)
class UNetConfig:
    """The sizes that determine the network's parameters.

    Attributes:
        sample_shape: (C, H, W) of one image.
        channels: feature channels of each level, from the highest resolution to the lowest; height
            and width are halved after every level except the last.
        blocks: residual blocks per level on the way down, and as many on the way up.
        patch: side of the squares of pixels that are first folded into channels (pixel unshuffle);
            1 folds nothing.
        groups: groups of each group norm.
        heads: heads of each attention.
    """

    sample_shape: tuple[int, int, int]
    channels: tuple[int, ...]
    blocks: int = 1
    patch: int = 1
    groups: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("sample_shape", "channels"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or not all(map(_is_positive, values)):
                raise ValueError(f"{name}: expected a tuple of positive integers, got {values!r}")
        for name in ("blocks", "patch", "groups", "heads"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(
                    f"{name}: expected a positive integer, got {getattr(self, name)!r}"
                )
        if len(self.sample_shape) != 3:
            raise ValueError(f"sample_shape: expected (C, H, W), got {self.sample_shape}")
        factor = self.patch * 2 ** (len(self.channels) - 1)
        if any(size % factor for size in self.sample_shape[1:]):
            raise ValueError(
                f"sample_shape: expected height and width divisible by {factor} "
                f"(patch and {len(self.channels)} levels), got {self.sample_shape}"
            )
        if any(width % self.groups for width in self.channels):
            raise ValueError(
                f"channels: expected multiples of groups = {self.groups}, got {self.channels}"
            )
        if self.channels[-1] % self.heads:
            raise ValueError(
                f"heads: expected a divisor of {self.channels[-1]} channels, got {self.heads}"
            )


class UNet(nn.Module):
    """Predicts the noise ε in x_t.

    The layers predict the velocity v = √ᾱ·ε − √(1−ᾱ)·x_0 (arXiv 2202.00512, appendix D), and the
    noise follows as ε = √(1−ᾱ)·x_t + √ᾱ·v. At high noise ε is nearly x_t, so layers that had to
    reproduce x_t would leave errors that x_0 = (x_t − √(1−ᾱ)·ε)/√ᾱ magnifies, up to 157-fold in the
    linear schedule.

    Attributes:
        config: the architecture.
        schedule: the noise schedule that it is trained with.
        prediction: `"epsilon"`, the quantity that `forward` returns.
        sample_shape: (C, H, W) of one image.
        tuned: the tuned steps from its file, by number of steps.
    """

    prediction: Prediction = "epsilon"
    tuned: Mapping[int, TunedSteps] = MappingProxyType({})
    coefficient_bits: Tensor

    def __init__(self, config: UNetConfig, schedule: Schedule) -> None:
        super().__init__()
        self.config = config
        self.schedule = schedule
        self.sample_shape = config.sample_shape

        a = schedule.alphas_cumprod
        coefficients = torch.stack([sqrt(1 - a), sqrt(a)]).float()
        # Stored as integers, since `.to(dtype)` would narrow a floating-point buffer.
        bits = coefficients.view(torch.int32)
        self.register_buffer("coefficient_bits", bits, persistent=False)

        channels, emb = config.channels, 4 * config.channels[0]
        pixels = config.sample_shape[0] * config.patch**2

        def block(c_in: int, c_out: int) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, emb, config.groups)

        self.embed_time = nn.Sequential(
            nn.Linear(channels[0], emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(pixels, channels[0], 3, padding=1)

        c = channels[0]
        skips = []
        self.down = nn.ModuleList()
        for width in channels:
            level = nn.ModuleList()
            for _ in range(config.blocks):
                level.append(block(c, width))
                c = width
                skips.append(c)
            self.down.append(level)
        self.shrink = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for width in channels[:-1]
        )

        self.middle_in = block(c, c)
        self.attention = SelfAttention(c, config.groups, config.heads)
        self.middle_out = block(c, c)

        self.up = nn.ModuleList()
        for width in reversed(channels):
            level = nn.ModuleList()
            for _ in range(config.blocks):
                level.append(block(c + skips.pop(), width))
                c = width
            self.up.append(level)
        self.grow = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for width in reversed(channels[1:])
        )

        self.norm_out = nn.GroupNorm(config.groups, c)
        self.conv_out = _zeroed(nn.Conv2d(c, pixels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict ε(x_t, t).

        Args:
            x: noisy images `[B, C, H, W]`, any floating-point dtype.
            t: timesteps `[B]`, int64, in [0, schedule.T).

        Returns:
            The predicted noise, with the shape and dtype of `x`.

        Raises:
            ValueError: a shape does not fit.
        """
        if tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"x: expected [B, {', '.join(map(str, self.sample_shape))}], got {list(x.shape)}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: expected [{x.shape[0]}], got {list(t.shape)}")
        velocity = self.predict_velocity(x.to(self.conv_in.weight.dtype), t)
        c_x, c_v = self.coefficient_bits[:, t].view(torch.float32).view(2, -1, 1, 1, 1)
        epsilon: Tensor = c_x * x + c_v * velocity
        return epsilon.to(x.dtype)

    def predict_velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict v(x_t, t), with shapes as in `forward` and `x` in the parameters' dtype."""
        emb = self.embed_time(timestep_embedding(t, self.config.channels[0]).to(x.dtype))
        h = self.conv_in(F.pixel_unshuffle(x, self.config.patch))

        skips = []
        for i, level in enumerate(self.down):
            for block in cast(nn.ModuleList, level):
                h = block(h, emb)
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)

        h = self.middle_out(self.attention(self.middle_in(h, emb)), emb)

        for i, level in enumerate(self.up):
            for block in cast(nn.ModuleList, level):
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
            if i < len(self.grow):
                h = self.grow[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))

        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.config.patch)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a skip; the timestep scales and shifts the features between."""

    def __init__(self, c_in: int, c_out: int, emb: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = _zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h)) + self.skip(x)
        return h


class SelfAttention(nn.Module):
    """Self-attention around a skip: every position attends to every other one."""

    def __init__(self, channels: int, groups: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        heads = self.qkv(tokens).view(b, -1, 3, self.heads, c // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        h: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
        h = x + self.out(h).transpose(1, 2).reshape(b, c, height, width)
        return h


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of `t` `[B]` at `dim`/2 frequencies from 1 to 1e-4: float32 `[B, dim]`."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """`layer` with zero weights, which makes a residual branch start at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
