"""A cache of bounded size, which keeps the values used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")

_NO_ENTRY: tuple[Hashable, None] = (object(), None)


class Cache(Generic[Value]):
    """The values put in or used last, by key; a value is never None.

    Threads may share a cache. Two that miss the same key at the same time both make its value.
    """

    __slots__ = ("_entries", "_lock", "_newest", "_size")

    def __init__(self, size: int) -> None:
        """
        Args:
            size: the number of values that are kept.
        """
        self._size = size
        self._entries: OrderedDict[Hashable, tuple[Value, tuple[object, ...]]] = OrderedDict()
        # Most lookups repeat the one before, and a comparison costs less than hashing twice.
        self._newest: tuple[Hashable, Value | None] = _NO_ENTRY
        # Reentrant: the end of a value that is dropped may run code that uses the cache.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        """Return the value of a key, which is then the newest, or None."""
        newest_key, newest = self._newest
        if newest_key == key:
            return newest
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            self._newest = key, entry[0]
            return entry[0]

    def put(self, key: Hashable, value: Value, sources: tuple[object, ...] = ()) -> None:
        """Keep a value, and drop the one that was not used for longest if there are too many.

        Args:
            sources: objects that the key names by their `id`. They live as long as the value is
                kept: no later object can then have the `id` of one.
        """
        with self._lock:
            self._entries[key] = value, sources
            self._entries.move_to_end(key)
            self._newest = key, value
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def pop(self, key: Hashable) -> Value | None:
        """Remove a key and return its value, or None."""
        with self._lock:
            self._newest = _NO_ENTRY
            value, _ = self._entries.pop(key, (None, ()))
        return value

    def values(self) -> list[Value]:
        """Return all values, the one that was not used for longest first."""
        with self._lock:
            return [value for value, _ in self._entries.values()]

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._newest = _NO_ENTRY
            self._entries.clear()
