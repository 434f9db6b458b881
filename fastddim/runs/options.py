"""The options of `fastddim.generate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastddim.adapter import Model
from fastddim.choices import Format
from fastddim.options import (
    Autoguidance,
    Conditioning,
    Conditions,
    Hook,
    Placement,
    Progress,
    Solver,
    Steps,
    Update,
    Visited,
)


@dataclass(kw_only=True, repr=False, eq=False)
class GenerateOptions(
    Progress, Autoguidance, Conditioning, Placement, Hook, Update, Visited, Solver
):
    """The arguments of `fastddim.generate`."""

    model: Model = field(kw_only=False)
    steps: Steps = field(kw_only=False)
    out: str | os.PathLike[str] = field(kw_only=False)
    stop: int
    start: int = 0
    seed: int = 0
    batch_size: int | Literal["auto"] = "auto"
    memory: int | None = None
    format: Format = "npz"
    merged: str | os.PathLike[str] | None = None
    conditions: Conditions | None = None
    decode: Any = None
    shape: Sequence[int] | None = None
    model_id: str | None = None
