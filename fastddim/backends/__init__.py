"""The implementations of the fused update, one module each.

A module here is a backend. It defines

- `PRIORITY: int`: `impl="auto"` takes the highest that works on the device;
- `unavailable(device) -> str | None`: why it cannot serve tensors on `device`, or None where it
  can;
- `advance`: the move to a loop's next step, as in `fastddim.ops.advance`;
- `fit_rows`: what coefficients take from the data, as in `fastddim.ops.fit_rows`;
- `normal_out`: standard normals, as in `fastddim.ops.normal_out`;
- `update`: the update, differentiable, as in `fastddim.ops.update`;
- `update_out`: the same into given tensors, as in `fastddim.ops.update_out`.

It may define `loop_step`, which makes the whole step of a loop one call: given the loop's tensors,
which stay where they are, and a model output for its shape and dtype, it returns `take(output)`,
which updates `state` in place (and `history`, `model_input`), advances `counters` and `t`, and
returns True; or does nothing and returns False where `output` is laid out otherwise.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from typing import Protocol, TypeAlias, cast

import torch
from torch import Tensor

from fastddim.philox import Keys
from fastddim.plan import Fit

LoopStep: TypeAlias = Callable[[Tensor], bool]


class Backend(Protocol):
    __name__: str
    PRIORITY: int

    def unavailable(self, device: torch.device) -> str | None: ...

    def advance(self, counters: Tensor, timesteps: Tensor, t: Tensor) -> None: ...

    def fit_rows(
        self, x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, fit: Fit, out: Tensor
    ) -> None: ...

    def normal_out(self, keys: Keys, stream: int, out: Tensor) -> None: ...

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
        epsilon: Tensor | None = None,
    ) -> None: ...


def _found() -> dict[str, Backend]:
    modules = [
        cast(Backend, importlib.import_module(f"{__name__}.{module.name}"))
        for module in pkgutil.iter_modules(__path__)
    ]
    modules.sort(key=lambda module: -module.PRIORITY)
    return {module.__name__.rpartition(".")[2]: module for module in modules}


BACKENDS = _found()
"""All backends by name, fastest first."""


def choose(impl: str, device: torch.device) -> Backend:
    """The backend that `impl` names, or for "auto" the fastest that works on `device`.

    Where "auto" has to do without the backend made for the device it warns and says why.

    Raises:
        ValueError: `impl` is unknown, or names a backend that cannot serve `device`; the message
            says why.
    """
    if impl == "auto":
        return _fastest(device)
    if impl not in BACKENDS:
        expected = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"impl: expected one of {expected}, got {impl!r}")
    reason = BACKENDS[impl].unavailable(device)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} cannot be used on {device}: {reason}")
    return BACKENDS[impl]


def _fastest(device: torch.device) -> Backend:
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(device)
        if reason is None:
            return backend
        if name == device.type:
            warnings.warn(f"fastddim: no {name!r} backend: {reason}", stacklevel=2)
    raise AssertionError("the reference serves every device")
