"""Environments that plan at different times and share one batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fastddim.actions.chunking import guided_options, guiding, rederives_eps
from fastddim.actions.chunks import Chunks, check_shape
from fastddim.actions.options import CHUNKINGS, ActionStreamOptions
from fastddim.actions.warm import WarmStart, first_step_of, warm_steps
from fastddim.loop.copying import Rebuilt
from fastddim.loop.describing import described_steps
from fastddim.loop.modes import without_autograd
from fastddim.loop.outside import outside_of_programs
from fastddim.loop.setup import prepare_sampling, resolve_shape
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import RequestOptions, SamplerOptions, StreamOptions
from fastddim.signatures import method_takes, shared
from fastddim.stream import Stream, Ticket
from fastddim.tuned import TunedSteps
from fastddim.validation import check_choice, check_int, check_number


class ChunkTicket(Future[Tensor]):
    """A request to an `ActionStream`, as a `concurrent.futures.Future` of its chunk
    `[horizon, action_dim]`.

    `result()` waits for another thread to take the steps. If there is no such thread, call
    `ActionStream.run` or `ActionStream.step` first. `cancel()` works until the chunk is done.
    `asyncio.wrap_future` makes the ticket awaitable.

    Attributes:
        environment: environment that the chunk is for.
        tick: number of the request among those of its environment, from 0.
        index: number of earlier requests to the stream.
    """

    def __init__(self, environment: int, tick: int) -> None:
        super().__init__()
        self.environment = environment
        self.tick = tick
        self.index = -1
        # The first actions of the chunk, `[frozen, action_dim]`.
        self._frozen: Tensor | None = None
        self._request: Ticket | None = None

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "done" if self.done() else "pending"
        return f"ChunkTicket(environment={self.environment}, tick={self.tick}, {state})"

    def cancel(self) -> bool:
        """Cancel the request, unless its chunk is done, and return whether it is cancelled."""
        # Cancelling the request also settles this ticket.
        return self._request is not None and self._request.cancel()

    def _follow(self, request: Ticket) -> None:
        """Settle with a request to the stream, by a callback of that request."""
        self._request, self.index = request, request.index

    def _take_over(self, request: Future[Tensor]) -> None:
        """Take over the outcome of the request."""
        if request.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif (error := request.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(request.result()[0])

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "ChunkTicket: expected to stay where its stream is, got a copy or pickle of the "
            f"request of environment {self.environment}; its result() can be copied"
        )


def _check_hook(options: SamplerOptions, *, guided: bool) -> None:
    """Refuse options that a stream would refuse only at a later request."""
    hook = options.denoised_fn
    if hook is not None and (rederives_eps(options) if guided else options.rederive_eps):
        raise ValueError(
            "denoised_fn: expected None in an ActionStream with rederive_eps, which clip and "
            f"thresholding imply with chunking='guide', got {hook!r}"
        )


class ActionStream(Rebuilt):
    """Chunks of actions for environments that plan at different times, in one batch.

        stream = fastddim.ActionStream(network, 10, environments=64, shape=(16, 16, 2))
        ticket = stream.submit(3, model_kwargs={"global_cond": features}, executed=8)
        stream.run()
        chunk = ticket.result()

    `submit` requests the next chunk of one environment. `step` takes one step of all requests that
    share the batch, each at a step of its own; see `fastddim.Stream`. The last chunk of every
    environment is kept, and its next chunk continues from it as in an `ActionSampler`, with
    `warm_start` and `chunking`.

    The noise of tick k of environment e has the sample index k·N + e, whichever other requests
    share the batch. So environment e gets the chunks of row e of an `ActionSampler` with
    `shape=(N, …)`, the same seed and the same ticks. The bits are equal if the network's output for
    a sample does not depend on the batch.

    Call `submit`, `reset` and the methods of a ticket from any thread, at any time. Call `step`,
    `run` and iterate in one thread at a time.

    A copy or a pickle continues from the same chunks. It can be made while there are no requests.

    Args:
        shape: `(B, horizon, action_dim)`; up to B requests share a step.
        environments: number N of environments; by default B.
        seed: seed of all requests, one integer.
        warm_start: number of steps of a request that has an earlier chunk; as in an
            `ActionSampler`.
        chunking: method by which a new chunk is made to agree with the last one; as in an
            `ActionSampler`. With `"guide"`, requests without an earlier chunk take backward passes
            too.
        max_guidance_weight: β of `"guide"`.
        max_pending: number of requests that may wait for a place in the batch; None for no limit.

    The other arguments are those of `fastddim.Sampler`. `model_kwargs` and `uncond_kwargs` come
    with the requests instead. Tensors with a number for each sample have one element, for all
    samples. `denoised_fn` excludes `rederive_eps`, and with `"guide"` also `clip` and thresholding.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: `(B, horizon, action_dim)`.
        environments: N.
        seed: seed of all requests.
        dtype: dtype of the actions.
        device: device of the actions.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    @method_takes(ActionStreamOptions)
    @torch.inference_mode(False)
    def __init__(self, options: ActionStreamOptions) -> None:
        self.shape = resolve_shape(options.model, options.shape, options.batch_size)
        check_shape(self.shape)
        # A request is one sample.
        one = {"shape": (1, *self.shape[1:]), "batch_size": 1}
        given = shared(SamplerOptions, options, **one)
        setup = prepare_sampling(given)
        self._chunking = check_choice("chunking", options.chunking, CHUNKINGS)
        weight = check_number("max_guidance_weight", options.max_guidance_weight, 0.0)
        told = guided_options(given, setup, weight) if self._chunking == "guide" else {}
        self.plan, self._impl = setup.plan, options.impl
        self.seed = check_int("seed", options.seed, 0, 2**64 - 1)
        self._first = first_step_of(options.warm_start, self.plan)
        tuned = isinstance(options.steps, TunedSteps)
        self._stream = Stream(
            **vars(
                shared(
                    StreamOptions,
                    options,
                    # Tuned weights need the history, which a stream of order 2 keeps.
                    order=2 if tuned else options.order,
                    guided=options.guidance_scale is not None,
                    masked=self._chunking is not None,
                    max_steps=self.plan.steps,
                    **told | {"shape": self.shape},
                )
            )
        )
        self._request = shared(RequestOptions, options)
        self._rederives_eps = rederives_eps(given)
        _check_hook(given, guided=self._chunking == "guide")
        self._steps = described_steps(setup.plan, given)
        self.dtype, self.device = self._stream.dtype, self._stream.device
        count = self.shape[0] if options.environments is None else options.environments
        self.environments = check_int("environments", count, 1, 2**32)
        self._ticks = [0] * self.environments
        self._continues = [False] * self.environments
        self._last = torch.zeros(
            (self.environments, *self.shape[1:]), dtype=self.dtype, device=self.device
        )
        self._rebuild()

    @torch.inference_mode(False)
    def _build(self) -> None:
        # Held while a request is put together, and while a chunk is stored.
        self._lock = threading.RLock()
        self._order = StreamOrder(self.device)
        self._asked: list[ChunkTicket | None] = [None] * self.environments
        self._settled: list[ChunkTicket] = []
        one = (1, *self.shape[1:])
        self._chunk = Chunks(one, self.dtype, self.device)
        # Stands in for the chunk of a request that has no earlier one.
        self._nothing = Chunks(one, self.dtype, self.device)
        self._warm = WarmStart.of(
            self.plan, self._first, self.seed, one, self.dtype, self.device, self._impl
        )

    def __repr__(self) -> str:
        prepared = repr(self._stream).removeprefix("Stream(").removesuffix(")")
        warm = warm_steps(self._first, self.plan)
        return (
            f"ActionStream({prepared}, steps={self._steps}, environments={self.environments}, "
            f"seed={self.seed}, warm_start={warm}, chunking={self._chunking!r})"
        )

    @outside_of_programs
    def submit(
        self,
        environment: int,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        executed: int = 0,
        frozen: int = 0,
    ) -> ChunkTicket:
        """Request the next chunk of an environment. Tensors are copied.

        The first request of an environment, and the first one after `reset`, has no earlier chunk:
        it takes all steps, from noise, and `executed` and `frozen` are only checked. A request that
        fails or is cancelled leaves the last chunk unchanged, and its tick counts.

        Args:
            environment: index in [0, N).
            model_kwargs, uncond_kwargs: the observation of this environment, as in
                `Stream.submit`: tensors `[1, …]`.
            executed: number of actions of the last chunk that are past when the first action of
                the new one is due, in [0, horizon].
            frozen: number of actions, at the start of the new chunk, that will be executed from the
                last one, in [0, horizon − executed]. Used with `chunking`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            RuntimeError: the last request of this environment is not done.
            queue.Full: `max_pending` requests are waiting.
        """
        at = check_int("environment", environment, 0, self.environments - 1)
        horizon = self.shape[1]
        executed = check_int("executed", executed, 0, horizon)
        frozen = check_int("frozen", frozen, 0, horizon - executed)
        with self._lock:
            before = self._asked[at]
            if before is not None and not before.done():
                raise RuntimeError(
                    f"environment: expected one whose last request is done, got {at}, whose tick "
                    f"{before.tick} is not"
                )
            ticket = ChunkTicket(at, self._ticks[at])
            index = self._sample_index(ticket)
            with without_autograd(), self._order.use(self._tensors):
                request = self._stream.submit(
                    **vars(self._request)
                    | {"uncond_kwargs": uncond_kwargs, "seed": self.seed, "sample_offset": index}
                    | self._taken_over(ticket, index, executed, frozen, model_kwargs)
                )
            self._ticks[at] += 1
            self._asked[at] = ticket
            ticket._follow(request)
            request.add_done_callback(lambda request: self._settle(ticket, request))
        return ticket

    def _sample_index(self, ticket: ChunkTicket) -> int:
        """The sample index of the noise of a request."""
        at, tick = ticket.environment, ticket.tick
        index = tick * self.environments + at
        if index >= 2**32:
            raise RuntimeError(
                f"ActionStream: expected sample indices below 2**32, got tick {tick} of "
                f"environment {at}; make another stream with another seed"
            )
        return index

    def _taken_over(
        self, ticket: ChunkTicket, index: int, executed: int, frozen: int, model_kwargs: Any
    ) -> dict[str, Any]:
        """The inputs that a request takes over from the last chunk of its environment, and the
        arguments of the model that include them.
        """
        taken: dict[str, Any] = {"model_kwargs": model_kwargs}
        at, chunk = ticket.environment, self._nothing
        if self._continues[at]:
            chunk = self._chunk
            chunk.last.copy_(self._last[at : at + 1])
            chunk.shift(executed, frozen)
            if self._warm is not None:
                taken |= {"x_T": self._warm.state(chunk.shifted, index), "first_step": self._first}
            if self._chunking is not None:
                ticket._frozen = chunk.shifted[0, :frozen].clone()
        if self._chunking is not None:
            taken |= {"mask": chunk.mask, "known": chunk.shifted}
        if self._chunking == "guide":
            taken["model_kwargs"] = guiding(model_kwargs, chunk)
            if self._continues[at]:
                taken["rederive_eps"] = self._rederives_eps
        return taken

    def _settle(self, ticket: ChunkTicket, request: Future[Tensor]) -> None:
        """Keep the chunk of a request that is done, and settle its ticket."""
        try:
            if not request.cancelled():
                with self._lock:
                    self._settled.append(ticket)
                    if request.exception() is None:
                        self._keep(ticket, request.result())
        except Exception as error:
            ticket.set_exception(error)
        else:
            ticket._take_over(request)

    def _keep(self, ticket: ChunkTicket, chunk: Tensor) -> None:
        at = ticket.environment
        with without_autograd(), self._order.use(self._tensors):
            if ticket._frozen is not None:
                # The sum of state and known data may have rounded them.
                chunk[0, : len(ticket._frozen)].copy_(ticket._frozen)
            # A reset in the meantime may have dropped the request.
            if self._asked[at] is ticket:
                self._last[at : at + 1].copy_(chunk)
                self._continues[at] = True

    @outside_of_programs
    def step(self) -> list[ChunkTicket]:
        """Take one step of every request in the batch, and return the tickets that are done, in the
        order of their `index`. Each holds a chunk or an error. Cancelled tickets are left out.

        Raises:
            RuntimeError, ValueError: as from `fastddim.Stream.step`.
        """
        self._stream.step()
        with self._lock:
            settled, self._settled = self._settled, []
        return sorted(settled, key=lambda ticket: ticket.index)

    def run(self) -> list[ChunkTicket]:
        """Step until no request is left, and return the tickets in the order of completion."""
        return list(self)

    def __iter__(self) -> Iterator[ChunkTicket]:
        """Step until no request is left, also a later one, and give each ticket when it is done."""
        while self.pending or self.running:
            yield from self.step()

    def reset(self, environment: int | None = None) -> None:
        """Drop the last chunk of an environment, or of all of them, at the end of an episode. A
        request that is not done is cancelled. The numbers of ticks continue.
        """
        if environment is None:
            chosen = range(self.environments)
        else:
            at = check_int("environment", environment, 0, self.environments - 1)
            chosen = range(at, at + 1)
        with self._lock:
            asked = [self._asked[at] for at in chosen]
            for at in chosen:
                self._asked[at], self._continues[at] = None, False
        for ticket in asked:
            if ticket is not None:
                ticket.cancel()

    @property
    def pending(self) -> int:
        """The number of requests that wait for a place in the batch."""
        return self._stream.pending

    @property
    def running(self) -> int:
        """The number of requests that have a place in the batch."""
        return self._stream.running

    def _functions(self) -> tuple[Any, ...]:
        return self._stream._functions()

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self._last, *self._chunk.tensors(), *self._nothing.tensors())
        if self._warm is not None:
            yield from self._warm.tensors()
