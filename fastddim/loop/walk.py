"""The walk of a plan as a function, for tracers that make programs of Python: `torch.compile`,
`torch.export` and `torch.jit.trace`.

A `Loop` writes over its buffers and calls the compiled kernel without PyTorch's dispatcher, so a
tracer sees only parts of it. Here each step returns new tensors, by operators, and the loop is
unrolled: a program has the model's own operators, and between them those of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastddim import adapter, ops, philox, transfer
from fastddim.adapter import Model
from fastddim.backends import Backend, reference
from fastddim.loop.setup import Setup
from fastddim.options import DenoisedFn, Rescaling
from fastddim.philox import Keys, Samples
from fastddim.plan import Row, StepKind, known_rows
from fastddim.reference import compute_dtype
from fastddim.tracing import is_jit_traced
from fastddim.validation import check_like, check_model_output, check_same_output


class Functions(NamedTuple):
    """The user's functions that a run calls, and their arguments."""

    model: Model
    uncond_model: Model | None
    denoised_fn: DenoisedFn | None
    arguments: tuple[dict[str, Any], ...]  # of each model, the unconditional one's first


class Noise(NamedTuple):
    """The noise of the steps: given `[S, B, …]`, or that of samples."""

    given: Tensor | None
    samples: Samples | None


class Mixing(NamedTuple):
    """Known data, and the latents that they are mixed with; all like the state."""

    mask: Tensor
    data: Tensor
    x_T: Tensor


