"""The replacement of `conditional_sample` on a policy, or on the part of a policy that has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastddim.choices import Graph, Impl
from fastddim.integrations._hooks import Hooks
from fastddim.integrations._policies import Samplers
from fastddim.integrations._scheduler_steps import SCHEDULERS, scheduler_kind
from fastddim.loop.copying import Rebuilt

METHOD = "conditional_sample"


class ConditionalSample(Rebuilt):
    """A callable that replaces the method of one object, and samples with prepared samplers.

    In a copy of the object, the callable samples with the copy.

    Attributes:
        peer: name of the code base in messages.
        hooks: hooks that know the peer's method.
    """

    peer: ClassVar[str]
    hooks: ClassVar[Hooks]

    def __init__(self, owner: Any, graph: Graph, impl: Impl) -> None:
        """Make the callable for one object.

        Args:
            owner: the object, which has the method and a `noise_scheduler`.
            graph, impl: as in `fastddim.Sampler`.

        Raises:
            ValueError: an option is unknown.
        """
        self._owner, self._graph, self._impl = owner, graph, impl
        self._rebuild()

    @classmethod
    def install(cls, owner: Any, graph: Graph, impl: Impl) -> None:
        """Put a callable on an object, in place of an earlier one.

        Raises:
            TypeError: the object's scheduler is neither DDPM's nor DDIM's.
            ValueError: its method is not the peer's, or an option is unknown.
        """
        if not _is_on(owner):
            cls._check(owner)
        setattr(owner, METHOD, cls(owner, graph, impl))

    @staticmethod
    def uninstall(owner: Any) -> None:
        """Remove the callable from an object that has one."""
        if _is_on(owner):
            delattr(owner, METHOD)

    @classmethod
    def _check(cls, owner: Any) -> None:
        if cls.hooks.overridden(owner):
            raise ValueError(
                f"policy: expected {cls.peer}'s own {METHOD}, got "
                f"{type(owner).__qualname__} with another"
            )
        scheduler = getattr(owner, "noise_scheduler", None)
        if scheduler_kind(scheduler) is None:
            raise TypeError(
                f"policy: expected a scheduler of {' or '.join(SCHEDULERS)}, "
                f"got {type(scheduler).__qualname__}"
            )

    def _build(self) -> None:
        self._samplers = Samplers(self.peer, graph=self._graph, impl=self._impl)

    def _functions(self) -> tuple[Any, ...]:
        return (self._owner,)

    def _own_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample with the peer's own method."""
        samples: Tensor = getattr(type(self._owner), METHOD)(self._owner, *args, **kwargs)
        return samples


def _is_on(owner: Any) -> bool:
    return isinstance(vars(owner).get(METHOD), ConditionalSample)
