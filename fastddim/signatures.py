"""Objects of options, made from the arguments of functions and from one another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Options = TypeVar("Options")
Owner = TypeVar("Owner")
Result = TypeVar("Result")
Shared = TypeVar("Shared")


def takes(
    options: Callable[Arguments, Options],
) -> Callable[[Callable[[Options], Result]], Callable[Arguments, Result]]:
    """Give a function of `options` the signature of their constructor.

    Type checkers, `inspect.signature` and `help` see these arguments with their types and defaults.

    Args:
        options: the class of the options, used by one function only.
    """

    def decorate(function: Callable[[Options], Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            return function(options(*args, **kwargs))

        _show_arguments(call, options, function, [])
        return call

    return decorate


def method_takes(
    options: Callable[Arguments, Options],
) -> Callable[
    [Callable[[Owner, Options], Result]], Callable[Concatenate[Owner, Arguments], Result]
]:
    """Do the same as `takes` for a method."""

    def decorate(
        function: Callable[[Owner, Options], Result],
    ) -> Callable[Concatenate[Owner, Arguments], Result]:
        @functools.wraps(function)
        def call(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            return function(self, options(*args, **kwargs))

        _show_arguments(call, options, function, ["self"])
        return call

    return decorate


def _show_arguments(
    call: Any, options: Any, function: Callable[..., Any], before: list[str]
) -> None:
    # With this attribute, tools would show the function that takes one object.
    del call.__wrapped__
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in before]
    made = inspect.signature(options).parameters
    result = function.__annotations__["return"]
    call.__signature__ = inspect.Signature([*first, *made.values()], return_annotation=result)
    call.__annotations__ = {name: given.annotation for name, given in made.items()}
    call.__annotations__["return"] = result
    # Python names the constructor in its error for a missing or unknown argument.
    options.__init__.__qualname__ = function.__qualname__


def shared(cls: type[Shared], options: Any, **others: Any) -> Shared:
    """An object of `cls` made of the fields that `options` also has, and of `others`."""
    names = [field.name for field in fields(cast(Any, cls)) if hasattr(options, field.name)]
    return cls(**{name: getattr(options, name) for name in names} | others)
