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

    `result()` waits for another thread to take the steps; where there is none, call
    `ActionStream.run` or `ActionStream.step` first. `cancel()` works until the chunk is there.
    `asyncio.wrap_future` makes it awaitable.

    Attributes:
        environment: whose chunk it is.
        tick: the number of the environment's request, from 0.
        index: how many requests the stream got before.
    """

    def __init__(self, environment: int, tick: int) -> None:
        super().__init__()
        self.environment = environment
        self.tick = tick
        self.index = -1
        # The actions that the chunk begins with, `[frozen, action_dim]`.
        self._frozen: Tensor | None = None
        self._request: Ticket | None = None

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "done" if self.done() else "pending"
        return f"ChunkTicket(environment={self.environment}, tick={self.tick}, {state})"

    def cancel(self) -> bool:
        """Cancel the request, unless its chunk is there; whether it is cancelled."""
        # That of the request settles this ticket too.
        return self._request is not None and self._request.cancel()

    def _follow(self, request: Ticket) -> None:
        """Be settled as a request to the stream is, by its callback."""
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
    """Refuse what a stream would refuse at a later request."""
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

    `submit` asks for the next chunk of one environment, `step` takes one step of all requests that
    share the batch, each at a step of its own; see `fastddim.Stream`. The last chunk of every
    environment is kept, and the next one goes on from it as in an `ActionSampler`, with
    `warm_start` and `chunking`.

    The noise of tick k of environment e has the sample index k·N + e, whoever else is in the batch:
    environment e gets the chunks of row e of an `ActionSampler` with `shape=(N, …)`, the same seed
    and the same ticks, bit for bit where the network's output for a sample does not depend on the
    batch.

    Threads: `submit`, `reset` and everything of a ticket may be called from any thread, at any
    time; `step`, `run` and iteration are for one thread at a time.

    A copy or a pickle, which can be made while there are no requests, goes on from the same chunks.

    Args:
        shape: `(B, horizon, action_dim)`; up to B requests share a step.
        environments: N, how many environments there are; by default B.
        seed: of all requests, one integer.
        warm_start: how many of the last steps a request takes that has a chunk before it; as in an
            `ActionSampler`.
        chunking: how a new chunk agrees with the last one; as in an `ActionSampler`. With
            `"guide"`, requests that have no chunk before them take backward passes too.
        max_guidance_weight: β of `"guide"`.
        max_pending: how many requests may wait for a place in the batch; None is no limit.

    The other arguments are those of `fastddim.Sampler`, without `model_kwargs` and `uncond_kwargs`,
    which come with the requests; tensors with a number for each sample have one element, for all.
    `denoised_fn` is without `rederive_eps`, and so without `clip` and thresholding with `"guide"`.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: `(B, horizon, action_dim)`.
        environments: N.
        seed: of all requests.
        dtype: of the actions.
        device: of the actions.

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
                    # Tuned weights need the history that a stream of order 2 keeps.
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
        # Held while a request is put together, and while a chunk is kept.
        self._lock = threading.RLock()
        self._order = StreamOrder(self.device)
        self._asked: list[ChunkTicket | None] = [None] * self.environments
        self._settled: list[ChunkTicket] = []
        one = (1, *self.shape[1:])
        self._chunk = Chunks(one, self.dtype, self.device)
        # In place of a chunk that is not there.
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
        """Ask for the next chunk of an environment. Tensors are copied.

        The first request of an environment, and the first after `reset`, has no chunk before it:
        it takes all steps, from noise, and `executed` and `frozen` are checked and not read. A
        request that fails or is cancelled leaves the last chunk as it is; its tick has passed.

        Args:
            environment: in [0, N).
            model_kwargs, uncond_kwargs: the observation of this environment, as in
                `Stream.submit`: tensors `[1, …]`.
            executed: how many actions of the last chunk are past when the first of the new one is
                due, in [0, horizon].
            frozen: how many of the first actions of the new chunk will be executed from the last
                one, in [0, horizon − executed]. Read with `chunking`.

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
        """The sample index of the noise that a request draws."""
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
        """What a request takes over from the last chunk of its environment, and the arguments of
        the model with it.
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
        """Keep the chunk of a request that is done, and tell its owner."""
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
                # A sum of the state and the known data may have rounded them.
                chunk[0, : len(ticket._frozen)].copy_(ticket._frozen)
            # Unless it was forgotten by a reset meanwhile.
            if self._asked[at] is ticket:
                self._last[at : at + 1].copy_(chunk)
                self._continues[at] = True

    @outside_of_programs
    def step(self) -> list[ChunkTicket]:
        """Take one step of every request in the batch, and give the tickets that are done, in the
        order of their `index`: with a chunk, or with an error. Cancelled ones are left out.

        Raises:
            RuntimeError, ValueError: as `fastddim.Stream.step` does.
        """
        self._stream.step()
        with self._lock:
            settled, self._settled = self._settled, []
        return sorted(settled, key=lambda ticket: ticket.index)

    def run(self) -> list[ChunkTicket]:
        """Step until no request is left; the tickets in the order in which they were done."""
        return list(self)

    def __iter__(self) -> Iterator[ChunkTicket]:
        """Step until no request is left, also those that come meanwhile."""
        while self.pending or self.running:
            yield from self.step()

    def reset(self, environment: int | None = None) -> None:
        """Forget the last chunk of an environment, or of all, as where an episode ends; a request
        that is not done is cancelled. The numbers of ticks go on.
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
