"""`tune`, which chooses timesteps and weights for one model."""

from __future__ import annotations

from fastddim.tuning.api import tune

__all__ = ["tune"]
