"""Tables of drop-ins, found again by what they were made from."""

from __future__ import annotations

import gc
import pickle
import weakref

import torch

from fastddim.integrations._tables import CacheOf, version


class Owner:
    """An object of another library."""


def test_versions_count_changes_in_place() -> None:
    tensor = torch.zeros(3)
    before = version(tensor)
    tensor += 1
    assert version(tensor) != before
    with torch.inference_mode():
        assert version(torch.zeros(3)) == version(torch.ones(2)) == -1


def test_sources_live_as_long_as_their_value() -> None:
    """Sources live as long as their value, so the `id` in a key cannot become that of another
    object.
    """
    cache, source = CacheOf(1)[owner := Owner()], Owner()
    alive = weakref.ref(source)
    cache.put(id(source), "value", (source,))
    key = id(source)
    del source
    gc.collect()
    assert alive() is not None
    assert cache.get(key) == "value"
    cache.put("another", "value")
    assert alive() is None
    del owner


def test_caches_live_as_long_as_their_object() -> None:
    caches, owner, other = CacheOf(2), Owner(), Owner()
    caches[owner].put("key", 1)
    assert caches[owner].get("key") == 1
    assert caches[other].get("key") is None
    assert owner in caches
    assert not vars(pickle.loads(pickle.dumps(owner)))
    del owner
    gc.collect()
    assert len(caches) == 1
