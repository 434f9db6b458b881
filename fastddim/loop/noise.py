"""The noise that the caller gives: tensors, or generators of torch to draw it from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim import transfer
from fastddim.options import NoiseSource
from fastddim.validation import check_device, check_state


def draw(
    generators: torch.Generator | Sequence[torch.Generator],
    like: Tensor,
) -> Tensor:
    """Standard normals shaped like `like` from torch's generators, each on its own device.

    The same numbers as `torch.randn` of the whole batch, or of one sample per generator.
    """
    if isinstance(generators, torch.Generator):
        return _randn(like.shape, generators, like)
    return torch.cat([_randn((1, *like.shape[1:]), g, like) for g in generators])


def _randn(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    if generator.device.type == "cpu" and transfer.captured(like.device):
        raise ValueError(
            f"noise: expected generators on {like.device} while a CUDA graph is being captured, "
            "which cannot draw on the host, got one on cpu"
        )
    drawn = torch.randn(
        tuple(shape), generator=generator, dtype=like.dtype, device=generator.device
    )
    return transfer.upload(drawn, like.device)


def listed(
    generators: torch.Generator | Sequence[torch.Generator] | None,
) -> tuple[torch.Generator, ...]:
    if generators is None:
        return ()
    return (generators,) if isinstance(generators, torch.Generator) else tuple(generators)


def noise_at(noise: NoiseSource, s: int, like: Tensor) -> Tensor | None:
    """The noise of step `s`; from generators, it is drawn in the shape and dtype of `like`."""
    if noise is None:
        return None
    return noise[s] if isinstance(noise, Tensor) else draw(noise, like)


def check_noise_source(noise: NoiseSource, steps: int, state: Tensor) -> None:
    """Refuse noise that does not fit the state and the number of steps."""
    if noise is None or isinstance(noise, torch.Generator):
        return
    if not isinstance(noise, Tensor):
        check_generators("noise", noise, state.shape[0])
        return
    check_state("noise", noise)
    expected = (steps, *state.shape)
    if tuple(noise.shape) != expected:
        raise ValueError(
            f"noise: expected shape [S, B, ...] = {expected}, got {tuple(noise.shape)}"
        )
    check_device("noise", noise, "the state", state.device)


def check_generators(name: str, value: Any, batch: int) -> None:
    if not isinstance(value, Sequence) or not all(isinstance(g, torch.Generator) for g in value):
        raise TypeError(
            f"{name}: expected a tensor, a torch.Generator or a list of them, "
            f"got {type(value).__name__}"
        )
    if len(value) != batch:
        raise ValueError(f"{name}: expected one generator per sample, {batch}, got {len(value)}")
