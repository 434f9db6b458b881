"""Calls in programs, as of `torch.compile`, of objects that keep something between calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from fastddim.tracing import in_program

Arguments = ParamSpec("Arguments")
Owner = TypeVar("Owner")
Result = TypeVar("Result")


def outside_of_programs(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Keep a method out of programs: `torch.compile` breaks its graph there, and other tracers
    refuse the call.
    """

    @functools.wraps(method)
    def call(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if in_program():
            from fastddim.loop import traced

            return traced.call_outside(type(self).__name__, method, self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return call
