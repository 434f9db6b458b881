"""Methods that a peer's code calls on its own objects, and that a drop-in replaces by other code.

A class of the user, or an attribute of one object, may override such a method: a hook. A drop-in
checks for hooks. If there is one, it calls the object's methods, as the peer's code does.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

# The number of classes of one peer that are remembered; further ones are inspected again.
_CLASSES_KEPT = 64


class _Known(NamedTuple):
    """The result of inspecting a class."""

    get: Callable[[Any], Any]
    methods: Any
    """The methods that `get` gave. While they stay the same, the result is valid."""
    overridden: str | None


class Hooks:
    """The methods of a peer's classes that a drop-in does not call.

    Peers are recognised by names, so they need not be imported: the last class of that name among
    the bases is the peer's own.
    """

    def __init__(
        self, *methods: str, of: tuple[str, ...], attributes: tuple[str, ...] = ()
    ) -> None:
        """Describe the peer's classes.

        Args:
            methods: names of the methods; a peer need not have all of them.
            of: names of the classes that define them in the peer's code.
            attributes: names that the peer sets on its objects, and that a class may turn into
                properties.
        """
        self.methods = frozenset(methods)
        self._of = of
        self.attributes = attributes
        self._known: dict[type, _Known] = {}

    def overridden(self, owner: Any) -> str | None:
        """The name of a method or attribute that is not from the peer's code, or None.

        A method that was set on the peer's class counts too. In doubt, as for a method under a
        decorator, the result is its name.
        """
        cls = type(owner)
        own: set[str] = vars(owner).keys() & self.methods
        if own:
            return min(own)
        known = self._known.get(cls)
        if known is None or known.get(cls) != known.methods:
            known = self._look_at(cls)
        return known.overridden

    def _look_at(self, cls: type) -> _Known:
        last = {base.__name__: base for base in cls.__mro__}
        peers = [last[name] for name in self._of if name in last]
        there = sorted(name for name in self.methods if hasattr(cls, name))
        changed = [name for name in there if not _is_of(getattr(cls, name), name, peers)]
        changed += [name for name in self.attributes if hasattr(cls, name)]
        get = attrgetter(*there, "__class__")
        if len(self._known) >= _CLASSES_KEPT:
            self._known.clear()
        known = self._known[cls] = _Known(get, get(cls), changed[0] if changed else None)
        return known


def _is_of(function: Any, name: str, peers: list[type]) -> bool:
    """Tell whether a method of this name is from the code of one of the peer's classes."""
    where = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    defined = any((f"{peer.__qualname__}.{name}", peer.__module__) == where for peer in peers)
    return defined and not hasattr(function, "__wrapped__")
