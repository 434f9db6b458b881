"""Settings that every stage is given."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# The check itself starts before the package under test is installed.
if TYPE_CHECKING:
    from fastddim.choices import Graph


@dataclass(frozen=True)
class Settings:
    """The place of a stage, and the means that it may use.

    Attributes:
        out: folder of the results.
        root: the checkout, for its tests and sources.
        work: folder for scratch files.
        dry: whether to rehearse on the CPU in tiny sizes.
        began: Unix time at which the check began.
        seconds: limit of the stage.
    """

    out: Path
    root: Path
    work: Path
    dry: bool
    began: float
    seconds: float = 0.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def implementations(self) -> tuple[str, ...]:
        if self.dry:
            return ("cpu",)
        return ("cuda", "triton") if torch.version.hip is None else ("triton",)

    @property
    def modes(self) -> tuple[Graph, ...]:
        """Values of `graph=`."""
        return (False,) if self.dry else (False, True, "loop")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, **{k: Path(values[k]) for k in ("out", "root", "work")}})
