"""Steps by row: the coefficients of many steps computed once, so that a step only names its row.

It serves code with a loop of its own (`fastddim.integrations`): `step` computes its coefficients
from ᾱ at each call, and a `Sampler` owns the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled

from fastddim import backends, ops, reference
from fastddim.backends import cpu
from fastddim.cache import Cache
from fastddim.philox import Keys
from fastddim.plan import Rescaling, to_table
from fastddim.recycling import LARGE, RECYCLER
from fastddim.reference import compute_dtype
from fastddim.transforms import check_unfollowed, tracked, transformed

# Kinds of states that a table is prepared for at the same time.
_KINDS_KEPT = 8


class _RowIndices(dict[int, Tensor]):
    """Rows as the kernel takes them, int64 `[1]` on a device, made when first asked for."""

    def __init__(self, count: int, device: torch.device, position: Callable[[int, int], int]):
        super().__init__()
        self._position = position
        self._all = torch.arange(count, device=device)

    # An index that is kept must serve calls outside the caller's inference mode too.
    @torch.inference_mode(False)
    def __missing__(self, row: int) -> Tensor:
        position = self._position(len(self._all), row)
        index = self[row] = self._all[position : position + 1]
        return index


class _Prepared(NamedTuple):
    """A table for states of one dtype on one device."""

    backend: backends.Backend
    table: Tensor  # [R, K]
    indices: _RowIndices
    fast: bool  # whether `ops.step` takes the step


class StepTable:
    """Coefficient rows `[R, K]` of any R steps.

    Values are not checked: coefficients that `fastddim.step` refuses give infinity or NaN here, and
    only in the steps that use their row.
    """

    def __init__(
        self, rows: Tensor, *, rescaling: Rescaling | None = None, impl: str = "auto"
    ) -> None:
        """
        Args:
            rows: float64 `[R, K]`, from `plan.stack_row`.
            rescaling: how the rows depend on the data of a step, if they do.
            impl: the backend, as in `fastddim.sample`.
        """
        self.rows = rows
        self._rescaling = rescaling
        self._impl = impl
        self._prepared: Cache[_Prepared] = Cache(_KINDS_KEPT)

    def __call__(
        self,
        x: Tensor,
        model_output: Tensor,
        row: int | Tensor,
        *,
        noise: Tensor | None = None,
        keys: Keys | None = None,
        history: Tensor | None = None,
        epsilon: Tensor | None = None,
        return_x0: bool = True,
    ) -> tuple[Tensor, Any]:
        """(x_prev, x_0), in new tensors like `x`; x_0 is None unless `return_x0`.

        Args:
            x, model_output, noise, keys, history, epsilon: as in
                `fastddim.backends.Backend.update_out`.
            row: of all samples, or an int64 tensor `[1]` or `[B]` on the device of `x`, which is
                read there.

        Differentiable to any order in `x`, `model_output` and `noise`, and under the transforms of
        `torch.func`, but not where `epsilon` is written.

        Raises:
            RuntimeError: a tensor does not fit, or has gradients where there are none; the message
                names it.
        """
        prepared = self._prepared.get((x.device, x.dtype))
        if prepared is None:
            prepared = self._prepare(x)
        backend, table, indices, fast = prepared
        # For an int, `isinstance` with Tensor costs ten times as much as its type.
        if type(row) is int or not isinstance(row, Tensor):
            row = indices[row]
        if transformed() or (
            is_grad_enabled()
            and (
                x.requires_grad
                or model_output.requires_grad
                or (noise is not None and noise.requires_grad)
            )
        ):
            if epsilon is None:
                return self._differentiable(prepared, x, model_output, row, noise, keys, history)
            check_unfollowed("epsilon", x, model_output, noise)
            if tracked(x, model_output, noise):
                raise RuntimeError(
                    "epsilon: writing into a given tensor is not differentiable; "
                    "call under torch.no_grad()"
                )
        large = fast and x.nbytes >= LARGE and not torch.compiler.is_compiling()
        if fast and not large and keys is None and epsilon is None:
            results = ops.step(x, model_output, table, row, noise)
            return results if return_x0 else (results[0], None)
        if self._rescaling is not None:
            table, row = rescaled(backend, x, model_output, table, row, self._rescaling)
        empty_like = RECYCLER.empty_like if large else torch.empty_like
        x_prev = empty_like(x)
        x_0 = empty_like(x) if return_x0 else None
        backend.update_out(
            x,
            model_output,
            table,
            row,
            noise=noise,
            keys=keys,
            history=history,
            out=x_prev,
            x_0=x_0,
            model_input=None,
            epsilon=epsilon,
        )
        return x_prev, x_0

    @staticmethod
    def _position(count: int, row: int) -> int:
        """The place of a row among `count`, which may be given from the end."""
        return range(count)[row]

    # A prepared table must serve calls outside the caller's inference mode too.
    @torch.inference_mode(False)
    def _prepare(self, x: Tensor) -> _Prepared:
        """The table for states like `x`: the only place that puts coefficients on a device."""
        backend = backends.choose(self._impl, x.device)
        table = to_table(self.rows, compute_dtype(x.dtype), x.device, checked=False)
        prepared = _Prepared(
            backend,
            table,
            _RowIndices(len(table), x.device, self._position),
            self._rescaling is None and backend.__name__ == cpu.__name__,
        )
        self._prepared.put((x.device, x.dtype), prepared)
        return prepared

    def _differentiable(
        self,
        prepared: _Prepared,
        x: Tensor,
        model_output: Tensor,
        row: Tensor,
        noise: Tensor | None,
        keys: Keys | None,
        history: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        backend, table = prepared.backend, prepared.table
        if self._rescaling is not None:
            backend, table, row = rescaled_differentiably(
                x, model_output, table, row, self._rescaling
            )
        return backend.update(x, model_output, table, row, noise=noise, keys=keys, history=history)


def rescaled(
    backend: backends.Backend,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    rescaling: Rescaling,
) -> tuple[Tensor, Tensor]:
    """A table with one row for each of these samples, and the index of the row of each."""
    batch = x.shape[0]
    rows = table.new_empty((batch, table.shape[1]))
    backend.rescale_rows(x, model_output, table, row, rescaling, rows)
    return rows, torch.arange(batch, device=x.device)


def rescaled_differentiably(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, rescaling: Rescaling
) -> tuple[backends.Backend, Tensor, Tensor]:
    """`rescaled`, and the backend for it: rows that come from the data have derivatives too, which
    only the reference has.
    """
    rows = reference.rescaled_rows(x, model_output, table.index_select(0, row), rescaling)
    return backends.BACKENDS["reference"], rows, torch.arange(x.shape[0], device=x.device)