class Table(NamedTuple):
    """Rows `[R, K]` of steps, and rows that make the new state epsilon instead."""

    update: Tensor
    epsilon: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Table:
        row: Any = Row(*rows.unbind(1))
        zero = torch.zeros_like(row.cx)
        epsilon = row._replace(k0=row.e0, kx=row.ex, km=row.em, pn=zero, ph=zero)
        return cls(rows, torch.stack(list(epsilon), dim=1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """A plan as traced programs read it; tensors are on the device of the state.

    Attributes:
        kind: what the steps have in common.
        backend: computes the updates.
        steps: S.
        table: the rows of all steps.
        first_half: where steps are split, those of their first halves.
        rows: int64 `[S, B]` where each sample has rows of its own; None where step s has row s.
        known: the rows `[S, K]` that mix known data.
        timesteps: int64 `[S]`.
        model_dtype: the dtype of the model's input.
        clean: whether ᾱ is 1 before the first step.
    """

    kind: StepKind
    backend: Backend
    steps: int
    table: Table
    first_half: Table | None
    rows: Tensor | None
    known: Tensor
    timesteps: Tensor
    model_dtype: torch.dtype
    clean: bool

    @classmethod
    def of(cls, setup: Setup) -> Walk:
        """The walk of a setup, worked out by code that a tracer must not follow."""
        plan, device = setup.plan, setup.device
        rows = None
        if plan.table.ndim == 3:
            first_rows = plan.steps * torch.arange(setup.shape[0], device="cpu")
            rows = torch.arange(plan.steps, device="cpu")[:, None] + first_rows

        def own(values: Tensor) -> Tensor:
            return transfer.upload(values.clone(), device)

        walk = cls(
            kind=plan.kind,
            backend=_as_operators(setup.backend),
            steps=plan.steps,
            table=Table.of(own(setup.table)),
            first_half=None if setup.first_half is None else Table.of(own(setup.first_half)),
            rows=None if rows is None else own(rows),
            known=own(known_rows(plan.alphas_cumprod).to(setup.table.dtype)),
            timesteps=own(plan.timesteps),
            model_dtype=setup.model_dtype,
            clean=bool(plan.alphas_cumprod[0] == 1),
        )
        transfer.wait(device)  # Any stream may run the program.
        return walk

    def latents(self, samples: Samples, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The latents x_T of the samples."""
        x_T = torch.empty(shape, dtype=dtype, device=self.timesteps.device)
        self.backend.normal_out(self._keys(samples, shape[0], 0), philox.LATENTS, x_T)
        return x_T

    def states(
        self,
        functions: Functions,
        x: Tensor,
        noise: Noise,
        mixing: Mixing | None,
        first: int = 0,
    ) -> list[Tensor]:
        """The states from `x` on, the one before step `first`."""
        states = [x]
        history = torch.zeros_like(x, dtype=self.model_dtype) if self.kind.history else None
        for s in range(first, self.steps):
            x, history = self._step(functions, s, x, history, noise, mixing)
            states.append(x)
        return states

    def _step(
        self,
        functions: Functions,
        s: int,
        x: Tensor,
        history: Tensor | None,
        noise: Noise,
        mixing: Mixing | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The state after step `s`, and the epsilon that the next one reads."""
        start, rescaling = x, self.kind.rescaling
        plan_table, row = self._rows_in(self.table, s)
        t = self.timesteps[s : s + 1].repeat(self.kind.parts * x.shape[0])
        output = self._evaluate(functions, x, t)
        for _ in range(self.kind.refine):
            made, own_row = self._fitted(x, output, plan_table, row, rescaling)
            output = self._evaluate(functions, self._update(x, output, made.update, own_row), t)
        if self.first_half is not None:
            half = self._rows_in(self.first_half, s)
            x, output = self._take_first_half(functions, x, output, *half, t)
            rescaling = None if rescaling is None else rescaling._replace(rescale=0.0)
        table, row = self._fitted(x, output, plan_table, row, rescaling)
        drawn = self.kind.noisy and noise.given is None and noise.samples is not None
        state = self._update(
            x,
            output,
            table.update,
            row,
            noise=noise.given[s] if self.kind.noisy and noise.given is not None else None,
            keys=self._keys(noise.samples, start.shape[0], s) if drawn else None,
            history=history,
            **self._known(mixing, s),
        )
        if history is not None:
            history = self._epsilon(x, output, table, row).to(history.dtype)
        return state, history

    def _rows_in(self, table: Table, s: int) -> tuple[Table, Tensor | None]:
        """The part of a table that has the rows of step `s`, and where they are in it: None for the
        first row.
        """
        if self.rows is None:
            return Table(*(rows[s : s + 1] for rows in table)), None
        return table, self.rows[s]

    def _evaluate(self, functions: Functions, x: Tensor, t: Tensor) -> Tensor:
        given, model = x.to(self.model_dtype), functions.model
        if functions.uncond_model is not None:
            others, kwargs = functions.arguments
            # Copied before the other is evaluated, since that may write over it.
            unconditional = _output("uncond_model", functions.uncond_model(given, t, **others), x)
            unconditional = unconditional.clone()
            conditional = _output("model", model(given, t, **kwargs), x)
            if not is_jit_traced():
                check_same_output(unconditional, conditional)
            return torch.cat([unconditional, conditional])
        if self.kind.guided:
            given = torch.cat([given, given])
        return _output(
            "model", model(given, t, **functions.arguments[0]), x, guided=self.kind.guided
        )

    def _take_first_half(
        self,
        functions: Functions,
        x: Tensor,
        output: Tensor,
        table: Table,
        row: Tensor | None,
        t: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The state and the model output that the second half of a split step reads."""
        assert functions.denoised_fn is not None
        rescaling = self.kind.rescaling
        rescaling = None if rescaling is None else rescaling._replace(ratio=0.0)
        table, row = self._fitted(x, output, table, row, rescaling)
        x_0 = self._update(x, output, table.update, row)
        if not self.kind.rederived:
            x = self._epsilon(x, output, table, row).to(x.dtype)
        changed = functions.denoised_fn(x_0, t[: x_0.shape[0]])
        if not is_jit_traced():
            check_like("denoised_fn's result", changed, "the state", x_0)
        return x, changed

    def _fitted(
        self,
        x: Tensor,
        output: Tensor,
        table: Table,
        row: Tensor | None,
        rescaling: Rescaling | None,
    ) -> tuple[Table, Tensor | None]:
        """The table and the rows of a step, which may be made for the data at hand."""
        if rescaling is None or (rescaling.rescale == 0 and rescaling.ratio == 0):
            return table, row
        rows = table.update
        own = rows.new_empty((x.shape[0], rows.shape[1]))
        self.backend.rescale_rows(x, output, rows, row, rescaling, own)
        return Table.of(own), torch.arange(x.shape[0], device=x.device)

    def _epsilon(self, x: Tensor, output: Tensor, table: Table, row: Tensor | None) -> Tensor:
        """The epsilon of a step, in the dtype that is computed in."""
        return self._update(x.to(compute_dtype(x.dtype)), output, table.epsilon, row)

    def _known(self, mixing: Mixing | None, s: int) -> dict[str, Tensor]:
        """Known data at the noise level after step `s`, and their weight."""
        if mixing is None:
            return {}
        known = self._update(mixing.data, mixing.x_T, self.known[s : s + 1], None)
        return {"mask": mixing.mask, "known": known}

    def _update(
        self, x: Tensor, output: Tensor, table: Tensor, row: Tensor | None, **others: Any
    ) -> Tensor:
        given = {"noise": None, "keys": None, **others}
        x_prev, _ = self.backend.update(x, output, table, row, **given)
        return x_prev

    def _keys(self, samples: Samples | None, batch: int, s: int) -> Keys:
        assert samples is not None
        seed, first = samples
        device = self.timesteps.device

        def filled(value: int | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return filled(0) + value
            return torch.full((batch,), value, dtype=torch.int64, device=device)

        return Keys(
            seed=seed.to(device) if isinstance(seed, Tensor) and seed.ndim else filled(seed),
            step=filled(s),
            sample=(
                filled(0)
                if first is None
                else torch.arange(first, first + batch, dtype=torch.int64, device=device)
            ),
        )


def _output(name: str, result: Any, x: Tensor, *, guided: bool = False) -> Tensor:
    """The tensor in the result of a model for the state `x`."""
    output: Tensor = adapter.output_tensor(result, name)
    # Sizes are tensors under torch.jit.trace; the operators refuse those that do not fit.
    if not is_jit_traced():
        check_model_output(f"{name} output", output, x, guided=guided)
    return output


def _as_operators(backend: Backend) -> Backend:
    """The operators in place of the reference, where no extension is compiled.

    A program then holds one operator for an update, and not all those of the reference.
    """
    only = backend.__name__ == reference.__name__ and ops.EXTENSION_ERROR is not None
    return cast(Backend, ops) if only else backend
