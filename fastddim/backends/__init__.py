"""The implementations of the fused update, one module each.

A module here is a backend: it defines the functions of `Backend`, and its name is the `impl=` that
selects it. It may also define `loop_step`, as `fastddim.backends.cpu` does, which makes the whole
step of a loop one call. This function gets the loop's tensors, which stay where they are, and a
model output as an example of shape and dtype, and returns a `LoopStep`. `masked_loop_step` does the
same for masked steps, and gets a `Blending` too, as `blending=`. Where a backend defines no such
function, a step calls its `update_out` and `advance`.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from typing import Protocol, cast

import torch
from torch import Tensor

from fastddim.ops import Blending, LoopStep
from fastddim.philox import Keys
from fastddim.plan import Rescaling

__all__ = ["BACKENDS", "Backend", "Blending", "LoopStep", "choose"]


class Backend(Protocol):
    """The functions that a backend's module defines.

    The results are the reference's: same formula, same order of operations, same noise.

    Attributes:
        PRIORITY: of the backends that work on the device, `impl="auto"` takes that of the highest.
    """

    __name__: str
    PRIORITY: int

    def unavailable(self, device: torch.device) -> str | None:
        """The reason that it cannot serve tensors on `device`, or None where it can."""

    def advance(self, counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
        """Move a loop to its next step: every counter goes up by one, then t[j] =
        timesteps[counters[j]].

        Args:
            counters: int64 `[n]`, n >= len(t): the step of each sample, and other numbers that grow
                with it.
            timesteps: int64 `[m]`, m > counters[j] for j < len(t).
            t: int64, written.
        """

    def rescale_rows(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor | None,
        rescaling: Rescaling,
        out: Tensor,
    ) -> None:
        """Rows for these data, as `fastddim.reference.rescaled_rows` specifies them.

        Args:
            x: state `[B, …]`, as in `update_out`.
            model_output: as in `update_out`.
            table: as in `update_out`.
            row: as in `update_out`.
            rescaling: the part of a row that comes from the data.
            out: rows `[B, K]` in the dtype of `table`, written.
        """

    def normal_out(self, keys: Keys, stream: int, out: Tensor) -> None:
        """Write standard normals of one noise stream into `out` `[B, …]`, rounded to its dtype; the
        bits are those of `fastddim.philox.normal`.
        """

    def update(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor | None,
        *,
        noise: Tensor | None,
        keys: Keys | None,
        **others: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(x_prev, x_0) in new tensors, differentiable to any order in every floating-point input,
        and under the transforms of `torch.func`.

        The arguments are those of `update_out`; `others` are `history`, `mask` and `known`.
        """

    def update_out(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: Tensor | None,
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
    ) -> None:
        """One update into given tensors, as `fastddim.reference.updated` specifies it.

        Args:
            x: state `[B, …]`.
            model_output: `[B or 2B, C or 2C, …]`: 2B samples are guided, of 2C channels the first
                half is read.
            table: coefficient rows `[R, K]` in the order of `fastddim.plan.Row`; float32, or
                float64 for a float64 state.
            row: int64 `[1]` or `[B]`, the row of each sample; with None, all have the first.
            noise: z like `x`.
            keys: the keys of noise that the kernel draws instead; with neither, none is added.
            history: epsilon of the step before, like `x`, added with the row's coefficient `ph`.
            mask: weight like `x` of `known` in the result.
            known: values like `x`.
            out: x_prev like `x`; may be `x`.
            x_0: predicted x_0, shaped like `x`.
            model_input: `[B or 2B, …]`: the new state in the model's dtype, twice under guidance.
            epsilon: the epsilon of this step, shaped like `x`; may be `history`.
        """


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

    Where the backend made for the device does not work, "auto" warns and says why.

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
