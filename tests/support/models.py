"""Models whose output is known."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def elementwise_model(x: Tensor, t: Tensor) -> Tensor:
    """A model of correctly rounded operations, so that its bits do not depend on an element's
    place.

    (A vectorised tanh or exp may differ in the last bit from the one that handles the remainder.)
    """
    time = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * (1 / 1024)
    return x * 0.75 / (1 + x * x) + (time - 0.5) * 0.25


def elementwise_numpy(x: np.ndarray, t: int) -> np.ndarray:
    return x * 0.75 / (1 + x * x) + (t / 1024 - 0.5) * 0.25


class SmallNet(nn.Module):
    """A smooth network with fixed weights, [B, C, H, W] → [B, outputs, H, W], that uses t."""

    def __init__(self, channels: int = 3, outputs: int | None = None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        outputs = channels if outputs is None else outputs
        weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator))
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = torch.sin(t.to(x.dtype) / 100)[:, None, None, None] * self.bias[:, None, None]
        return torch.tanh(nn.functional.conv2d(x, self.weight, padding=1) + time)


class GaussianModel:
    """A model with the exact ε for data N(mean, scale²·I): E[ε | x_t] under the schedule."""

    def __init__(self, alphas_cumprod: Tensor, mean: float = 0.5, scale: float = 0.3) -> None:
        self.alphas_cumprod, self.mean, self.scale = alphas_cumprod, mean, scale

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.scale**2 + 1 - a)


def shown(value: Any) -> str:
    """The value in the name of a test, with functions shown without addresses: workers
    must agree.
    """
    return re.sub(r" at 0x\w+", "", str(value))
