"""Overrides of a method that a peer's code calls on its own objects, in all possible ways."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

WAYS = ("subclass", "subclass of the same name", "mixin", "wrapped", "object", "used object")


def overriding(
    owner: Any, way: str, name: str, change: Callable[[Any], Any], use: Callable[[Any], Any]
) -> Any:
    """A copy of an object, with a method whose results are changed.

    Args:
        way: one of `WAYS`.
        change: gives the new result from that of the method it overrides.
        use: calls what may remember the method, before an object that is used gets another.
    """
    cls, own = type(owner), copy.copy(owner)
    original = getattr(cls, name)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(original(self, *args, **kwargs))

    if way == "wrapped":
        changed = functools.wraps(original)(changed)
    if way == "mixin":
        mixin = type("Mixin", (), {name: changed})
        own.__class__ = type("Own", (mixin, cls), {})
    elif "object" in way:
        if way == "used object":
            use(own)
        setattr(own, name, types.MethodType(changed, own))
    else:
        called = cls.__name__ if "same name" in way else "Own"
        own.__class__ = type(called, (cls,), {name: changed})
    return own
