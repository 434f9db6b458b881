"""Loops kept between calls, with their graphs."""

from __future__ import annotations

import atexit
import threading
import types
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastddim.adapter import Model
from fastddim.cache import Cache
from fastddim.loop.loop import Loop
from fastddim.loop.programs import KEPT
from fastddim.loop.setup import Setup


class LoopPool:
    """Loops between calls, each for one caller at a time, and kept as long as its model lives."""

    def __init__(self) -> None:
        self._entries: Cache[tuple[list[weakref.ref[Any]], Loop]] = Cache(KEPT)
        # Reentrant: freeing an entry may run code that comes back here.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def borrow(self, setup: Setup) -> Iterator[Loop]:
        """A loop for one call: one that an earlier call left with its graphs, or a new one.

        The loop is not kept after an error, nor where it holds one of the caller's functions
        besides the model.
        """
        if not setup.captures or setup.denoised_fn is not None:
            yield Loop(setup)
            return
        loop = self.acquire(setup)
        yield loop
        self.release(setup, loop)

    def acquire(self, setup: Setup) -> Loop:
        """The loop that was released last for such a setup, or a new one, for this caller alone."""
        with self._lock:
            entry = self._entries.pop(_key(setup))
        if entry is None:
            return Loop(setup)
        _, loop = entry
        loop.load(setup)
        return loop

    def release(self, setup: Setup, loop: Loop) -> None:
        """Keep the loop for a later call, or drop it where a model cannot be watched.

        The model of a bound method is the object that it is bound to.
        """
        loop.unload()
        key, entries = _key(setup), self._entries
        with self._lock, suppress(TypeError):
            watched = [
                weakref.ref(_owner(model), lambda _: entries.pop(key))
                for model in (setup.model, setup.uncond_model)
                if model is not None
            ]
            entries.put(key, (watched, loop))

    def clear(self) -> None:
        """Let go of all loops, of their graphs and of their memory."""
        with self._lock:
            self._entries.clear()


def _key(setup: Setup) -> Hashable:
    return _identity(setup.model), _identity(setup.uncond_model), setup.key


def _owner(model: Model) -> Any:
    return model.__self__ if isinstance(model, types.MethodType) else model


def _identity(model: Model | None) -> Hashable:
    if isinstance(model, types.MethodType):
        return id(model.__self__), model.__func__
    return id(model)


POOL = LoopPool()

# While CUDA is still there.
atexit.register(POOL.clear)
