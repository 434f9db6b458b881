"""Chunks of actions for robots, each planned from the last one at a tick of a control loop."""

from fastddim.actions.log import ActionLog, LoggedTick
from fastddim.actions.phases import ActionStream, ChunkTicket
from fastddim.actions.replaying import Replayed, replay
from fastddim.actions.sampler import ActionSampler

__all__ = [
    "ActionLog",
    "ActionSampler",
    "ActionStream",
    "ChunkTicket",
    "LoggedTick",
    "Replayed",
    "replay",
]
