"""The implementations of the fused update, one module each.

A module here is a backend. It defines

- `PRIORITY: int`: `impl="auto"` takes the highest that works on the device;
- `unavailable(device) -> str | None`: why it cannot serve tensors on `device`, or None where it
  can;
- `update`: the update, differentiable, as in `fastddim.ops.update`;
- `update_out`: the same into given tensors, as in `fastddim.ops.update_out`.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from fastddim.philox import Keys


class Backend(Protocol):
    PRIORITY: int

    def unavailable(self, device: torch.device) -> str | None: ...

    def update(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor,
        *,
        noise: Tensor | None,
        keys: Keys | None,
        history: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def update_out(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor,
        *,
        noise: Tensor | None,
        keys: Keys | None,
        history: Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        out: Tensor,
        x_0: Tensor | None,
        model_input: Tensor | None,
    ) -> None: ...


@cache
def names() -> tuple[str, ...]:
    """Names of all backends, fastest first."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(sorted(found, key=lambda name: -load(name).PRIORITY))


@cache
def load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def choose(impl: str, device: torch.device) -> Backend:
    """The backend that `impl` names, or for "auto" the fastest that works on `device`.

    Raises:
        ValueError: `impl` is unknown, or names a backend that cannot serve `device`; the message
            says why.
    """
    if impl == "auto":
        return _fastest(device)
    if impl not in names():
        expected = ", ".join(map(repr, ("auto", *names())))
        raise ValueError(f"impl: expected one of {expected}, got {impl!r}")
    backend = load(impl)
    reason = backend.unavailable(device)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} cannot be used on {device}: {reason}")
    return backend


@cache
def _fastest(device: torch.device) -> Backend:
    """The fastest backend for a device; says once why the CPU's compiled one is missing."""
    for name in names():
        reason = load(name).unavailable(device)
        if reason is None:
            return load(name)
        if name == device.type:
            warnings.warn(f"fastddim: no {name!r} backend: {reason}", stacklevel=4)
    raise AssertionError("the reference serves every device")
