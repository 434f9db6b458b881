"""The memory of a stream: a slot for each running request, and the batches that they form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim import philox, transfer
from fastddim.backends import Backend
from fastddim.loop import capture
from fastddim.loop.buffers import Buffers, Inpainting, row_major
from fastddim.loop.capture import Graph
from fastddim.loop.counters import Counting, Position
from fastddim.loop.step import Step
from fastddim.philox import Keys
from fastddim.plan import StepKind, mixing_row, stack_row
from fastddim.stream.conditions import Conditions, check_same_conditions
from fastddim.stream.requests import Request, Route


class Running(NamedTuple):
    """A request that has a slot, and the block of the tables that has its rows."""

    request: Request
    block: int


class Batch(NamedTuple):
    """The first slots, as the batch of a step."""

    buffers: Buffers
    counting: Counting
    numbers: Tensor  # counters, seed and sample
    step: Step
    arguments: tuple[dict[str, Any], ...]

    def take_step(self) -> None:
        self.step.take(
            self.counting.now,
            None,
            arguments=self.arguments,
            masked=self.step.inpainting is not None,
        )

    def sample(self, slot: int) -> Tensor:
        """A copy of the state of one slot, as a batch of its own."""
        return row_major(self.buffers.state[slot : slot + 1])

    def capture(self) -> Graph:
        """The step as a graph; the batch is left as it was."""
        kept = [(tensor, tensor.clone()) for tensor in self._written()]

        def restore() -> None:
            for tensor, values in kept:
                tensor.copy_(values)

        def warm_up() -> None:
            self.take_step()
            restore()

        try:
            device = self.buffers.state.device
            return capture.capture(self.take_step, warm_up=warm_up, device=device)
        finally:
            restore()

    def _written(self) -> list[Tensor]:
        """The tensors that one step leaves to the next."""
        buffers = self.buffers
        given = (buffers.state, self.numbers, self.counting.now.t, buffers.next_input)
        return [tensor for tensor in (*given, buffers.history) if tensor is not None]


class Slots:
    """B slots, of which those in use are the first.

    Attributes:
        conditions: the arguments of the model for each slot; None before the first request.
    """

    conditions: Conditions | None = None

    def __init__(
        self,
        kind: StepKind,
        backend: Backend,
        shape: tuple[int, ...],
        max_steps: int,
        *,
        dtype: torch.dtype,
        model_dtype: torch.dtype,
        device: torch.device,
        channels_last: bool,
        masked: bool,
        whole: bool,
        prepare: Callable[[Step], None],
    ) -> None:
        """
        Args:
            masked: whether requests have masks.
            whole: whether every batch has all slots, as a captured one has.
            prepare: gives a new `Step` its model and the other functions that it calls.
        """
        self._kind, self._backend = kind, backend
        self._max_steps = max_steps
        self._whole, self._prepare = whole, prepare
        batch, model_batch = shape[0], kind.parts * shape[0]
        # A captured batch steps slots without a request too. Their counters advance through rows of
        # their own, as many as a request may have; the next change of the batch sets them back.
        self._idle_row = batch * max_steps
        rows = self._idle_row + max_steps + 1
        self.buffers = Buffers.allocate(
            kind,
            shape,
            rows,
            dtype=dtype,
            model_dtype=model_dtype,
            device=device,
            channels_last=channels_last,
            with_x_0=False,
        )
        idle = transfer.upload(stack_row(mixing_row(1.0, 0.0)), device)
        for table in (self.buffers.table, self.buffers.first_half):
            if table is not None:
                table[self._idle_row :].copy_(idle)
        self._inpainting = Inpainting.allocate(self.buffers, rows) if masked else None
        self._timesteps = torch.zeros(rows, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(model_batch + 3 * batch, dtype=torch.int64, device=device)
        self._t = torch.zeros(model_batch, dtype=torch.int64, device=device)
        self._batches: dict[int, Batch] = {}

    def tensors(self) -> Iterator[Tensor]:
        yield from self.buffers.tensors()
        yield from (self._timesteps, self._numbers, self._t, *(self._inpainting or ()))
        for batch in self._batches.values():
            yield from batch.step.tensors()
        if self.conditions is not None:
            yield from (*self.conditions.slots, *self.conditions.inputs)

    def take_conditions(self, arguments: tuple[dict[str, Any], ...]) -> None:
        """Allocate memory for arguments like the first request's, and refuse any other kind."""
        if self.conditions is None:
            batch = len(self.buffers.state)
            self.conditions = Conditions(arguments, batch, self._kind.parts)
        else:
            check_same_conditions(arguments, self.conditions)

    def load(self, slot: int, running: Running) -> None:
        """Write a request into its slot and its block of the tables."""
        request, block = running
        start, inpainting = self.buffers.state[slot : slot + 1], self._inpainting
        # A state in the middle of a run is not the latents that known data are mixed with.
        resumed = request.ticket.taken > 0 and inpainting is not None
        if request.x_T is None or resumed:
            words = (request.seed, 0, request.sample)
            keys = Keys(*(transfer.filled(word, 1, start.device) for word in words))
            self._backend.normal_out(keys, philox.LATENTS, start)
        with request.ready.use(lambda: request.tensors):
            if request.x_T is not None and not resumed:
                start.copy_(request.x_T)
            if inpainting is not None and request.inpainting is not None:
                inpainting.x_T[slot].copy_(start[0])
                for store, given in zip(inpainting, request.inpainting, strict=False):
                    store[slot].copy_(given[0])
            if request.x_T is not None and resumed:
                start.copy_(request.x_T)
            if self.conditions is not None:
                self.conditions.put(request.conditions, slot)
        if self.buffers.history is not None:
            self.buffers.history[slot].zero_()
        first = block * self._max_steps
        self._load_tables(request.route, slice(first, first + request.ticket.steps))

    def _load_tables(self, route: Route, rows: slice) -> None:
        device = self._timesteps.device
        tables = [(self.buffers.table, route.rows), (self._timesteps, route.timesteps)]
        if self.buffers.first_half is not None and route.first_half is not None:
            tables.append((self.buffers.first_half, route.first_half))
        for table, values in tables:
            table[rows].copy_(transfer.upload(values, device))
        if self._inpainting is not None:
            self._inpainting.load_rows(route.alphas_cumprod, rows)

    def release(self, slot: int, last: int) -> None:
        """Free a slot; the last one in use moves into it."""
        buffers, inpainting = self.buffers, self._inpainting
        if slot != last:
            stores = [buffers.state, buffers.history]
            stores += [] if self.conditions is None else self.conditions.slots
            stores += [] if inpainting is None else inpainting[:3]
            for store in stores:
                if store is not None:
                    store[slot].copy_(store[last])
        if inpainting is not None:
            inpainting.mask[last].zero_()

    def compose(self, running: Sequence[Running]) -> Batch:
        """The batch of these requests, ready for its next step."""
        size = len(self.buffers.state) if self._whole else len(running)
        if size not in self._batches:
            self._batches[size] = self._batch(size)
        batch, device = self._batches[size], self._t.device
        numbers = torch.tensor(self._numbers_of(running, size), device="cpu")
        batch.numbers.copy_(transfer.upload(numbers, device))
        batch.counting.advance(self._backend)
        batch.buffers.state[len(running) :].zero_()
        batch.buffers.write_input()
        if self.conditions is not None:
            self.conditions.arrange(size)
        return batch

    def _numbers_of(self, running: Sequence[Running], size: int) -> list[int]:
        """Row, step, seed and sample of each slot; rows and steps are those of one step before."""
        idle = size - len(running)
        rows = [block * self._max_steps + request.ticket.taken for request, block in running]
        return [
            *[row - 1 for row in [*rows, *[self._idle_row] * idle]] * self._kind.parts,
            *[request.ticket.taken - 1 for request, _ in running],
            *[-1] * idle,
            *[request.seed for request, _ in running],
            *[0] * idle,
            *[request.sample for request, _ in running],
            *[0] * idle,
        ]

    def _batch(self, size: int) -> Batch:
        model_size = self._kind.parts * size
        numbers = self._numbers[: model_size + 3 * size]
        row, step, seed, sample = numbers.split([model_size, size, size, size])
        now = Position(
            step=row[:size], row=row[:size], t=self._t[:model_size], keys=Keys(seed, step, sample)
        )
        counting = Counting(now, numbers[: model_size + size], self._timesteps)
        buffers = self.buffers.first(size)
        taking = Step(self._kind, self._backend, buffers, counting, captured=self._whole)
        taking.shape = tuple(self.buffers.state.shape)
        taking.inpainting = None if self._inpainting is None else self._inpainting.first(size)
        self._prepare(taking)
        assert self.conditions is not None
        return Batch(buffers, counting, numbers, taking, self.conditions.of(size))
