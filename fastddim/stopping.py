"""The value with which a callback ends a run."""

from __future__ import annotations

import enum


class Stop(enum.Enum):
    """The value that ends a run after the step at which a `callback` returns it."""

    STOP = "stop"

    def __repr__(self) -> str:
        return "fastddim.STOP"

    __str__ = __repr__


STOP = Stop.STOP
"""The value that ends a run after the step at which a `callback` returns it."""
