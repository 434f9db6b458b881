"""Step counters of a loop, in device memory.

Kernels read the number of the step there, so one captured step serves all steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim import philox, transfer
from fastddim.backends import Backend
from fastddim.loop.alignment import aligned, aligned_rows
from fastddim.philox import Keys, Samples
from fastddim.plan import Plan


class Position(NamedTuple):
    """The numbers of one step: int64 tensors on the loop's device."""

    step: Tensor  # [1], its index in the plan; [B] where each sample has a plan of its own
    row: Tensor | None  # [1]; [B] where each sample has rows of its own; None for that of `number`
    t: Tensor  # [B], or [2B] under guidance
    keys: Keys  # [B] each
    number: int | None = None  # `step` as the host knows it, if it does

    def rows_in(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """A table of a plan's rows and the index of this step's row, for an update."""
        return self.shared_row_in(table) if self.row is None else (table, self.row)

    def shared_row_in(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """`rows_in` for a table with one row a step, which all samples share.

        Where the host knows the step, the table has this row alone: a kernel then need not read an
        index before the row.
        """
        if self.number is None:
            return table, self.step
        return table[self.number : self.number + 1], None


class Counting:
    """A position that moves on.

    Attributes:
        now: the position that `advance` writes.
        counting: the numbers that grow with the step, int64 `[n]`.
        timesteps: int64 `[m]`, indexed by the first of these numbers.
    """

    now: Position
    counting: Tensor
    timesteps: Tensor

    def __init__(self, now: Position, counting: Tensor, timesteps: Tensor) -> None:
        self.now, self.counting, self.timesteps = now, counting, timesteps

    def advance(self, backend: Backend) -> None:
        """Move to the next step."""
        backend.advance(self.counting, self.timesteps, self.now.t)


class Counters(Counting):
    """Positions of the steps of a plan, and the keys of a batch's noise.

    Attributes:
        now: the position that `rewind` and `advance` write.
        each: after `unroll`, a position for every step, written by `load` alone. A loop that is
            captured as a whole knows its steps and has nothing to count between two of them.
        steps: the number of steps.
    """

    def __init__(self, plan: Plan, batch: int, device: torch.device) -> None:
        model_batch = plan.kind.parts * batch
        own_rows = plan.table.ndim == 3
        seed, sample = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        # One more than the plan has, since the last advance reads it.
        timesteps = torch.zeros(plan.steps + 1, dtype=torch.int64, device=device)

        # The current timesteps and the counters are one tensor, which one copy rewinds.
        begin = aligned(model_batch, torch.int64)
        first_rows = torch.arange(batch if own_rows else 0, device=device) * plan.steps
        self._first = torch.zeros(
            begin + model_batch + len(first_rows), dtype=torch.int64, device=device
        )
        self._first[begin + model_batch :] = first_rows
        self._numbers = self._first.clone()
        counting = self._numbers[begin:]
        step, row = counting[:model_batch], counting[model_batch:]
        now = Position(
            step=step[:1],
            row=row if own_rows else step[:1],
            t=self._numbers[:model_batch],
            keys=Keys(seed, step[:batch], sample),
        )
        super().__init__(now, counting, timesteps)

        self.steps = plan.steps
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.each: Sequence[Position] = ()
        self._tables: tuple[Tensor, ...] = ()
        self._own_rows, self._first_rows = own_rows, first_rows
        # The contents of the keys as the host knows them: one seed, and the first sample index,
        # from which the others follow; None where all indices are 0.
        self._seed: int | None = 0
        self._first_sample: int | None = None

    def unroll(self) -> None:
        """Make the positions of all steps, once."""
        if self.each:
            return
        device, (seed, step, sample) = self.timesteps.device, self.now.keys
        own_rows, batch, model_batch = self._own_rows, len(step), len(self.now.t)
        count = self.steps
        steps, rows, self._t = (
            aligned_rows(count, (width,), torch.int64, device)
            for width in (batch, len(self._first_rows), model_batch)
        )
        index = torch.arange(count, device=device)[:, None]
        steps.copy_(index.expand_as(steps))
        rows.copy_(index + self._first_rows)
        self.each = [
            Position(
                steps[s, :1],
                rows[s] if own_rows else None,
                self._t[s],
                Keys(seed, steps[s], sample),
                number=s,
            )
            for s in range(count)
        ]
        self._tables = (steps, rows, self._t)
        self._load_each()

    def load(self, timesteps: Tensor) -> None:
        """Take over the timesteps `[S]` of a plan, on the CPU."""
        transfer.write(torch.cat([timesteps, timesteps[-1:]]), self.timesteps)
        self._first[: len(self.now.t)] = self.timesteps[0]
        if self.each:
            self._load_each()

    def _load_each(self) -> None:
        self._t.copy_(self.timesteps[: len(self.each), None].expand_as(self._t))

    def load_samples(self, samples: Samples, *, known: bool) -> None:
        """Take over the keys of the samples' noise.

        Args:
            known: whether only this method writes the keys. It then does not write the same values
                again.
        """
        (seed, first), keys = samples, self.now.keys
        number = seed if isinstance(seed, int) else None
        if not known or number is None or number != self._seed:
            philox.write_seed(seed, keys)
        if not known or first != self._first_sample:
            philox.write_sample_indices(first, keys)
        self._seed, self._first_sample = number, first

    def rewind(self) -> None:
        """Move to the first step."""
        self._numbers.copy_(self._first)

    def skip_to(self, step: int) -> None:
        """Move on from the first step to this one."""
        if step > 0:
            # Adding a number makes a new tensor on the CPU; filling one in does not.
            self.counting.add_(self._skipped.fill_(step))
            self.now.t.copy_(self.timesteps[step].expand_as(self.now.t))

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.timesteps, self._first, self._numbers, self._skipped, *self._tables)
        yield from (self.now.keys.seed, self.now.keys.sample)
