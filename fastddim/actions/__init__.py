"""Chunks of actions for robots: each planned from the last one, at every tick of a control loop."""

from fastddim.actions.sampler import ActionSampler

__all__ = ["ActionSampler"]
