"""Methods that a peer's code calls on its own objects, and that a drop-in computes in another way.

A class of the user's, or an attribute of one object, may override such a method: a hook. A drop-in
asks for it, and then calls the object's methods, as the peer's code does.
"""

from __future__ import annotations

from typing import Any


class Hooks:
    """The methods of a peer's classes that a drop-in does without.

    Peers are told by their names, so that none has to be imported: a class of that name, the last
    one among the bases, is the peer's own.
    """

    def __init__(
        self, *methods: str, of: tuple[str, ...], attributes: tuple[str, ...] = ()
    ) -> None:
        """
        Args:
            methods: names of the methods.
            of: names of the classes that define them in the peer's code.
            attributes: names that the peer sets on its objects and a class may make properties of.
        """
        self.methods = methods
        self._of = of
        self.attributes = attributes

    def overridden(self, owner: Any) -> str | None:
        """The first name that an object does not have from the peer's code, or None.

        A method that the peer's class itself no longer has from there counts too. Where in doubt,
        as for a method under a decorator, the answer is its name.
        """
        cls, own = type(owner), vars(owner)
        last = {base.__name__: base for base in cls.__mro__}
        peers = [last[name] for name in self._of if name in last]
        for name in self.methods:
            if name in own or not any(_defines(peer, name, cls) for peer in peers):
                return name
        return next((name for name in self.attributes if hasattr(cls, name)), None)


def _defines(peer: type, name: str, cls: type) -> bool:
    """Whether a class has the method of this name from the code of a peer's class."""
    function = getattr(cls, name, None)
    return (
        getattr(function, "__qualname__", None) == f"{peer.__qualname__}.{name}"
        and getattr(function, "__module__", None) == peer.__module__
        and not hasattr(function, "__wrapped__")
    )
