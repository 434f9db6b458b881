"""Programs that `torch.compile`, `torch.export` or `torch.jit` trace: whether, and constants."""

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
"""Whether a function that is `constant` takes other objects than its own: not in torch 2.11."""

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors whose values are at hand, as those of fake tensors are not."""

WATCHERS: tuple[Callable[[], Any], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    _is_tracing,
    torch._C._autograd._profiler_enabled,
)
"""Functions that are true where a mode, `torch.jit.trace` or a profiler watches the operators of
this thread.
"""

is_jit_traced: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

Function = TypeVar("Function", bound=Callable[..., Any])


def is_traced(value: Any) -> bool:
    """Whether a graph is traced in which a value may be another one when it runs, or the value is a
    tensor of a class that may have none, as fake tensors have.
    """
    # The latter is `is_jit_traced`, at a tenth of its time.
    if is_dynamo_compiling() or _is_tracing():
        return True
    # For an int, `isinstance` with Tensor costs ten times as much as its type.
    cls = type(value)
    return cls is not int and cls not in PLAIN and isinstance(value, Tensor)


def in_program() -> bool:
    """Whether the calls of now go into a program: of `torch.compile`, `torch.export`,
    `torch.jit.trace` or `make_fx`.
    """
    return (
        is_compiling()
        or is_jit_traced()
        # To ask for a mode takes longer than to ask whether there is any.
        or (torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None)
    )


def operators_are_seen() -> bool:
    """Whether a mode or a profiler sees which operators are called."""
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

    It runs while the graph is made. Besides its object, if it is a method, it takes constants, and
    it returns a number or a string. Nothing else that it reads is guarded: callers pass the `id` of
    each object that may be replaced by another.

    It is `torch.compiler.assume_constant_result`, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def specialized(number: Any) -> Any:
    """A number as a constant of the graph: where it changes, there is another graph."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)


def is_constant(number: float) -> bool:
    """Whether a number is a constant of the graph, rather than one of its inputs."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


class Held:
    """What graphs hold, as attributes: an attribute of a global object is one that every tracer
    knows how to find.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._unused = itertools.count()

    def name_of(self, value: Any, owner: Any = None) -> str:
        """The name of a tensor or another object, which it gets when first asked for and is held by
        from then on.

        Args:
            owner: the value is let go with this object, if given.
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
"""What the graphs of this process hold."""
