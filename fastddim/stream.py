"""Continuous batching: requests that come and go share one batch, each at a step of its own.

Every sample reads its row of one coefficient table and is keyed by its own seed, step and index.
So what a step does to a sample depends neither on the others nor on its place in the batch, and a
request gives what `fastddim.sample` gives for it alone, as far as the model does.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map_only,
    tree_unflatten,
)

from fastddim import adapter, backends, graph, philox, transfer
from fastddim.adapter import Model
from fastddim.graph import check_graph
from fastddim.philox import Keys
from fastddim.plan import ORDERS, PerStep, Row, Update, make_plan, mixing_row, stack_row, to_table
from fastddim.reference import compute_dtype
from fastddim.sampler import (
    check_initial,
    check_model,
    check_model_kwargs,
    resolve_device,
    resolve_schedule,
    resolve_shape,
)
from fastddim.schedule import Schedule
from fastddim.validation import (
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_int,
    check_model_output,
    check_sample_range,
    signed_bits,
)

_REMEMBERED_PLANS = 64


class Ticket(Future[Tensor]):
    """A request to a `Stream`, as a `concurrent.futures.Future` of its sample `[1, …]`.

    `result()` waits for another thread to take the steps; where there is none, call `Stream.run`
    or `Stream.step` first. `cancel()` works until the sample is there, also once steps have been
    taken, and the slot is free at the next step. `asyncio.wrap_future` makes it awaitable.

    Attributes:
        index: how many requests the stream got before.
        steps: S of the request.
        taken: how many of them have been taken.
    """

    def __init__(self, index: int, steps: int) -> None:
        super().__init__()
        self.index = index
        self.steps = steps
        self.taken = 0


class _Walk(NamedTuple):
    """Where a request goes and with which numbers."""

    rows: Tensor  # [S, K] in the dtype that is computed in
    timesteps: Tensor  # [S]


@dataclass(frozen=True, eq=False)
class _Request:
    ticket: Ticket
    walk: _Walk
    seed: int  # its 64 bits, signed
    sample: int
    x_T: Tensor | None  # [1, …]
    conditions: list[Tensor]  # [1 or 2, …], the tensors of its model_kwargs
    ready: graph.Turns  # when the tensors are


class _Running(NamedTuple):
    request: _Request
    block: int  # of the table

    @property
    def ticket(self) -> Ticket:
        return self.request.ticket


class _Conditions:
    """The tensors of `model_kwargs`, a row or a pair of rows for each slot."""

    def __init__(self, model_kwargs: Mapping[str, Any], batch: int, parts: int) -> None:
        self.signature = graph.signature(model_kwargs)
        self._parts = parts
        leaves, self._structure = tree_flatten(dict(model_kwargs))
        self.slots = [v.new_zeros((batch, *v.shape)) for v in leaves if isinstance(v, Tensor)]
        # Under guidance the model reads all first rows, then all second ones.
        self.inputs = [
            store.flatten(0, 1) if parts == 1 else torch.zeros_like(store.flatten(0, 1))
            for store in self.slots
        ]
        inputs = iter(self.inputs)
        self._leaves = [next(inputs) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def put(self, conditions: Sequence[Tensor], slot: int) -> None:
        for store, value in zip(self.slots, conditions, strict=True):
            store[slot].copy_(value)

    def arrange(self, size: int) -> None:
        """Make the first `size` slots what the model reads."""
        if self._parts == 1:
            return
        for store, given in zip(self.slots, self.inputs, strict=True):
            for part in range(self._parts):
                given[part * size : (part + 1) * size].copy_(store[:size, part])

    def of(self, size: int) -> dict[str, Any]:
        """`model_kwargs` of the first `size` slots."""
        rows = self._parts * size
        leaves = [leaf[:rows] if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        kwargs: dict[str, Any] = tree_unflatten(leaves, self._structure)
        return kwargs


class _Batch(NamedTuple):
    """What a step of some samples reads and writes: views of the first rows of the buffers."""

    numbers: Tensor  # counters, seed and sample
    counters: Tensor  # row, once for each part of the model's batch, and step
    row: Tensor  # [b]
    keys: Keys
    t: Tensor  # [b or 2b]
    state: Tensor
    model_input: Tensor
    next_input: Tensor | None
    history: Tensor | None
    fitted: Tensor | None  # [b, K]
    each: Tensor  # [b]
    model_kwargs: dict[str, Any]


class Stream:
    """Many requests in one batch of constant memory, each with its own number of steps, η, seed,
    guidance scale and time of arrival.

    `submit` queues a request for one sample and returns its `Ticket`; `step` gives free slots to
    waiting requests, in the order of arrival, and takes one step of every request that has a slot.
    A request gives the sample that `fastddim.sample` gives for the same arguments and
    `batch_size=1`, bit for bit where the model's output for a sample does not depend on the batch.

    Where there is no CUDA graph, the model is evaluated on as many samples as have a slot, from 1
    to B. A captured graph always runs B: slots without a request then hold zeros at timestep 0,
    with the `model_kwargs` that they held last, and a step that leaves the state as it is.

    Threads: `submit` and everything of a `Ticket` may be called from any thread, at any time.
    `step` (and `run` and iteration, which call it) is for one thread at a time, and refuses others.

    What a batch cannot mix is not taken: noise of the caller's and generators (a kernel draws all
    noise of a batch, or reads all), and `mask`, `denoised_fn` and callbacks, for which there is
    `fastddim.sample`. Thresholding and `guidance_rescale` are one for all requests, as is `order`.
    """

    # A buffer made under the caller's inference mode could not be written to outside it.
    @torch.inference_mode(False)
    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        shape: Sequence[int] | None = None,
        max_steps: int | None = None,
        max_pending: int | None = None,
        guided: bool = False,
        schedule: Schedule | None = None,
        prediction: str = "epsilon",
        guidance_rescale: float = 0.0,
        dynamic_thresholding_ratio: float | None = None,
        sample_max_value: float | None = None,
        order: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        graph: str | bool = "auto",
        check_finite: bool = False,
    ) -> None:
        """
        Arguments not named here are those of `fastddim.sample`.

        Args:
            batch_size: B, how many requests have a slot at once.
            shape: (B, …) of the state; by default B samples of the shape that the model tells.
            max_steps: the most steps that a request may have, at most T, the default; B·max_steps
                rows of coefficients are kept.
            max_pending: how many requests may wait for a slot; None is no limit.
            guided: whether the model is evaluated on 2B samples and every request has a
                `guidance_scale`.
            order: 2 leaves no request with eta > 0.
            graph: "auto", True or False, as in `fastddim.sample`.
            check_finite: fail a request, and it alone, at the step where the model returns NaN or
                infinity for it. This waits for the device at every step.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
        """
        check_model(model)
        check_bool("guided", guided)
        check_bool("check_finite", check_finite)
        self.shape = _slots_shape(model, shape, batch_size)
        self.dtype = torch.float32 if dtype is None else check_dtype("dtype", dtype)
        self.device = resolve_device(model, device)
        if graph == "loop":
            raise ValueError("graph: expected 'auto', True or False, got 'loop'")
        check_graph(graph, self.device, check_finite)
        schedule = resolve_schedule(model, schedule)
        self.max_steps = check_int(
            "max_steps", schedule.T if max_steps is None else max_steps, 1, schedule.T
        )
        self.max_pending = (
            None if max_pending is None else check_int("max_pending", max_pending, 1, 2**62)
        )
        update = Update(
            prediction=prediction,
            guidance_scale=1.0 if guided else None,
            guidance_rescale=guidance_rescale,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
        ).checked(1)
        check_choice("order", order, ORDERS)
        self._walk = partial(_walk, schedule, update, order, self.dtype, self.max_steps)
        self._remembered_walk = lru_cache(_REMEMBERED_PLANS, typed=True)(self._walk)

        self._model = model
        self._backend = backends.choose(impl, self.device)
        self._fit = update.fit
        self._parts = 2 if guided else 1
        self._check_finite = check_finite
        self._graph = graph
        self._noisy = order == 1
        self._pending: deque[_Request] = deque()
        self._running: list[_Running] = []
        self._blocks = list(range(self.shape[0]))
        self._indices = itertools.count()
        self._queue_lock = threading.Lock()
        self._idle = threading.Lock()
        self._allocate(order)

    def submit(
        self,
        steps: int | Sequence[int] | Tensor,
        *,
        spacing: str = "uniform",
        steps_offset: int = 0,
        eta: PerStep = 0.0,
        variance: str = "small",
        clip: float | None = None,
        rederive_eps: bool = False,
        guidance_scale: PerStep | None = None,
        temperature: PerStep = 1.0,
        seed: int = 0,
        sample_offset: int = 0,
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Ticket:
        """Queue a request for one sample.

        Arguments not named here are those of `fastddim.sample`. Tensors are copied.

        Args:
            guidance_scale: a number or one a step where the stream is guided, else None.
            seed: int in [0, 2⁶⁴).
            sample_offset: which sample of the seed.
            x_T: starting state `[1, …]`, of the stream's dtype and on its device; by default drawn
                from the seed.
            model_kwargs: as in `fastddim.sample` for one sample: tensors `[1, …]`, or `[2, …]`
                where the stream is guided, on the stream's device, which become rows of the batch.
                Names, shapes, dtypes and all that is not a tensor must be those of the stream's
                first request; what all requests share belongs into the model, as by
                `functools.partial`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            queue.Full: `max_pending` requests are waiting.
        """
        guided = self._parts == 2
        if guided != (guidance_scale is not None):
            raise ValueError(
                f"guidance_scale: expected {'a number' if guided else 'None'} in a stream with "
                f"guided={guided}, got {guidance_scale!r}"
            )
        kind = (
            *(steps, spacing, steps_offset, eta, variance, clip, rederive_eps),
            *(guidance_scale, temperature),
        )
        plain = all(isinstance(v, int | float | str | None) for v in kind)
        walk = (self._remembered_walk if plain else self._walk)(*kind)
        word = signed_bits(check_int("seed", seed, 0, 2**64 - 1))
        check_sample_range(sample_offset, 1, per_sample_seed=False)
        if x_T is not None:
            check_initial("x_T", x_T, (1, *self.shape[1:]), self.dtype, self.device)
        kwargs = self._checked_kwargs(model_kwargs)
        with torch.inference_mode(False), torch.no_grad():
            x_T = None if x_T is None else x_T.clone()
            kwargs = tree_map_only(Tensor, _copy, kwargs)
            conditions = [leaf for leaf in tree_flatten(kwargs)[0] if isinstance(leaf, Tensor)]
            with self._queue_lock:
                self._make_room()
                self._take_signature(kwargs)
                ticket = Ticket(next(self._indices), len(walk.timesteps))
                ready = graph.Turns(self.device)
                self._pending.append(
                    _Request(ticket, walk, word, int(sample_offset), x_T, conditions, ready)
                )
        return ticket

    def step(self) -> list[Ticket]:
        """Take one step of every request that has a slot, and give the tickets that are done.

        They come in the order of their `index`. A ticket is done with a sample, its `result()`, or
        with an error, its `exception()`, which `result()` raises: where the model raises, that is
        every request in the batch, and the stream goes on with those that wait. Cancelled ones are
        left out. Without requests nothing happens.

        Raises:
            RuntimeError: another call is not over.
            ValueError: the caller is capturing a CUDA graph, which cannot hold one of the stream's.
        """
        graph.check_outer_capture(self._graph, self.device, self._check_finite)
        with (
            self._alone(),
            self._turns.turn(self._tensors),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                self._drop_cancelled()
                self._admit()
                return self._take_step() if self._running else []
            except Exception as error:
                return self._fail_all(error)
            except BaseException as error:
                self._fail_all(error)
                raise

    def run(self) -> list[Ticket]:
        """Step until no request is left; the tickets in the order in which they were done."""
        return list(self)

    def __iter__(self) -> Iterator[Ticket]:
        """Step until no request is left, also those that come meanwhile."""
        while self.pending or self.running:
            yield from self.step()

    @property
    def pending(self) -> int:
        """How many requests wait for a slot, with those that were cancelled meanwhile."""
        return len(self._pending)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._running)

    def _allocate(self, order: int) -> None:
        batch, model_batch = self.shape[0], self._parts * self.shape[0]
        own = adapter.own_dtype(self._model) or self.dtype
        self._state = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        separate = self._parts > 1 or own != self.dtype
        self._next_input = (
            self._state.new_zeros((model_batch, *self.shape[1:]), dtype=own) if separate else None
        )
        self._history = torch.zeros_like(self._state, dtype=own) if order > 1 else None
        # Counters of slots without a request run on through rows of their own, from where a change
        # of the batch, which is never further away, takes them back.
        self._idle_row = batch * self.max_steps
        rows = self._idle_row + self.max_steps + 1
        dtype = compute_dtype(self.dtype)
        self._table = self._state.new_zeros((rows, len(Row._fields)), dtype=dtype)
        idle = stack_row(mixing_row(1.0, 0.0))
        self._table[self._idle_row :].copy_(transfer.upload(idle, self.device))
        self._timesteps = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._numbers = torch.zeros(model_batch + 3 * batch, dtype=torch.int64, device=self.device)
        self._t = torch.zeros(model_batch, dtype=torch.int64, device=self.device)
        self._fitted = None if self._fit is None else torch.zeros_like(self._table[:batch])
        self._each = torch.arange(batch, device=self.device)
        self._conditions: _Conditions | None = None
        self._batches: dict[int, _Batch] = {}
        self._composed = False
        captures = graph.available(self.device) and not self._check_finite
        self._static = captures if self._graph == "auto" else bool(self._graph)
        self._model_state = graph.ModelState(self._model)
        self._parameters: Any = None
        # None: cannot be captured.
        self._programs: graph.Recent[graph.Graph | None] = graph.Recent()
        self._turns = graph.Turns(self.device)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self._state, self._table, self._timesteps, self._numbers, self._t, self._each)
        extras = (self._next_input, self._history, self._fitted)
        yield from (tensor for tensor in extras if tensor is not None)
        if self._conditions is not None:
            yield from (*self._conditions.slots, *self._conditions.inputs)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._idle.acquire(blocking=False):
            raise RuntimeError(
                "Stream: expected one call of step at a time, got another from a callback or a "
                "thread"
            )
        try:
            yield
        finally:
            self._idle.release()

    def _checked_kwargs(self, model_kwargs: Any) -> dict[str, Any]:
        kwargs = check_model_kwargs(model_kwargs)
        for path, leaf in tree_flatten_with_path(kwargs)[0]:
            if not isinstance(leaf, Tensor):
                continue
            name = f"model_kwargs{keystr(path)}"
            if leaf.ndim == 0 or leaf.shape[0] != self._parts:
                raise ValueError(
                    f"{name}: expected a tensor [{self._parts}, ...], got shape {tuple(leaf.shape)}"
                )
            check_device(name, leaf, "the state", self.device)
        return kwargs

    def _take_signature(self, kwargs: dict[str, Any]) -> None:
        if self._conditions is None:
            self._conditions = _Conditions(kwargs, self.shape[0], self._parts)
        elif graph.signature(kwargs) != self._conditions.signature:
            raise ValueError(
                "model_kwargs: expected the names, shapes, dtypes and plain values of the stream's "
                f"first request, got {_described(kwargs)}"
            )

    def _make_room(self) -> None:
        if self.max_pending is None or len(self._pending) < self.max_pending:
            return
        for request in [r for r in self._pending if r.ticket.cancelled()]:
            self._pending.remove(request)
            request.ticket.set_running_or_notify_cancel()
        if len(self._pending) >= self.max_pending:
            raise queue.Full(
                f"max_pending: expected at most {self.max_pending} waiting requests, got another"
            )

    def _drop_cancelled(self) -> None:
        for slot in reversed(range(len(self._running))):
            ticket = self._running[slot].ticket
            if ticket.cancelled():
                self._release(slot)
                ticket.set_running_or_notify_cancel()

    def _admit(self) -> None:
        while len(self._running) < self.shape[0]:
            with self._queue_lock:
                if not self._pending:
                    return
                request = self._pending.popleft()
                # Asked once: a ticket may be cancelled at any time.
                cancelled = request.ticket.cancelled()
                if not cancelled:
                    self._running.append(_Running(request, self._blocks.pop()))
            if cancelled:
                request.ticket.set_running_or_notify_cancel()
            else:
                self._load(len(self._running) - 1)

    def _load(self, slot: int) -> None:
        """Put the request of `slot` where a step finds it."""
        self._composed = False
        request, block = self._running[slot]
        start = self._state[slot : slot + 1]
        if request.x_T is None:
            words = (request.seed, 0, request.sample)
            keys = Keys(*(transfer.filled(word, 1, self.device) for word in words))
            self._backend.normal_out(keys, philox.LATENTS, start)
        tensors = [*request.conditions, *([] if request.x_T is None else [request.x_T])]
        with request.ready.turn(lambda: tensors):
            if request.x_T is not None:
                start.copy_(request.x_T)
            if self._conditions is not None:
                self._conditions.put(request.conditions, slot)
        if self._history is not None:
            self._history[slot].zero_()
        rows = slice(block * self.max_steps, block * self.max_steps + request.ticket.steps)
        self._table[rows].copy_(transfer.upload(request.walk.rows, self.device))
        self._timesteps[rows].copy_(transfer.upload(request.walk.timesteps, self.device))

    def _release(self, slot: int) -> None:
        """Free a slot; the last one moves into it, so that those in use are the first ones."""
        self._composed = False
        last = len(self._running) - 1
        if slot != last:
            stores = [self._state, self._history]
            stores += [] if self._conditions is None else self._conditions.slots
            for store in stores:
                if store is not None:
                    store[slot].copy_(store[last])
        self._blocks.append(self._running[slot].block)
        self._running[slot] = self._running[last]
        self._running.pop()

    def _compose(self) -> _Batch:
        """The batch of the requests that have a slot, ready for its next step."""
        size = self.shape[0] if self._static else len(self._running)
        if size not in self._batches:
            self._batches[size] = self._views(size)
        batch = self._batches[size]
        if self._composed:
            return batch
        idle = size - len(self._running)
        running = self._running
        rows = [block * self.max_steps + request.ticket.taken for request, block in running]
        numbers = [
            *[row - 1 for row in [*rows, *[self._idle_row] * idle]] * self._parts,
            *[request.ticket.taken - 1 for request, _ in running],
            *[-1] * idle,
            *[request.seed for request, _ in running],
            *[0] * idle,
            *[request.sample for request, _ in running],
            *[0] * idle,
        ]
        batch.numbers.copy_(transfer.upload(torch.tensor(numbers, device="cpu"), self.device))
        self._backend.advance(batch.counters, self._timesteps, batch.t)
        batch.state[len(running) :].zero_()
        if batch.next_input is not None:
            for part in batch.next_input.chunk(self._parts):
                part.copy_(batch.state)
        if self._conditions is not None:
            self._conditions.arrange(size)
        self._composed = True
        return batch

    def _views(self, size: int) -> _Batch:
        model_size = self._parts * size
        numbers = self._numbers[: model_size + 3 * size]
        row, step, seed, sample = numbers.split([model_size, size, size, size])
        state = self._state[:size]
        next_input = None if self._next_input is None else self._next_input[:model_size]
        return _Batch(
            numbers=numbers,
            counters=numbers[: model_size + size],
            row=row[:size],
            keys=Keys(seed, step, sample),
            t=self._t[:model_size],
            state=state,
            model_input=state if next_input is None else next_input,
            next_input=next_input,
            history=None if self._history is None else self._history[:size],
            fitted=None if self._fitted is None else self._fitted[:size],
            each=self._each[:size],
            model_kwargs={} if self._conditions is None else self._conditions.of(size),
        )

    def _take_step(self) -> list[Ticket]:
        batch = self._compose()
        program = self._program(batch)
        broken: set[int] = set()
        if program is not None:
            program.replay()
        else:
            output = self._evaluate(batch)
            if self._check_finite:
                broken = _nonfinite_samples(output, self._parts)
            self._update(batch, output)
        done = []
        for slot, (request, _) in enumerate(self._running):
            ticket = request.ticket
            last = ticket.taken + 1 == ticket.steps
            if slot in broken:
                _settle(ticket, _nonfinite_error(request))
            elif last:
                _settle(ticket, batch.state[slot : slot + 1].clone())
            if slot in broken or last:
                done.append(slot)
            ticket.taken += 1
        tickets = [self._running[slot].ticket for slot in done]
        for slot in reversed(done):
            self._release(slot)
        return _in_order(tickets)

    def _evaluate(self, batch: _Batch) -> Tensor:
        result = self._model(batch.model_input, batch.t, **batch.model_kwargs)
        return check_model_output(
            "model output", adapter.output_tensor(result), batch.state, guided=self._parts == 2
        )

    def _update(self, batch: _Batch, output: Tensor) -> None:
        table, row = self._table, batch.row
        if self._fit is not None and batch.fitted is not None:
            self._backend.fit_rows(batch.state, output, table, row, self._fit, batch.fitted)
            table, row = batch.fitted, batch.each
        self._backend.update_out(
            batch.state,
            output,
            table,
            row,
            noise=None,
            keys=batch.keys if self._noisy else None,
            history=batch.history,
            out=batch.state,
            x_0=None,
            model_input=batch.next_input,
            epsilon=batch.history,
        )
        self._backend.advance(batch.counters, self._timesteps, batch.t)

    def _fail_all(self, error: BaseException) -> list[Ticket]:
        """Give every request that has a slot the error, and all slots free."""
        failed, self._running = self._running, []
        self._blocks = list(range(self.shape[0]))
        self._composed = False
        indices = sorted(running.ticket.index for running in failed)
        for request, _ in failed:
            others = [str(i) for i in indices if i != request.ticket.index]
            _settle(request.ticket, _batch_error(request, others, error))
        return _in_order([running.ticket for running in failed])

    def _program(self, batch: _Batch) -> graph.Graph | None:
        """The captured step; None where steps are eager."""
        if not self._static or transfer.captured(self.device):
            return None
        parameters, training = self._model_state.read()
        if parameters != self._parameters:
            # Their graphs read memory that is no longer the model's.
            self._programs.clear()
            self._parameters = parameters
        kind = (training, graph.ambient(self.device))
        program = self._programs.get(kind)
        if kind not in self._programs:
            program = self._try_capture(batch)
        self._programs.put(kind, program)
        return program

    def _try_capture(self, batch: _Batch) -> graph.Graph | None:
        written = [batch.state, batch.numbers, batch.t, batch.next_input, batch.history]
        kept = [(tensor, tensor.clone()) for tensor in written if tensor is not None]

        def body() -> None:
            self._update(batch, self._evaluate(batch))

        def restore() -> None:
            for tensor, values in kept:
                tensor.copy_(values)

        def warm_up() -> None:
            body()
            restore()

        try:
            return graph.capture_if_possible(
                self._graph,
                lambda: graph.capture(body, warm_up=warm_up, device=self.device),
            )
        finally:
            restore()


def _walk(
    schedule: Schedule,
    common: Update,
    order: int,
    dtype: torch.dtype,
    max_steps: int,
    steps: Any,
    spacing: str,
    steps_offset: int,
    eta: Any,
    variance: str,
    clip: float | None,
    rederive_eps: bool,
    guidance_scale: Any,
    temperature: Any,
) -> _Walk:
    update = Update(
        eta,
        variance,
        common.prediction,
        clip,
        rederive_eps,
        guidance_scale,
        temperature,
        common.guidance_rescale,
        common.dynamic_thresholding_ratio,
        common.sample_max_value,
    ).checked(1, per_step=True)
    plan = make_plan(
        schedule, steps, update, spacing=spacing, steps_offset=steps_offset, order=order
    )
    if plan.steps > max_steps:
        raise ValueError(f"steps: expected at most max_steps = {max_steps}, got {plan.steps}")
    return _Walk(to_table(plan.table, compute_dtype(dtype), plan.table.device), plan.timesteps)


def _slots_shape(
    model: Model, shape: Sequence[int] | None, batch_size: int | None
) -> tuple[int, ...]:
    if shape is None and batch_size is None:
        raise ValueError("batch_size: expected the number of slots, or shape, got None for both")
    resolved = resolve_shape(model, shape, 1 if batch_size is None else batch_size)
    check_int("shape[0]", resolved[0], 1, 2**32)
    return resolved


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _settle(ticket: Ticket, outcome: Tensor | BaseException) -> None:
    """Give a ticket its outcome, unless it was cancelled, or settled before an interrupt."""
    with suppress(InvalidStateError):
        if not (ticket.done() or ticket.running()) or ticket.cancelled():
            ticket.set_running_or_notify_cancel()
        if isinstance(outcome, Tensor):
            ticket.set_result(outcome)
        else:
            ticket.set_exception(outcome)


def _in_order(tickets: list[Ticket]) -> list[Ticket]:
    done = [ticket for ticket in tickets if not ticket.cancelled()]
    return sorted(done, key=lambda ticket: ticket.index)


def _nonfinite_samples(output: Tensor, parts: int) -> set[int]:
    finite = output.isfinite()
    finite = finite.flatten(1).all(dim=1) if finite.ndim > 1 else finite
    return {b for b, whole in enumerate(finite.reshape(parts, -1).all(dim=0).tolist()) if not whole}


def _where(request: _Request) -> str:
    s = request.ticket.taken
    return f"at step {s} (timestep {int(request.walk.timesteps[s])})"


def _nonfinite_error(request: _Request) -> ValueError:
    return ValueError(
        f"model output: expected finite values, got NaN or infinity {_where(request)}"
    )


def _batch_error(request: _Request, others: list[str], error: BaseException) -> RuntimeError:
    beside = f", in a batch with {', '.join(others)}" if others else ""
    named = RuntimeError(
        f"request {request.ticket.index} failed {_where(request)}{beside}: "
        f"{type(error).__name__}: {error}"
    )
    named.__cause__ = error
    return named


def _described(kwargs: dict[str, Any]) -> str:
    shown = tree_map_only(Tensor, lambda v: f"{v.dtype} {tuple(v.shape)}", kwargs)
    return repr(shown)
