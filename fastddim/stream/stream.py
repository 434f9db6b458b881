"""Continuous batching: requests that come and go share one batch, each at a step of its own.

Every sample reads its row of one coefficient table and is keyed by its own seed, step and index.
So the update of a sample depends neither on the other samples nor on its place in the batch. A
request gives the sample of `fastddim.sample` if the model, too, treats each sample alone.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddim import backends, transfer
from fastddim.adapter import check_model, is_channels_last, warn_of_training
from fastddim.loop.capture import Graph, check_outer_capture
from fastddim.loop.copying import Rebuilt
from fastddim.loop.describing import described_model, described_placement
from fastddim.loop.first_weight import first_weights
from fastddim.loop.modes import OneAtATime, without_autograd
from fastddim.loop.outside import outside_of_programs
from fastddim.loop.programs import Programs
from fastddim.loop.setup import (
    captures,
    check_denoised_fn,
    check_uncond_model,
    resolve_model_dtype,
    resolve_placement,
    resolve_schedule,
    resolve_shape,
)
from fastddim.loop.step import Step
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import RequestOptions, StreamOptions, Update
from fastddim.plan import ORDERS, StepKind
from fastddim.signatures import method_takes, shared
from fastddim.stream.requests import Request, Requests
from fastddim.stream.slots import Batch, Running, Slots
from fastddim.stream.tickets import Ticket, in_order, settle
from fastddim.transforms import check_sampler_unfollowed
from fastddim.validation import (
    check_bool,
    check_choice,
    check_int,
)


class Stream(Rebuilt):
    """Many requests in one batch of constant memory, each with its own number of steps, η, seed,
    guidance scale and time of arrival.

    `submit` queues a request for one sample and returns its `Ticket`; `step` gives free slots to
    waiting requests, in the order of arrival, and takes one step of every request that has a slot.
    A request gives the sample that `fastddim.sample` gives for the same arguments and
    `batch_size=1`, bit for bit where the model's output for a sample does not depend on the batch.

    Without a CUDA graph, the model is evaluated on as many samples as have a slot, from 1 to B. A
    captured graph always runs B: slots without a request then hold zeros at timestep 0, with the
    `model_kwargs` that they held last, and take a step that leaves the state unchanged.

    Threads: `submit` and all methods of a `Ticket` may be called from any thread, at any time.
    `step` (and `run` and iteration, which call it) is for one thread at a time, and refuses others.

    A kernel does some things for all samples of a batch or for none. So either all requests of a
    stream have guidance, or none has (`guided`); the same holds for masks (`masked`). Thresholding,
    `guidance_rescale`, `order` and `denoised_fn` are options of the stream. For noise from a tensor
    or a generator, use `fastddim.sample`.

    A copy or a pickle of a stream without requests is a new stream, with a copy of the model like
    that of a `fastddim.Sampler`. Requests cannot be copied.
    """

    # A buffer made under the caller's inference mode could not be written to outside it.
    @method_takes(StreamOptions)
    @torch.inference_mode(False)
    def __init__(self, options: StreamOptions) -> None:
        """
        Arguments not named here are those of `fastddim.sample`.

        Args:
            batch_size: B, the number of slots: the most requests that run at once.
            shape: (B, …) of the state; by default B samples of the shape that the model tells.
            max_steps: the most steps of a request; T by default, which is also the most. The stream
                keeps B·max_steps rows of coefficients.
            max_pending: the most requests that may wait for a slot; None for no limit.
            guided: whether every request has a `guidance_scale`. The model is then evaluated on 2B
                samples, or on B where `uncond_model` is evaluated on the other half.
            masked: whether every request has a `mask` and `known` data.
            denoised_fn: called with the predicted x_0 of the whole batch; no request then has
                `rederive_eps`.
            order: 1 or 2. A stream of order 2 refuses eta > 0, and takes requests with tuned steps
                too.
            graph: "auto", True or False, as in `fastddim.sample`.
            check_finite: fail a request at the step where the model returns NaN or infinity for it,
                and go on with the others. This waits for the device at every step.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
        """
        check_sampler_unfollowed()
        check_model(options.model)
        check_bool("guided", options.guided)
        check_bool("masked", options.masked)
        check_denoised_fn(options.denoised_fn)
        self.shape = _slots_shape(options)
        warn_of_training("model", options.model)
        if options.graph == "loop":
            raise ValueError("graph: expected 'auto', True or False, got 'loop'")
        self.dtype, self.device = resolve_placement(options, options.model)
        schedule = resolve_schedule(options.model, options.schedule)
        most = schedule.T if options.max_steps is None else options.max_steps
        self.max_steps = check_int("max_steps", most, 1, schedule.T)
        pending = options.max_pending
        self.max_pending = None if pending is None else check_int("max_pending", pending, 1, 2**62)
        guidance_scale = 1.0 if options.guided else None
        update = shared(Update, options, guidance_scale=guidance_scale).checked(1)
        check_choice("order", options.order, ORDERS)

        self._options = options
        self._schedule = schedule
        self._model_dtype = resolve_model_dtype(options.model, options.model_dtype, self.dtype)
        self._channels_last = is_channels_last(options.model, len(self.shape))
        if options.uncond_model is not None:
            check_uncond_model(
                options.uncond_model, options, options.guided, self._model_dtype, self.device
            )
            warn_of_training("uncond_model", options.uncond_model)
        self._weights = first_weights("Stream", options.model, options.uncond_model, self.device)
        self._kind = StepKind(
            rescaling=update.rescaling,
            noisy=options.order == 1,
            guided=options.guided,
            history=options.order - 1,
            split=options.denoised_fn is not None,
            apart=options.uncond_model is not None,
        )
        self._rebuild()

    @torch.inference_mode(False)
    def _build(self) -> None:
        options = self._options
        self._backend = backends.choose(options.impl, self.device)
        self._static = captures(options.graph, self.device, options.check_finite)
        self._requests = Requests(
            options,
            self._kind,
            self._schedule,
            self.shape,
            self.max_steps,
            dtype=self.dtype,
            device=self.device,
        )
        self._slots = Slots(
            self._kind,
            self._backend,
            self.shape,
            self.max_steps,
            dtype=self.dtype,
            model_dtype=self._model_dtype,
            device=self.device,
            channels_last=self._channels_last,
            masked=options.masked,
            whole=self._static,
            prepare=self._prepare,
        )
        self._programs: Programs[Graph] = Programs(options.graph, self.device)
        self._programs.follow(*self._functions())
        self._order = StreamOrder(self.device)

        self._pending: deque[Request] = deque()
        self._running: list[Running] = []
        self._blocks = list(range(self.shape[0]))
        self._batch: Batch | None = None
        self._broken: set[int] = set()
        self._indices = itertools.count()
        self._queue_lock = threading.Lock()
        self._alone = OneAtATime(
            "Stream: expected one call of step at a time, got another from a callback or a thread"
        )

    def __repr__(self) -> str:
        options = self._options
        parts = [
            described_model(options.model),
            f"shape={self.shape}",
            f"running={self.running}",
            f"pending={self.pending}",
            *described_placement(self.dtype, self.device, self._backend, options.graph),
        ]
        return f"Stream({', '.join(parts)})"

    def _functions(self) -> tuple[Any, ...]:
        options = self._options
        return options.model, options.uncond_model, options.denoised_fn

    def __getstate__(self) -> dict[str, Any]:
        if self.pending or self.running:
            raise RuntimeError(
                "Stream: expected no request to copy or pickle it, since those stay with their "
                f"tickets, got {self.pending} waiting and {self.running} running; run() it first, "
                "or make a new Stream"
            )
        return super().__getstate__()

    @method_takes(RequestOptions)
    @outside_of_programs
    def submit(self, options: RequestOptions) -> Ticket:
        """Queue a request for one sample.

        Arguments not named here are those of `fastddim.sample`. Tensors are copied.

        Args:
            guidance_scale: a number, or one per step, where the stream is guided; else None.
            seed: int in [0, 2⁶⁴).
            sample_offset: the index of the sample among those of the seed.
            x_T: starting state `[1, …]`, of the stream's dtype and on its device; by default drawn
                from the seed.
            model_kwargs: as in `fastddim.sample` for one sample: tensors `[1, …]` on the stream's
                device, which become rows of the batch. Names, shapes, dtypes and all values other
                than tensors must be those of the stream's first request. A value that all requests
                share belongs in the model, as by `functools.partial`.
            uncond_kwargs: as in `fastddim.sample`, where the stream is guided: tensors `[1, …]` or
                numbers. Without them, and without `uncond_model`, tensors in `model_kwargs` are
                `[2, …]`, the unconditional row first.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            queue.Full: `max_pending` requests are waiting.
        """
        check_sampler_unfollowed()
        request = self._requests.make(options)
        with torch.inference_mode(False), self._queue_lock:
            self._make_room()
            self._slots.take_conditions(request.arguments)
            request.ticket.index = next(self._indices)
            self._pending.append(request)
        return request.ticket

    @outside_of_programs
    def step(self) -> list[Ticket]:
        """Take one step of every request that has a slot, and return the tickets that are done.

        Tickets come in the order of their `index`, without cancelled ones. A ticket is done when it
        has a sample, its `result()`, or an error, its `exception()`, which `result()` raises. Where
        the model raises an error, every request in the batch gets it, and the stream goes on with
        those that wait. Without requests nothing happens.

        Raises:
            RuntimeError: another call of `step` is under way.
            ValueError: the caller is capturing a CUDA graph, which cannot hold one of the stream's;
                or the model was converted or moved since the stream was made.
        """
        for weight in self._weights:
            weight.check()
        check_outer_capture(self._options.graph, self.device, self._options.check_finite)
        with self._alone, self._order.use(self._slots.tensors), without_autograd():
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
        """Step until no request is left, and return the tickets in the order of completion."""
        return list(self)

    def __iter__(self) -> Iterator[Ticket]:
        """Step until no request is left, those that come meanwhile included, and yield tickets."""
        while self.pending or self.running:
            yield from self.step()

    @property
    def pending(self) -> int:
        """The number of requests that wait for a slot, those cancelled meanwhile included."""
        return len(self._pending)

    @property
    def running(self) -> int:
        """The number of requests that have a slot."""
        return len(self._running)

    def _prepare(self, step: Step) -> None:
        step.model, step.uncond_model, step.denoised_fn = self._functions()
        step.check = self._note_broken if self._options.check_finite else None

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
            ticket = self._running[slot].request.ticket
            if ticket.cancelled():
                self._release(slot)
                ticket.set_running_or_notify_cancel()

    def _admit(self) -> None:
        while len(self._running) < self.shape[0]:
            with self._queue_lock:
                if not self._pending:
                    return
                request = self._pending.popleft()
                # Asked once, since a ticket may be cancelled at any time.
                cancelled = request.ticket.cancelled()
                if not cancelled:
                    self._running.append(Running(request, self._blocks.pop()))
            if cancelled:
                request.ticket.set_running_or_notify_cancel()
            else:
                self._batch = None
                self._slots.load(len(self._running) - 1, self._running[-1])

    def _release(self, slot: int) -> None:
        """Free a slot; the last one in use moves into it, so the first slots are those in use."""
        self._batch = None
        self._slots.release(slot, len(self._running) - 1)
        self._blocks.append(self._running[slot].block)
        self._running[slot] = self._running[-1]
        self._running.pop()

    def _take_step(self) -> list[Ticket]:
        if self._batch is None:
            self._batch = self._slots.compose(self._running)
        batch = self._batch
        self._broken.clear()
        program = self._program(batch)
        if program is not None:
            program.replay()
        else:
            batch.take_step()
        done = [slot for slot in range(len(self._running)) if self._conclude(slot, batch)]
        tickets = [self._running[slot].request.ticket for slot in done]
        for slot in reversed(done):
            self._release(slot)
        return in_order(tickets)

    def _conclude(self, slot: int, batch: Batch) -> bool:
        """Count the step of a request; True where the step was its last or has failed."""
        request = self._running[slot].request
        ticket = request.ticket
        broken, last = slot in self._broken, ticket.taken + 1 == ticket.steps
        if broken:
            settle(ticket, request.nonfinite_error())
        elif last:
            settle(ticket, batch.sample(slot))
        ticket.taken += 1
        return broken or last

    def _note_broken(self, output: Tensor) -> None:
        """Note the samples for which the model has given NaN or infinity."""
        finite = output.isfinite()
        finite = finite.flatten(1).all(dim=1) if finite.ndim > 1 else finite
        whole = finite.reshape(1 + self._kind.guided, -1).all(dim=0).tolist()
        self._broken.update(slot for slot, fine in enumerate(whole) if not fine)

    def _fail_all(self, error: BaseException) -> list[Ticket]:
        """Fail every request that has a slot, free all slots, and return the tickets."""
        failed, self._running = self._running, []
        self._blocks = list(range(self.shape[0]))
        self._batch = None
        indices = sorted(running.request.ticket.index for running in failed)
        for request, _ in failed:
            others = [str(i) for i in indices if i != request.ticket.index]
            settle(request.ticket, request.batch_error(others, error))
        return in_order([running.request.ticket for running in failed])

    def _program(self, batch: Batch) -> Graph | None:
        """The captured step; None where steps are eager."""
        if not self._static or transfer.captured(self.device):
            return None
        return self._programs.find(None, batch.capture)


def _slots_shape(options: StreamOptions) -> tuple[int, ...]:
    if options.shape is None and options.batch_size is None:
        raise ValueError("batch_size: expected the number of slots, or shape, got None for both")
    batch_size = 1 if options.batch_size is None else options.batch_size
    resolved = resolve_shape(options.model, options.shape, batch_size)
    check_int("shape[0]", resolved[0], 1, 2**32)
    return resolved
