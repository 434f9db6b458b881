"""The options of chunks of actions, put together from the groups of `fastddim.options`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from fastddim.options import Conditioning, SamplerOptions

Chunking: TypeAlias = Literal["freeze", "guide"]
Actions: TypeAlias = int | Sequence[int] | Tensor
"""A number of actions, or one for each environment: B integers, or int64 `[B]` on the CPU."""


@dataclass(kw_only=True, repr=False, eq=False)
class ActionOptions(SamplerOptions):
    """The arguments of `fastddim.ActionSampler`."""

    seed: int = 0
    warm_start: int | None = None
    chunking: Chunking | None = None
    max_guidance_weight: float = 5.0


@dataclass(kw_only=True, repr=False, eq=False)
class TickOptions(Conditioning):
    """The arguments of a call of a `fastddim.ActionSampler`."""

    executed: Actions = 0
    frozen: Actions = 0
    out: Tensor | None = None
