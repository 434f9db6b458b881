"""The calls for a model's output and for noise, as the original makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def evaluate(model: Any, x: Tensor, c: Any, t: Tensor, unconditional: Any) -> Tensor:
    """The model's output; for two conditions, that of both, the unconditional one first."""
    if unconditional is None:
        output: Tensor = model.apply_model(x, t, c)
    else:
        both = _joined(unconditional, c)
        output = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both)
    return output


def _joined(unconditional: Any, c: Any) -> Any:
    if isinstance(c, dict):
        return {k: _joined(unconditional[k], v) for k, v in c.items()}
    if isinstance(c, list):
        return [_joined(unconditional[i], v) for i, v in enumerate(c)]
    return torch.cat([unconditional, c])


def noise_like(x: Tensor, repeat: bool) -> Tensor:
    """Noise in torch's default dtype, whatever the dtype of x."""
    if not repeat:
        return torch.randn(x.shape, device=x.device)
    noise = torch.randn((1, *x.shape[1:]), device=x.device)
    return noise.repeat(x.shape[0], *[1] * (x.ndim - 1))
