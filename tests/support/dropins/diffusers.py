"""Pairs of schedulers, diffusers' and ours, and the comparison of their steps."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
ours = importlib.import_module("fastddim.integrations.diffusers")

CLASSES = ("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler", "DDPMScheduler")
DDIM = CLASSES[:2]


def pair(name: str, steps: int | None = 50, **config: Any) -> tuple[Any, Any]:
    """(diffusers' scheduler, ours from its config)."""
    theirs = getattr(diffusers, name)(**config)
    own = getattr(ours, name).from_config(theirs.config)
    assert isinstance(own, getattr(diffusers, name))
    if steps is not None:
        for scheduler in (theirs, own):
            scheduler.set_timesteps(steps)
    return theirs, own


def assert_alike(theirs: Any, own: Any, tolerance: float = 1e-10) -> None:
    assert type(own) is type(theirs)
    pairs = (
        list(zip(theirs, own, strict=True))
        if isinstance(theirs, tuple)
        else [(theirs[name], own[name]) for name in ("prev_sample", "pred_original_sample")]
    )
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        error, scale = (a - b).nan_to_num().abs(), 1 + a.nan_to_num().abs()
        assert (error <= tolerance * scale).all(), error.max()
