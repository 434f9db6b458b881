"""The value by which a callback ends a run."""

from __future__ import annotations

import enum


class Stop(enum.Enum):
    """What a callback returns to end the run after the step that it is called for."""

    STOP = "stop"

    def __repr__(self) -> str:
        return "fastddim.STOP"

    __str__ = __repr__


STOP = Stop.STOP
"""See `Stop`."""
