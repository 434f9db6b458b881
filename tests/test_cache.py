"""The cache that keeps the values used last."""

from __future__ import annotations

import threading
import weakref

from fastddim.cache import Cache


class Value:
    """Something that can be watched."""


def test_what_was_used_last_is_kept() -> None:
    cache: Cache[int] = Cache(3)
    for key in (1, 2, 3):
        cache.put(key, 10 * key)
    assert cache.get(1) == 10
    cache.put(4, 40)
    assert [cache.get(key) for key in (1, 2, 3, 4)] == [10, None, 30, 40]
    assert len(cache) == 3


def test_the_newest_counts_as_used() -> None:
    """The newest value counts as used, although it is found without a look at the others."""
    cache: Cache[int] = Cache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert [cache.get("a"), cache.get("a"), cache.get("a")] == [1, 1, 1]
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b")) == (1, None)


def test_a_value_can_be_put_again() -> None:
    cache: Cache[int] = Cache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    cache.put("a", 3)
    assert cache.get("a") == 3
    cache.put("c", 4)
    assert (cache.get("a"), cache.get("b")) == (3, None)


def test_pop_and_clear() -> None:
    cache: Cache[int] = Cache(2)
    assert cache.get("a") is None
    assert cache.pop("a") is None
    cache.put("a", 1)
    assert cache.pop("a") == 1
    assert cache.get("a") is None
    cache.put("b", 2)
    cache.clear()
    assert cache.get("b") is None
    assert len(cache) == 0


def test_values_that_are_dropped_are_let_go() -> None:
    """Dropped values are released by eviction, `pop` and `clear`: also the newest, which is held a
    second time.
    """
    cache: Cache[Value] = Cache(1)
    for drop in (lambda: cache.put("b", Value()), lambda: cache.pop("a"), cache.clear):
        value = Value()
        alive = weakref.ref(value)
        cache.put("a", value)
        assert cache.get("a") is value
        del value
        drop()
        assert alive() is None


def test_the_end_of_a_value_may_use_the_cache() -> None:
    cache: Cache[Value] = Cache(1)
    value, seen = Value(), []
    weakref.finalize(value, lambda: seen.append((cache.get("b"), cache.put("c", Value()))))
    cache.put("a", value)
    del value
    cache.put("b", Value())
    assert len(seen) == 1
    assert len(cache) == 1


def test_threads() -> None:
    """A value is never that of another key, even if other threads drop values meanwhile."""
    cache: Cache[int] = Cache(5)
    wrong = []

    def work(start: int) -> None:
        for i in range(5000):
            key = (start + i) % 9
            found = cache.get(key)
            if found is None:
                cache.put(key, 10 * key)
            elif found != 10 * key:
                wrong.append(key)
            if i % 50 == 0:
                cache.pop(key)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 5
