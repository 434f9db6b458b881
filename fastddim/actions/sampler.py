"""Chunks of actions, each planned from the last one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastddim import transfer
from fastddim.actions.budget import within_budget
from fastddim.actions.chunking import guided_options, guiding, rederives_eps
from fastddim.actions.chunks import Chunks, check_shape, checked_counts, listed
from fastddim.actions.log import Header, LoggedTick, LogWriter, header_of, observation_digest
from fastddim.actions.options import CHUNKINGS, ActionOptions, TickOptions
from fastddim.actions.warm import WarmStart, first_step_of, warm_steps
from fastddim.loop.copying import Rebuilt
from fastddim.loop.modes import OneAtATime, without_autograd
from fastddim.loop.output import check_written, own_copy
from fastddim.loop.outside import outside_of_programs
from fastddim.loop.setup import resolve_shape
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import SamplerOptions, Update
from fastddim.plan import Plan
from fastddim.sampler import Sampler
from fastddim.signatures import method_takes, shared
from fastddim.validation import check_choice, check_initial, check_int, check_number


class ActionSampler(Rebuilt):
    """Chunks of actions for a control loop, each planned from the last one.

        sampler = fastddim.ActionSampler(network, 10, shape=(1, 16, 2), warm_start=4, ...)
        chunk = sampler(model_kwargs={"global_cond": features}, executed=8)

    A call is a tick: it draws the actions of the next `horizon` moments with a prepared `Sampler`,
    and remembers them as the last chunk. The next tick shifts the last chunk by the actions that
    were executed meanwhile, and takes over from it:

    - with `warm_start`, its state: the chunk is noised to the middle of the schedule, as
      `Schedule.add_noise` does, and only the last steps are taken (SDEdit, arXiv 2108.01073);
    - with `chunking="freeze"`, the actions that will be executed before the new chunk is drawn:
      they are kept exactly, as known data of a `mask`;
    - with `chunking="guide"`, these actions too. In addition, the predicted x_0 is pulled towards
      the other old actions, less for later ones: real-time chunking (arXiv 2506.07339), with a
      forward and a backward pass of the network in each step.

    With `out`, a tick allocates no memory and does not wait for the device, apart from the network
    and, with `"guide"`, autograd. If steps are captured, all of them are one launch of a graph, and
    a tick allocates nothing at all.

    Without a graph, the network is evaluated in inference mode if the caller is in it, which makes
    PyTorch's own operators a little faster.

    Copies and pickles continue from the same tick and the same chunk, with memory of their own.

    Args:
        seed: seed of all ticks, an integer in [0, 2⁶⁴); the noise of tick k has the sample indices
            k·B + i.
        warm_start: number of steps of a tick that has an earlier chunk, in [1, S − 1]: the last
            ones of the schedule. None for all steps. At order 1 only, and not with tuned steps.
        chunking: method by which a new chunk is made to agree with the last one; see above.
            `"guide"` excludes `guidance_scale`. With it, `clip` and `denoised_fn` are applied after
            the pull, and ε is derived from an x_0 that `clip` or thresholding limits.
        max_guidance_weight: β of `"guide"`, which bounds the pull.
        budget_ms: the time that a tick may take. With it, the constructor measures ticks with the
            given observation, of each kind that will occur, including the first one of an episode.
            It lowers `steps` until 95 % of the ticks fit. `steps` may then also be a sequence of
            numbers and `fastddim.TunedSteps` to choose from.
        log: a file to which each tick is appended: its number, `executed` and `frozen`, a digest of
            the model's tensors, and the actions. `fastddim.actions.replay` draws the ticks again
            from it. A file of the same sampler is continued with the next tick number. Logging
            waits for the device at every tick.

    The other arguments are those of `fastddim.Sampler`, with `shape` `(B, horizon, action_dim)`.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: `(B, horizon, action_dim)` of a chunk.
        dtype: dtype of the actions.
        device: device of the actions.
        seed: seed of all ticks.
        steps: number S of steps of a tick without an earlier chunk.
        measured: with `budget_ms`, the measured times as `{steps: milliseconds}`; else empty.
        tick: number of the next tick, from 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it. Or even the fewest steps do not fit `budget_ms`, or `log` is one of another sampler.
        OSError: the log cannot be written, or another sampler writes it.
    """

    @method_takes(ActionOptions)
    @torch.inference_mode(False)
    def __init__(self, options: ActionOptions) -> None:
        self.measured: dict[int, float] = {}
        if options.budget_ms is not None:
            options, self.measured = within_budget(options, ActionSampler)
        given = shared(SamplerOptions, options)
        check_shape(resolve_shape(options.model, options.shape, options.batch_size))
        self._sampler = Sampler(**vars(given))
        self.plan: Plan = self._sampler.plan
        self.steps = self.plan.steps
        self.shape, self.dtype = self._sampler.shape, self._sampler.dtype
        self.device = self._sampler.device
        self._impl = options.impl
        self.seed = check_int("seed", options.seed, 0, 2**64 - 1)
        self._first = first_step_of(options.warm_start, self.plan)
        self._chunking = check_choice("chunking", options.chunking, CHUNKINGS)
        weight = check_number("max_guidance_weight", options.max_guidance_weight, 0.0)
        self._max_guidance_weight, self._update = weight, shared(Update, options)
        self._guided: Sampler | None = None
        if self._chunking == "guide":
            told = guided_options(given, self._sampler._setup, weight)
            nothing = Chunks(self.shape, self.dtype, self.device)
            told |= {
                "model_kwargs": guiding(given.model_kwargs, nothing),
                "rederive_eps": rederives_eps(given),
            }
            self._guided = Sampler(**vars(replace(given, **told)))
        self.tick = 0
        self._continues = False
        self._rebuild()
        # The log is opened last, so that a sampler that is refused leaves no file.
        self._log = None if options.log is None else LogWriter(options.log, self.header())
        if self._log is not None:
            self.tick = self._log.next_tick

    def __repr__(self) -> str:
        prepared = repr(self._sampler).removeprefix("Sampler(").removesuffix(")")
        warm = warm_steps(self._first, self.plan)
        return (
            f"ActionSampler({prepared}, seed={self.seed}, warm_start={warm}, "
            f"chunking={self._chunking!r})"
        )

    @method_takes(TickOptions)
    def __call__(self, options: TickOptions) -> Tensor:
        """Draw the next chunk into a new tensor, or into `out`.

        The first tick, and the first one after `reset`, has no earlier chunk: it takes all steps,
        from noise. `executed` and `frozen` are then only checked, since a control loop passes the
        same values at every tick. A call that fails does not count as a tick.

        Args:
            model_kwargs, uncond_kwargs: the observation, which replaces the values that the sampler
                was made with; see the call of a `fastddim.Sampler`.
            executed: number of actions of the last chunk that are past when the first action of
                the new one is due, in [0, horizon]: an integer, or one for each environment, as B
                integers or an int64 tensor `[B]` on the CPU.
            frozen: number of actions, at the start of the new chunk, that will be executed from the
                last one while the new one is being drawn, in [0, horizon − executed]: an integer,
                or one for each environment. Used with `chunking`.
            out: tensor `[B, horizon, action_dim]` that the actions are written to, in the sampler's
                dtype and on its device.

        Returns:
            The actions `[B, horizon, action_dim]`, which are `out` if it is given.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            RuntimeError: another call is running, or a CUDA graph is being captured.
            OSError: the tick was taken, but could not be logged.
        """
        return self._draw(options, self._log)

    @outside_of_programs
    def _draw(self, options: TickOptions, log: LogWriter | None = None) -> Tensor:
        inference = torch.is_inference_mode_enabled()
        with self._alone, self._order.use(self._tensors), without_autograd():
            if transfer.captured(self.device):
                raise RuntimeError(
                    "ActionSampler: expected calls outside of the capture of a CUDA graph, whose "
                    "replays would all be the same tick, got a call inside"
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
                self._draw_on(call, inference)
            else:
                self._sampler._evaluate_in_inference_mode(inference)
                self._sampler(**call)
            before, self._continues = self._continues, True
            self.tick += 1
            made = own_copy(last, out)
            if log is not None:
                observation = self.observed(options.model_kwargs, options.uncond_kwargs)
                counts = listed(executed), listed(frozen)
                log.write(
                    LoggedTick(self.tick - 1, offset, *counts, before, observation, last.tolist())
                )
            return made

    def _draw_on(self, call: dict[str, Any], inference: bool) -> None:
        """Draw the next chunk from the last one, which is already shifted."""
        chunks = self._chunks
        if self._warm is not None:
            call["x_T"] = self._warm.state(chunks.shifted, call["sample_offset"])
            call["first_step"] = self._first
        if self._chunking is not None:
            call |= {"mask": chunks.mask, "known": chunks.shifted}
        if self._guided is not None:
            call["model_kwargs"] = guiding(call["model_kwargs"], chunks)
        sampler = self._guided or self._sampler
        sampler._evaluate_in_inference_mode(inference)
        sampler(**call)
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
        """Take a tick of each kind, with the observation that the sampler was made with, and drop
        the results. What first ticks compile and capture is then ready before the robot moves. The
        last chunk is dropped too.
        """
        tick = self.tick
        self.reset()
        for _ in range(2):
            self._draw(TickOptions())
        self.restore(tick)

    def observed(
        self,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The digest that a log has for the observation of a call with these arguments: SHA-256
        over the names, dtypes, shapes and bytes of the tensors that the model gets.

        Raises:
            TypeError, ValueError: as from a call.
        """
        return observation_digest(
            self._sampler._setup.arguments.replaced(model_kwargs, uncond_kwargs)
        )

    def header(self) -> Header:
        """All that the actions depend on besides the observations, as the header of a log.

        If the network is a module, its weights are read once, for their SHA-256.
        """
        return header_of(
            self._sampler._setup,
            self._update,
            seed=self.seed,
            warm_start=warm_steps(self._first, self.plan),
            chunking=self._chunking,
            max_guidance_weight=self._max_guidance_weight,
        )

    def _check_unlogged(self) -> None:
        """Refuse an action that a log could not record.

        Raises:
            ValueError: the sampler has a log.
        """
        if self._log is not None:
            raise ValueError(
                "log: expected None to restore, replay, copy or pickle an ActionSampler, got "
                f"{self._log.path!r}"
            )

    def reset(self) -> None:
        """Drop the last chunk, at the end of an episode; the number of the tick continues."""
        with self._alone, self._order.use(self._tensors), without_autograd():
            self._continues = False

    def restore(self, tick: int, chunk: Tensor | None = None) -> None:
        """Continue from another tick.

        Args:
            tick: number of the next tick.
            chunk: the last chunk `[B, horizon, action_dim]`, in the sampler's dtype and on its
                device; None for no earlier chunk, as after `reset`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
        """
        number = check_int("tick", tick, 0, 2**32 - 1)
        if chunk is not None:
            self._check_unlogged()
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
        self._warm = WarmStart.of(
            self.plan, self._first, self.seed, self.shape, self.dtype, self.device, self._impl
        )
        self._order = StreamOrder(self.device)

    def __getstate__(self) -> dict[str, Any]:
        self._check_unlogged()
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
