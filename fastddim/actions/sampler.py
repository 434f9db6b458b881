"""Chunks of actions, each planned from the last one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastddim import backends, transfer
from fastddim.actions.chunking import LAST, guided
from fastddim.actions.chunks import Chunks, checked_counts
from fastddim.actions.options import ActionOptions, TickOptions
from fastddim.actions.warm import WarmStart
from fastddim.choices import PREDICTION_SYNONYMS, PREDICTIONS
from fastddim.loop.copying import Rebuilt
from fastddim.loop.modes import OneAtATime, without_autograd
from fastddim.loop.output import check_written, own_copy
from fastddim.loop.outside import outside_of_programs
from fastddim.loop.setup import resolve_model_dtype, resolve_schedule, resolve_shape
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import SamplerOptions
from fastddim.plan import Plan
from fastddim.reference import compute_dtype
from fastddim.sampler import Sampler
from fastddim.signatures import method_takes, shared
from fastddim.validation import check_choice, check_initial, check_int, check_number, signed_bits

CHUNKINGS = (None, "freeze", "guide")


class ActionSampler(Rebuilt):
    """Chunks of actions for a control loop, each planned from the last one.

        sampler = fastddim.ActionSampler(network, 10, shape=(1, 16, 2), warm_start=4, ...)
        chunk = sampler(model_kwargs={"global_cond": features}, executed=8)

    A call is a tick: it draws the actions of the next `horizon` moments by a prepared `Sampler`,
    and remembers them. What the next chunk takes over from them is the last chunk, shifted by the
    actions that were executed meanwhile:

    - with `warm_start` it is noised to the middle of the schedule, as `Schedule.add_noise` does,
      and only the last steps are taken (SDEdit, arXiv 2108.01073);
    - with `chunking="freeze"` the actions that will be executed before the new chunk is there are
      kept exactly, as known data of a `mask`;
    - with `chunking="guide"` they are, and the predicted x_0 is also pulled towards the other old
      actions, the less the later they are: real-time chunking (arXiv 2506.07339), with a forward
      and a backward pass of the network in each step.

    With `out` a tick allocates no memory and does not wait for the device, except for what the
    network does, and autograd with `"guide"`. Where steps are captured, all of them are one launch
    of a graph, and a tick allocates nothing at all.

    Copies and pickles go on from the same tick and the same chunk, with memory of their own.

    Args:
        seed: an integer in [0, 2⁶⁴), of all ticks: the noise of tick k has the sample indices
            k·B + i.
        warm_start: how many of the last steps a tick takes that has a chunk before it, in
            [1, S − 1]; None for all of them. At order 1 only, and not with tuned steps.
        chunking: how the new chunk agrees with the last one; see above. `"guide"` is without
            `guidance_scale`, and `clip` and `denoised_fn` come after the pull.
        max_guidance_weight: β of `"guide"`, which bounds the pull.

    The other arguments are those of `fastddim.Sampler`, with `shape` `(B, horizon, action_dim)`.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: `(B, horizon, action_dim)` of a chunk.
        dtype: of the actions.
        device: of the actions.
        seed: of all ticks.
        tick: the number of the next tick, from 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    @method_takes(ActionOptions)
    @torch.inference_mode(False)
    def __init__(self, options: ActionOptions) -> None:
        given = shared(SamplerOptions, options)
        _check_shape(resolve_shape(options.model, options.shape, options.batch_size))
        self._sampler = Sampler(**vars(given))
        self.plan: Plan = self._sampler.plan
        self.shape, self.dtype = self._sampler.shape, self._sampler.dtype
        self.device = self._sampler.device
        self._impl = options.impl
        self.seed = check_int("seed", options.seed, 0, 2**64 - 1)
        self._first = _first_step(options.warm_start, self.plan)
        self._chunking = check_choice("chunking", options.chunking, CHUNKINGS)
        weight = check_number("max_guidance_weight", options.max_guidance_weight, 0.0)
        self._guided = self._with_guidance(given, weight) if self._chunking == "guide" else None
        self.tick = 0
        self._continues = False
        self._rebuild()

    def _with_guidance(self, given: SamplerOptions, max_weight: float) -> Sampler:
        """A sampler of the network that is guided to the last chunk."""
        if given.guidance_scale is not None:
            raise ValueError(
                "guidance_scale: expected None with chunking='guide', which follows the network "
                f"from one input, got {given.guidance_scale!r}"
            )
        schedule = resolve_schedule(given.model, given.schedule)
        model = guided(
            given.model,
            schedule,
            check_choice("prediction", given.prediction, PREDICTIONS, PREDICTION_SYNONYMS),
            max_weight,
            dtype=compute_dtype(self.dtype),
            device=self.device,
        )
        nothing = Chunks(self.shape, self.dtype, self.device).guide
        # A wrapped network does not tell what it is made for.
        options = replace(
            given,
            model=model,
            schedule=schedule,
            shape=self.shape,
            device=self.device,
            model_dtype=resolve_model_dtype(given.model, given.model_dtype, self.dtype),
            model_kwargs={**(given.model_kwargs or {}), LAST: nothing},
        )
        return Sampler(**vars(options))

    def __repr__(self) -> str:
        prepared = repr(self._sampler).removeprefix("Sampler(").removesuffix(")")
        warm = None if self._first is None else self.plan.steps - self._first
        return (
            f"ActionSampler({prepared}, seed={self.seed}, warm_start={warm}, "
            f"chunking={self._chunking!r})"
        )

    @method_takes(TickOptions)
    def __call__(self, options: TickOptions) -> Tensor:
        """Draw the next chunk, in a tensor that is the caller's own.

        On the first tick and after `reset` there is no last chunk: all steps are taken, from noise,
        and `executed` and `frozen` are checked and not read, since a control loop passes the same
        at every tick. A call that fails is no tick: the next one is taken in its place.

        Args:
            model_kwargs, uncond_kwargs: the observation, in place of the values that the sampler
                was made with; see the call of a `fastddim.Sampler`.
            executed: how many actions of the last chunk are past when the first of the new one is
                due, in [0, horizon]; an integer, or one for each environment: B integers or an
                int64 tensor `[B]` on the CPU.
            frozen: how many of the first actions of the new chunk will be executed from the last
                one, while the new one is being drawn; in [0, horizon − executed], likewise. Read
                with `chunking`.
            out: where the actions are written, `[B, horizon, action_dim]` in the sampler's dtype
                and on its device.

        Returns:
            The actions `[B, horizon, action_dim]`, in `out` where that is given.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            RuntimeError: another call is running, or a CUDA graph is being captured.
        """
        return self._draw(options)

    @outside_of_programs
    def _draw(self, options: TickOptions) -> Tensor:
        with self._alone, self._order.use(self._tensors), without_autograd():
            if transfer.captured(self.device):
                raise RuntimeError(
                    "ActionSampler: expected calls outside of a CUDA graph that is being captured, "
                    "whose replays would all be the same tick"
                )
            batch, horizon, _ = self.shape
            executed, frozen = checked_counts(options.executed, options.frozen, batch, horizon)
            last, out = self._chunks.last, options.out
            if out is not None:
                check_written("out", out, last)
            offset = self._sample_offset()
            call: dict[str, Any] = {
                "model_kwargs": options.model_kwargs,
                "uncond_kwargs": options.uncond_kwargs,
                "seed": self.seed,
                "sample_offset": offset,
                "out": last,
            }
            if self._continues and (self._warm is not None or self._chunking is not None):
                self._chunks.shift(executed, frozen)
                self._draw_on(call)
            else:
                self._sampler(**call)
            self.tick += 1
            self._continues = True
            return own_copy(last, out)

    def _draw_on(self, call: dict[str, Any]) -> None:
        """Draw the next chunk from the last one, once it is shifted."""
        chunks = self._chunks
        if self._warm is not None:
            call["x_T"] = self._warm.state(chunks.shifted, call["sample_offset"])
            call["first_step"] = self._first
        if self._chunking is not None:
            call |= {"mask": chunks.mask, "known": chunks.shifted}
        if self._guided is not None:
            call["model_kwargs"] = {**(call["model_kwargs"] or {}), LAST: chunks.guide}
        (self._guided or self._sampler)(**call)
        if self._chunking is not None:
            chunks.keep_frozen()

    def _sample_offset(self) -> int:
        """The sample index of the first environment."""
        batch = self.shape[0]
        if (self.tick + 1) * batch > 2**32:
            raise RuntimeError(
                f"ActionSampler: expected sample indices below 2**32, got tick {self.tick} of "
                f"{batch} environments; make another sampler with another seed"
            )
        return self.tick * batch

    def prepare(self) -> None:
        """Take a tick of each kind, with the observation that the sampler was made with, and forget
        them: what the first ones compile and capture is then there before the robot moves. The last
        chunk is forgotten too.
        """
        tick = self.tick
        self.reset()
        for _ in range(2):
            self._draw(TickOptions())
        self.restore(tick)

    def reset(self) -> None:
        """Forget the last chunk, where an episode ends; the number of the tick goes on."""
        with self._alone, self._order.use(self._tensors), without_autograd():
            self._continues = False

    def restore(self, tick: int, chunk: Tensor | None = None) -> None:
        """Go on from another tick.

        Args:
            tick: the number of the next one.
            chunk: the last chunk `[B, horizon, action_dim]`, in the sampler's dtype and on its
                device; None as after `reset`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
        """
        number = check_int("tick", tick, 0, 2**32 - 1)
        if chunk is not None:
            check_initial("chunk", chunk, self.shape, self.dtype, self.device)
        with self._alone, self._order.use(self._tensors), without_autograd():
            self.tick, self._continues = number, chunk is not None
            if chunk is not None:
                self._chunks.last.copy_(chunk)

    @torch.inference_mode(False)
    def _build(self) -> None:
        self._alone = OneAtATime(
            "ActionSampler: expected one call at a time, got another from a thread or from the "
            "network itself"
        )
        self._chunks = Chunks(self.shape, self.dtype, self.device)
        self._warm = None
        if self._first is not None:
            self._warm = WarmStart(
                float(self.plan.alphas_cumprod[self._first]),
                signed_bits(self.seed),
                self.shape,
                self.dtype,
                self.device,
                backends.choose(self._impl, self.device),
            )
        self._order = StreamOrder(self.device)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_last": self._chunks.last.clone()} if self._continues else state

    def __copy__(self) -> ActionSampler:
        samplers = {"_sampler": copy.copy(self._sampler), "_guided": copy.copy(self._guided)}
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__() | samplers)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        last = state.get("_last")
        super().__setstate__({name: held for name, held in state.items() if name != "_last"})
        if last is not None:
            with without_autograd():
                self._chunks.last.copy_(last)

    def _functions(self) -> tuple[Any, ...]:
        return self._sampler._functions()

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._chunks.tensors()
        if self._warm is not None:
            yield from self._warm.tensors()


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"shape: expected (B, horizon, action_dim), none of them 0, got {shape}")


def _first_step(warm_start: int | None, plan: Plan) -> int | None:
    """The index of the step at which a tick begins that has a chunk before it."""
    if warm_start is None:
        return None
    if plan.kind.history:
        raise ValueError(
            "warm_start: expected None at order 2 and with tuned steps, which read the epsilon of "
            f"the step before, got {warm_start!r}"
        )
    if plan.steps == 1:
        raise ValueError(f"warm_start: expected None with a single step, got {warm_start!r}")
    return plan.steps - check_int("warm_start", warm_start, 1, plan.steps - 1)
