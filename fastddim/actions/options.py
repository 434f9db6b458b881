"""The options of chunks of actions, put together from the groups of `fastddim.options`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from fastddim.adapter import Model
from fastddim.options import (
    Autoguidance,
    Batch,
    Conditioning,
    Hook,
    Placement,
    Solver,
    Steps,
    Update,
    Visited,
)
from fastddim.tuned import TunedSteps

Chunking: TypeAlias = Literal["freeze", "guide"]
"""The ways in which a chunk agrees with the last one; see `fastddim.ActionSampler`."""
CHUNKINGS = (None, "freeze", "guide")
Actions: TypeAlias = int | Sequence[int] | Tensor
"""A number of actions for all robots, or one for each."""
"""A number of actions, or one for each environment: B integers, or int64 `[B]` on the CPU."""


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Planning:
    """The noise of chunks, and the part of the last chunk that the next one takes over."""

    seed: int = 0
    warm_start: int | None = None
    chunking: Chunking | None = None
    max_guidance_weight: float = 5.0


@dataclass(kw_only=True, repr=False, eq=False)
class ActionOptions(
    Planning, Autoguidance, Conditioning, Placement, Batch, Hook, Update, Visited, Solver
):
    """The arguments of `fastddim.ActionSampler`."""

    model: Model = field(kw_only=False)
    steps: Steps | Sequence[int | TunedSteps] = field(kw_only=False)
    budget_ms: float | None = None
    log: str | os.PathLike[str] | None = None


@dataclass(kw_only=True, repr=False, eq=False)
class ActionStreamOptions(Planning, Autoguidance, Placement, Batch, Hook, Update, Visited, Solver):
    """The arguments of `fastddim.ActionStream`."""

    model: Model = field(kw_only=False)
    steps: Steps = field(kw_only=False)
    environments: int | None = None
    max_pending: int | None = None


@dataclass(kw_only=True, repr=False, eq=False)
class TickOptions(Conditioning):
    """The arguments of a call of a `fastddim.ActionSampler`."""

    executed: Actions = 0
    frozen: Actions = 0
    out: Tensor | None = None
