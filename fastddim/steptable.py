"""Tables of steps: the coefficients of many steps computed once, so that a step names only its row.

A table serves code with a loop of its own (`fastddim.integrations`). In contrast, `step` computes
its coefficients from ᾱ at each call, and a `Sampler` owns the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastddim import backends, direct, ops, reference, transfer
from fastddim.backends import cpu
from fastddim.cache import Cache
from fastddim.kept import keep, ordinary
from fastddim.philox import Keys
from fastddim.plan import Rescaling, to_table
from fastddim.recycling import LARGE, RECYCLER
from fastddim.reference import compute_dtype
from fastddim.tracing import HELD, PLAIN, constant, is_traced
from fastddim.transforms import check_unfollowed, functorch_active, tracked

# The number of kinds of states that a table is prepared for at the same time.
_KINDS_KEPT = 8


class _RowIndices(dict[int, Tensor]):
    """Row indices as the kernel takes them, int64 `[1]` on a device, made on the first request."""

    def __init__(self, count: int, device: torch.device, position: Callable[[int, int], int]):
        super().__init__()
        self._position = position
        self._all = torch.arange(count, device=device)

    def __missing__(self, row: int) -> Tensor:
        position = self._position(len(self._all), row)
        index = self[row] = ordinary(lambda: self._all[position : position + 1])
        return index


class PreparedTable(NamedTuple):
    """A table for states of one dtype on one device."""

    backend: backends.Backend
    table: Tensor  # [R, K]
    indices: _RowIndices
    fast: bool  # `ops.step` takes the step
    noiseless: Callable[..., direct.Result]  # a stepper of `fastddim.direct`, without noise
    noised: Callable[..., direct.Result]  # the same with noise that is given


class StepTable:
    """Coefficient rows `[R, K]` of R arbitrary steps.

    Values are not checked: coefficients that `fastddim.step` refuses give infinity or NaN here, and
    only in the steps that use their row.
    """

    def __init__(
        self,
        rows: Tensor,
        *,
        rescaling: Rescaling | None = None,
        impl: str = "auto",
        checked: bool = False,
    ) -> None:
        """Make a table of rows.

        Args:
            rows: float64 `[R, K]`, from `plan.stack_row`.
            rescaling: the dependence of the rows on the data of a step, if any.
            impl: the backend, as in `fastddim.sample`.
            checked: whether rows that overflow the dtype of a state are refused.
        """
        self._checked = checked
        self.rows = rows
        self._rescaling = rescaling
        self._impl = impl
        self._prepared: Cache[PreparedTable] = Cache(_KINDS_KEPT)

    def take(
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
        """Return (x_prev, x_0), in new tensors like `x`; x_0 is None unless `return_x0`.

        Args:
            x, model_output, noise, keys, history, epsilon: as in
                `fastddim.backends.Backend.update_out`.
            row: row of all samples, or an int64 tensor `[1]` or `[B]` on the device of `x`, where
                it is read.

        The result is differentiable to any order in `x`, `model_output` and `noise`, also under
        the transforms of `torch.func`, unless `epsilon` is written.

        Raises:
            RuntimeError: a tensor does not fit, or has gradients that cannot be followed; the
                message names it.
        """
        prepared = self.prepared(x.dtype, x.device)
        backend, table, indices, fast, noiseless, noised = prepared
        plain = type(x) in PLAIN
        apart = keys is None and history is None and epsilon is None
        # For an int, `isinstance` with Tensor takes ten times as long as a comparison of its type.
        if type(row) is int or not isinstance(row, Tensor):
            number, row = row, indices[row]
            if fast and plain and apart and x.nbytes < LARGE:
                stepper = noiseless if noise is None else noised
                taken = stepper(x, model_output, number, noise, None, 0, 0, None, return_x0)
                if taken is not None:
                    return taken if isinstance(taken, tuple) else (taken, None)
        # Levels count for all threads. Calling `tracked` first would take a hundredth of a step.
        if (
            forward_ad._current_level >= 0
            or (
                is_grad_enabled()
                and (
                    x.requires_grad
                    or model_output.requires_grad
                    or (noise is not None and noise.requires_grad)
                )
            )
        ) and tracked(x, model_output, noise):
            return self._differentiable(
                prepared, x, model_output, row, noise, keys, history, epsilon
            )
        # The size of a tensor of another class, such as a fake one, may be unknown. A trace of
        # `torch.jit` would turn recycled memory into a constant.
        large = fast and plain and x.nbytes >= LARGE and not is_traced(x)
        if fast and plain and not large and keys is None and epsilon is None:
            results = ops.step(x, model_output, table, row, noise)
            return results if return_x0 else (results[0], None)
        # Under transforms, which `ops.step` notices by itself, and for every other class of
        # tensors, an operator that returns its results takes the step.
        if functorch_active() or (epsilon is None and not plain):
            return self._differentiable(
                prepared, x, model_output, row, noise, keys, history, epsilon
            )
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

    def __call__(self, *operands: Any, **others: Any) -> tuple[Tensor, Any]:
        """Take the step, as a part of the graph if one is traced; see `take`."""
        if not is_dynamo_compiling():
            return self.take(*operands, **others)
        x: Tensor = operands[0]
        table = getattr(HELD, self.name_in_graph(x.dtype, x.device))
        traced = TracedTable(table, self.position, self._rescaling, self._impl)
        return traced.take(*operands, **others)

    @constant
    def name_in_graph(self, dtype: torch.dtype, device: torch.device) -> str:
        """The name in `HELD` of the table for states of one dtype on one device."""
        return HELD.name_of(self.prepared(dtype, device).table, owner=self)

    @staticmethod
    def position(count: int, row: int) -> int:
        """The place of a row among `count`; a negative row counts from the end."""
        if not -count <= row < count:
            raise IndexError(f"row: expected an index in [{-count}, {count}), got {row}")
        return row % count

    def prepared(self, dtype: torch.dtype, device: torch.device) -> PreparedTable:
        """The table for states of one dtype on one device."""
        return self._prepared.get((device, dtype)) or self._prepare(dtype, device)

    def _prepare(self, dtype: torch.dtype, device: torch.device) -> PreparedTable:
        """Prepare the table for states of one dtype on one device; only this puts coefficients on
        a device.
        """
        backend = backends.choose(self._impl, device)

        def prepared() -> PreparedTable:
            # A view of rows that are of inference mode would be of inference mode too.
            rows = self.rows.clone()
            table = to_table(rows, compute_dtype(dtype), rows.device, checked=self._checked)
            table = transfer.upload(table, device)
            fast = self._rescaling is None and backend.__name__ == cpu.__name__
            indices = _RowIndices(len(table), device, self.position)
            steppers = [
                direct.make_stepper(rows.view(table.shape), noisy=noisy, guided=False)
                if fast
                else direct.declines
                for noisy in (False, True)
            ]
            return PreparedTable(backend, table, indices, fast, *steppers)

        return keep(self._prepared, (device, dtype), prepared, device=device)

    def _differentiable(
        self,
        prepared: PreparedTable,
        x: Tensor,
        model_output: Tensor,
        row: Tensor,
        noise: Tensor | None,
        keys: Keys | None,
        history: Tensor | None,
        epsilon: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if epsilon is not None:
            check_unfollowed("epsilon", x, model_output, noise)
            raise RuntimeError(
                "epsilon: expected None with gradients, since writing into a given tensor is not "
                "differentiable, got a tensor; call under torch.no_grad()"
            )
        backend, table = prepared.backend, prepared.table
        if self._rescaling is not None:
            backend, table, row = rescaled_differentiably(
                x, model_output, table, row, self._rescaling
            )
        return backend.update(x, model_output, table, row, noise=noise, keys=keys, history=history)


class TracedTable:
    """A table in a graph that is traced. Each step is one operator that returns its results, since
    compilers can move such an operator.
    """

    def __init__(
        self,
        table: Tensor,
        position: Callable[[int, int], int],
        rescaling: Rescaling | None,
        impl: str = "auto",
    ) -> None:
        """Take over a table as the graph holds it.

        Args:
            table: `[R, K]` as the backend reads it.
            position: gives the place of a row among R.
            rescaling, impl: as in `StepTable`.
        """
        self._table = table
        self._position = position
        self._rescaling = rescaling
        self._impl = impl

    def take(
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
        """Take a step; see `StepTable.take`."""
        backend, table = backend_in_graph(self._impl, x.device), self._table
        if not isinstance(row, Tensor):
            position = self._position(table.shape[0], row)
            row = torch.full((1,), position, dtype=torch.int64, device=x.device)
        if self._rescaling is not None and tracked(x, model_output, noise):
            backend, table, row = rescaled_differentiably(
                x, model_output, table, row, self._rescaling
            )
        elif self._rescaling is not None:
            table, row = rescaled(backend, x, model_output, table, row, self._rescaling)
        if epsilon is None:
            return backend.update(
                x, model_output, table, row, noise=noise, keys=keys, history=history
            )
        check_unfollowed("epsilon", x, model_output, noise)
        x_prev, x_0 = torch.empty_like(x), torch.empty_like(x)
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
        return x_prev, x_0 if return_x0 else None


def backend_in_graph(impl: str, device: torch.device) -> backends.Backend:
    """`backends.choose` as a constant of a graph that is traced."""
    return backends.BACKENDS[_backend_name(impl, device)]


@constant
def _backend_name(impl: str, device: torch.device) -> str:
    return backends.choose(impl, device).__name__.rpartition(".")[2]


def rescaled(
    backend: backends.Backend,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    rescaling: Rescaling,
) -> tuple[Tensor, Tensor]:
    """A table with one row for each of these samples, and the row index of each sample."""
    batch = x.shape[0]
    rows = table.new_empty((batch, table.shape[1]))
    backend.rescale_rows(x, model_output, table, row, rescaling, rows)
    return rows, torch.arange(batch, device=x.device)


def rescaled_differentiably(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor, rescaling: Rescaling
) -> tuple[backends.Backend, Tensor, Tensor]:
    """`rescaled`, and the backend for the result: only the reference has derivatives of rows that
    depend on the data.
    """
    rows = reference.rescaled_rows(x, model_output, table.index_select(0, row), rescaling)
    return backends.BACKENDS["reference"], rows, torch.arange(x.shape[0], device=x.device)
