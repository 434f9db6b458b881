"""Programs that `torch.compile`, `torch.export` or `torch.jit` trace, and their constants."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _is_tracing
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

TAKES_OBJECTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
"""True if a function marked `constant` takes objects besides its own; false in torch 2.11."""

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors whose values can be read, unlike those of fake tensors."""

WATCHERS: tuple[Callable[[], Any], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    _is_tracing,
    torch._C._autograd._profiler_enabled,
)
"""Functions that return true if a mode, `torch.jit.trace` or a profiler watches the operators of
this thread.
"""

is_jit_traced: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

Function = TypeVar("Function", bound=Callable[..., Any])


def is_traced(value: Any) -> bool:
    """Tell whether a value may be another one when the graph that is being traced runs, or is a
    tensor of a class that may have no values, such as fake tensors.
    """
    # `_is_tracing` is `is_jit_traced`, at a tenth of its time.
    if is_dynamo_compiling() or _is_tracing():
        return True
    # For an int, `isinstance` with Tensor takes ten times as long as a comparison of its type.
    cls = type(value)
    return cls is not int and cls not in PLAIN and isinstance(value, Tensor)


def in_program() -> bool:
    """Tell whether calls now become part of a program: of `torch.compile`, `torch.export`,
    `torch.jit.trace` or `make_fx`.
    """
    return (
        is_compiling()
        or is_jit_traced()
        # Finding a mode takes longer than finding out that there is none.
        or (torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None)
    )


def operators_are_seen() -> bool:
    """Tell whether a mode or a profiler sees which operators are called."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        # A default device is a mode too.
        or (
            torch._C._len_torch_function_stack() > 0
            and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        )
    )


def constant(function: Function) -> Function:
    """Mark a function whose result is a constant of the graph that is traced.

    The function runs while the graph is made. It takes constants and, if it is a method, its own
    object, and returns a number or a string. Nothing else that it reads is guarded: callers pass
    the `id` of each object that may be replaced.

    The mark is that of `torch.compiler.assume_constant_result`, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def specialized(number: Any) -> Any:
    """A number as a constant of the graph; another number leads to another graph."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)


def is_constant(number: float) -> bool:
    """Tell whether a number is a constant of the graph, rather than one of its inputs."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


class Held:
    """Objects that graphs hold, as attributes of one global object, since every tracer finds
    those.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._unused = itertools.count()

    def name_of(self, value: Any, owner: Any = None) -> str:
        """The name of a tensor or another object, given on the first request; the object is held
        from then on.

        Args:
            owner: an object with which the value is released, if given.
        """
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"held_{next(self._unused)}"
            setattr(self, name, value)
            if owner is not None:
                weakref.finalize(owner, self._let_go, id(value), name)
        return name

    def _let_go(self, identity: int, name: str) -> None:
        del self._names[identity]
        delattr(self, name)


HELD = Held()
"""The objects that graphs of this process hold."""
