"""Steps by row: the coefficients of many steps worked out once, so that a step only says which.

This is what code with a loop of its own needs (`fastddim.integrations`): `step` works its
coefficients out from ᾱ at each call, a `Sampler` owns the loop.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim import backends, ops, reference
from fastddim.backends import cpu
from fastddim.philox import Keys
from fastddim.plan import Fit, Update, stack_row, to_table, unchecked_row
from fastddim.recycling import LARGE, RECYCLER
from fastddim.reference import compute_dtype


class _Prepared(NamedTuple):
    """A table for states of one dtype on one device."""

    dtype: torch.dtype | None
    device: torch.device | None
    backend: backends.Backend
    table: Tensor  # [R, K]
    indices: Tensor  # [R]
    single: dict[int, Tensor]  # those of one row, [1]
    fast: bool  # whether `ops.step` does it


_NOTHING = torch.empty(0, device="cpu")
_NONE = _Prepared(None, None, backends.BACKENDS["reference"], _NOTHING, _NOTHING, {}, False)


class StepTable:
    """Coefficient rows `[R, K]` of any R steps.

    Values are not checked: what `fastddim.step` refuses gives infinity or NaN here, and only in the
    steps that ask for it.
    """

    def __init__(self, rows: Tensor, *, fit: Fit | None = None, impl: str = "auto") -> None:
        """
        Args:
            rows: float64 `[R, K]`, from `plan.stack_row`.
            fit: what a step takes from its data, if anything.
            impl: the backend, as in `fastddim.sample`.
        """
        self.rows = rows
        self._fit = fit
        self._impl = impl
        self._prepared: dict[tuple[torch.device, torch.dtype], _Prepared] = {}
        self._last = _NONE

    @classmethod
    def of(cls, alphas_t: Tensor, alphas_prev: Tensor, update: Update) -> StepTable:
        """Row i steps from ᾱ = `alphas_t[i]` to `alphas_prev[i]` (float64 `[R]`, on the CPU).

        Kept for later calls with the same values, since loops that are called again make them anew.
        """
        values = (tuple(alphas_t.tolist()), tuple(alphas_prev.tolist()))
        with_tensors = any(isinstance(value, Tensor) for value in vars(update).values())
        return (_table_of if with_tensors else _kept)(*values, update)

    def __call__(
        self,
        x: Tensor,
        model_output: Tensor,
        row: int | Tensor,
        *,
        noise: Tensor | None = None,
        keys: Keys | None = None,
        return_x0: bool = True,
    ) -> tuple[Tensor, Any]:
        """(x_prev, x_0), in new tensors like `x`; x_0 is None unless `return_x0`.

        Args:
            x, model_output, noise, keys: as in `fastddim.backends.Backend.update_out`.
            row: of all samples, or an int64 tensor `[1]` or `[B]` on the device of `x`, which is
                read there.

        Differentiable in `x`, `model_output` and `noise` where grad mode is on.

        Raises:
            RuntimeError: a tensor does not fit; the message names it.
        """
        prepared = self._last
        if x.dtype is not prepared.dtype or x.device != prepared.device:
            prepared = self._last = self._prepare(x)
        _, _, backend, table, indices, single, fast = prepared
        if not isinstance(row, Tensor):
            row = single[row] if row in single else self._index(indices, single, row)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or model_output.requires_grad
            or (noise is not None and noise.requires_grad)
        ):
            return self._differentiable(prepared, x, model_output, row, noise, keys)
        large = fast and x.nbytes >= LARGE
        if fast and not large and keys is None:
            results = ops.step(x, model_output, table, row, noise)
            return results if return_x0 else (results[0], None)
        if self._fit is not None:
            table, row = fitted(backend, x, model_output, table, row, self._fit)
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
            out=x_prev,
            x_0=x_0,
            model_input=None,
        )
        return x_prev, x_0

    # What is kept must serve calls outside the caller's inference mode too.
    @torch.inference_mode(False)
    def _prepare(self, x: Tensor) -> _Prepared:
        key = (x.device, x.dtype)
        if key not in self._prepared:
            backend = backends.choose(self._impl, x.device)
            fast = self._fit is None and backend.__name__ == cpu.__name__
            table = to_table(self.rows, compute_dtype(x.dtype), x.device, checked=False)
            indices = torch.arange(len(table), device=x.device)
            self._prepared[key] = _Prepared(*key[::-1], backend, table, indices, {}, fast)
        return self._prepared[key]

    @torch.inference_mode(False)
    def _index(self, indices: Tensor, single: dict[int, Tensor], row: int) -> Tensor:
        position = range(len(indices))[row]
        index = single[row] = indices[position : position + 1]
        return index

    def _differentiable(
        self,
        prepared: _Prepared,
        x: Tensor,
        model_output: Tensor,
        row: Tensor,
        noise: Tensor | None,
        keys: Keys | None,
    ) -> tuple[Tensor, Tensor]:
        backend, table = prepared.backend, prepared.table
        if self._fit is not None:
            backend, table, row = fitted_differentiably(x, model_output, table, row, self._fit)
        return backend.update(x, model_output, table, row, noise=noise, keys=keys)


def fitted(
    backend: backends.Backend,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    fit: Fit,
) -> tuple[Tensor, Tensor]:
    """A table of the rows of these samples, and where each sample finds its own."""
    batch = x.shape[0]
    rows = table.new_empty((batch, table.shape[1]))
    backend.fit_rows(x, model_output, table, row, fit, rows)
    return rows, torch.arange(batch, device=x.device)


def fitted_differentiably(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, fit: Fit
) -> tuple[backends.Backend, Tensor, Tensor]:
    """The same, and the backend for it: what rows take from the data has gradients too, which only
    the reference follows.
    """
    rows = reference.fitted_rows(x, model_output, table.index_select(0, row), fit)
    return backends.BACKENDS["reference"], rows, torch.arange(x.shape[0], device=x.device)


def _table_of(
    alphas_t: tuple[float, ...], alphas_prev: tuple[float, ...], update: Update
) -> StepTable:
    a, p = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (alphas_t, alphas_prev))
    row = unchecked_row(a, p, update)
    # A row of numbers alone, as of sample prediction without noise, is still one a step.
    row = row._replace(k0=torch.as_tensor(row.k0).expand_as(a))
    return StepTable(stack_row(row), fit=update.fit)


_kept = lru_cache(maxsize=16)(_table_of)
