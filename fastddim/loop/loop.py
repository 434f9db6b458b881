"""The loop of one model and shape: buffers that stay, and the steps of a plan between them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastddim import philox, transfer
from fastddim.adapter import warn_of_training
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.buffers import Buffers, Inpainting, row_major
from fastddim.loop.capture import check_outer_capture
from fastddim.loop.counters import Counters
from fastddim.loop.inputs import Inputs
from fastddim.loop.masks import check_known
from fastddim.loop.modes import NOTHING, OneAtATime, without_autograd
from fastddim.loop.noise import check_noise_source, draw, noise_at
from fastddim.loop.output import check_out, own_copy
from fastddim.loop.program import LoopPrograms, Program, Run
from fastddim.loop.reports import check_progress, progress_bar
from fastddim.loop.setup import Setup
from fastddim.loop.start import check_first_step, seed_of
from fastddim.loop.step import Step
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import Callback, CallOptions, NoiseSource, Reporting
from fastddim.philox import Samples
from fastddim.plan import Plan
from fastddim.stopping import STOP
from fastddim.transforms import check_no_tangent, transformed
from fastddim.validation import (
    check_bool,
    check_finite_output,
    check_initial,
    readable,
)

_SILENT = Reporting()


class Loop:
    """Runs plans of one kind for one model and shape; prepared once, run many times."""

    # A buffer made under the caller's inference mode could not be written to outside it.
    @torch.inference_mode(False)
    def __init__(self, setup: Setup) -> None:
        plan, device = setup.plan, setup.device
        self._backend = setup.backend
        self._graph = setup.graph
        self._captures = setup.captures
        self._alone = OneAtATime(
            "Sampler: expected one call at a time, got another from a callback or a thread"
        )
        self.buffers = Buffers.allocate(
            plan.kind,
            setup.shape,
            len(setup.table),
            dtype=setup.dtype,
            model_dtype=setup.model_dtype,
            device=device,
            channels_last=setup.channels_last,
            with_x_0=True,
        )
        self.counters = Counters(plan, setup.shape[0], device)
        self.step = Step(
            plan.kind, setup.backend, self.buffers, self.counters, captured=self._captures
        )
        self._programs = LoopPrograms(
            setup.graph, setup.backend, self.buffers, self.counters, self.step
        )
        self._order = StreamOrder(device)
        # The host's record of values that the buffers hold already: the table, the timesteps, and
        # the plan whose rows mix known data.
        self._table: Hashable = None
        self._timesteps: list[int] = []
        self._mixed_by: Plan | None = None
        # Whether a graph of the caller's writes the buffers too, whenever it is replayed.
        self._lent = False
        # Whether the model is evaluated in inference mode where nothing is captured. What stays
        # between calls is made outside of it, and so is all that is captured.
        self.inference = False
        self.load(setup)

    @torch.inference_mode(False)
    def load(self, setup: Setup) -> None:
        """Take over everything in `setup` that is not in its key."""
        self.plan = setup.plan
        self._arguments, self._inputs = setup.arguments, Inputs()
        self.step.model, self.step.uncond_model = setup.model, setup.uncond_model
        self._evaluated = False
        self.step.denoised_fn = setup.denoised_fn
        self.step.check = self._refuse_nonfinite if setup.check_finite else None
        self._check_finite = setup.check_finite
        self._late_start = setup.late_start
        self._programs.follow(setup.model, setup.uncond_model, setup.denoised_fn)
        with self._order.use(self._tensors):
            self._load_numbers(setup)

    def _load_numbers(self, setup: Setup) -> None:
        """Write tables and timesteps, unless they are those of the loop's last setup."""
        table, buffers = (setup.table, setup.first_half), self.buffers
        values = _values(table) if self._captures else None
        if values is None or values != self._table:
            transfer.write(setup.table, buffers.table)
            if buffers.first_half is not None and setup.first_half is not None:
                transfer.write(setup.first_half, buffers.first_half)
        timesteps = setup.plan.timesteps.tolist()
        if timesteps != self._timesteps:
            self.counters.load(setup.plan.timesteps)
        self._table, self._timesteps = values, timesteps

    def unload(self) -> None:
        """Let go of the caller's objects; call `load` before the next run."""
        del self.plan, self._arguments, self._inputs
        self._mixed_by = None
        del self.step.model, self.step.uncond_model, self.step.denoised_fn, self.step.check
        self._programs.unfollow()

    def sample(
        self,
        options: CallOptions,
        arguments: ModelArguments | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Draw one batch; see `fastddim.sample` for the options.

        Args:
            arguments: the model's, in place of those of the setup.
            out: the tensor that the samples are written into.
        """
        state = self.buffers.state
        check_outer_capture(self._graph, state.device, self._check_finite)
        noise, x_T = options.noise, options.x_T
        check_noise_source(noise, self.plan.steps, state)
        first = check_first_step(options, self.plan.steps, self.plan.kind)
        mask, known = options.mask, options.known
        if mask is not None or known is not None:
            # By NumPy, since torch would allocate the answer.
            clean = bool(self.plan.alphas_cumprod.numpy()[0] == 1)
            mask, known = check_known(mask, known, state, clean)
        if x_T is not None:
            check_initial("x_T", x_T, tuple(state.shape), state.dtype, state.device)
        samples = philox.check_samples(
            seed_of(options, noisy=self.plan.kind.noisy),
            len(state),
            sample_offset=options.sample_offset,
            device=state.device,
        )
        if x_T is None:
            if self._late_start is not None:
                self._late_start.warn()
            if noise is not None and not isinstance(noise, Tensor):
                x_T = draw(noise, state)
        return self.run(
            x_T,
            options,
            samples=samples,
            noise=noise,
            mask=mask,
            known=known,
            first=first,
            arguments=arguments,
            out=out,
        )

    def run(
        self,
        x: Tensor | None,
        reporting: Reporting = _SILENT,
        *,
        samples: Samples | None = None,
        noise: NoiseSource = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        first: int = 0,
        arguments: ModelArguments | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Walk the plan from `x`, or from the latents of `samples`, step by step or by the graph of
        all steps.

        Args:
            first: the step to begin with, before which the state is `x`.
            out: the tensor that the last state is written into.

        Returns:
            The last state, or all of them.
        """
        check_progress(reporting, self._graph)
        check_bool("return_trajectory", reporting.return_trajectory)
        if out is not None:
            check_out(out, self.buffers.state, reporting)
        if not self._evaluated:
            self._look_at_modes()
        noise = noise if self.plan.kind.noisy else None
        with self._alone, self._order.use(self._tensors), without_autograd():
            if transformed():
                self._refuse_tangents(x_T=x, noise=noise, known=known)
            masked = mask is not None
            if masked and self.step.inpainting is None:
                self.step.inpainting = Inpainting.allocate(self.buffers, self.plan.steps)
            latents = x is None and not masked
            joins = transfer.captured(self.buffers.state.device)
            self._lent |= joins
            program = None
            # A graph that is asked for while the caller captures one was refused before.
            if self._captures and not joins:
                program = self._program(noise, reporting, masked, first, latents)
            inputs = self._inputs if program is None else program.inputs
            inputs.load(self._arguments if arguments is None else arguments)
            self._begin(program, x, samples, mask, known, first)
            with progress_bar(reporting.progress, first, self.plan.steps) as bar:
                if program is not None and program.whole:
                    return self._replay_whole(program, noise, first, bar, out)
                trajectory = self._new_trajectory(first) if reporting.return_trajectory else None
                with self._mode_of_walk(program):
                    end = self._walk(program, noise, reporting, trajectory, masked, first, bar)
            if trajectory is None:
                return own_copy(self.buffers.state, out)
        # A view of a part would keep all of the memory.
        return trajectory if end == self.plan.steps else trajectory[: end - first + 1].clone()

    def _mode_of_walk(self, program: Program | None) -> AbstractContextManager[Any]:
        # The outputs of two models are put together in memory that stays.
        if not self.inference or program is not None or self.step.uncond_model is not None:
            return NOTHING
        return torch.inference_mode()

    def _look_at_modes(self) -> None:
        """Warn of networks in training mode, once and not before they are evaluated: a module that
        makes a `Sampler` of itself is in training mode until it is complete.
        """
        self._evaluated = True
        warn_of_training("model", self.step.model)
        if self.step.uncond_model is not None:
            warn_of_training("uncond_model", self.step.uncond_model)

    def _walk(
        self,
        program: Program | None,
        noise: NoiseSource,
        reporting: Reporting,
        trajectory: Tensor | None,
        masked: bool,
        first: int,
        bar: Any,
    ) -> int:
        """Take the steps of the plan one by one (arXiv 2010.02502, section 4.2) until the callback
        stops it, and return the index of the step that would come next.
        """
        state, now = self.buffers.state, self.counters.now
        callback, take, arguments = reporting.callback, self.step.take, self._inputs.arguments
        with_x_0, told = callback is not None, callback is not None or bar is not None
        if program is None and noise is None and trajectory is None and not told:
            self.step.take_several(self.plan.steps - first, arguments, masked=masked)
            return self.plan.steps
        for s in range(first, self.plan.steps):
            if program is not None:
                self._replay(program, noise, s)
            else:
                z = noise_at(noise, s, state)
                take(now, z, arguments=arguments, with_x_0=with_x_0, masked=masked)
            if trajectory is not None:
                trajectory[s + 1 - first].copy_(state)
            if told and self._tell(s, callback, bar):
                return s + 1
        return self.plan.steps

    def _tell(self, s: int, callback: Callback | None, bar: Any) -> bool:
        """Report a step to the callback and the bar; True where the run is to end after it."""
        state, x_0, stopped = self.buffers.state, self.buffers.x_0, False
        if callback is not None and x_0 is not None:
            stopped = callback(s, self._timesteps[s], row_major(state), row_major(x_0)) is STOP
        if bar is not None:
            bar.update()
        return stopped

    def _replay_whole(
        self, program: Program, noise: NoiseSource, first: int, bar: Any, out: Tensor | None
    ) -> Tensor:
        """Replay the graph of all steps; its progress is shown at the end."""
        self._replay(program, noise, first)
        if bar is not None:
            bar.update(self.plan.steps - first)
        made = self.buffers.state if program.trajectory is None else program.trajectory
        return own_copy(made, out)

    def _begin(
        self,
        program: Program | None,
        x: Tensor | None,
        samples: Samples | None,
        mask: Tensor | None,
        known: Tensor | None,
        first: int,
    ) -> None:
        """Write everything that a run begins with, except the part that its program writes."""
        counters, state = self.counters, self.buffers.state
        whole = program is not None and program.whole
        # A state in the middle of a run is not the latents that known data are mixed with.
        resumed = x is not None and first > 0 and mask is not None
        if not whole:
            counters.rewind()
        if samples is not None and (x is None or resumed or self.plan.kind.noisy):
            counters.load_samples(samples, known=not self._lent)
        if program is not None and program.latents:
            return
        if x is None or resumed:
            keys = (counters.each[0] if whole else counters.now).keys
            self._backend.normal_out(keys, philox.LATENTS, state)
        else:
            state.copy_(x)
        if mask is not None and known is not None:
            self._load_known(mask, known)
        if x is not None and resumed:
            state.copy_(x)
        if not whole:
            counters.skip_to(first)
            self.buffers.follow_state()

    def _load_known(self, mask: Tensor, known: Tensor) -> None:
        inpainting = self.step.inpainting
        assert inpainting is not None
        inpainting.load(mask, known, self.buffers.state)
        if self._lent or self._mixed_by is not self.plan:
            inpainting.load_rows(self.plan.alphas_cumprod, slice(None))
            self._mixed_by = self.plan

    def _new_trajectory(self, first: int) -> Tensor:
        state = self.buffers.state
        trajectory = state.new_empty((self.plan.steps - first + 1, *state.shape))
        trajectory[0].copy_(state)
        return trajectory

    def _refuse_tangents(self, **given: Any) -> None:
        """Refuse dual tensors, from now on also as the model's outputs."""
        for name, value in given.items():
            if isinstance(value, Tensor):
                check_no_tangent(name, value)
        self.step.check = self._refuse_tangent

    def _refuse_tangent(self, output: Tensor) -> None:
        check_no_tangent("model output", output)
        if self._check_finite:
            self._refuse_nonfinite(output)

    def _refuse_nonfinite(self, output: Tensor) -> None:
        def where() -> str:
            s = int(self.counters.now.step)
            return f"at step {s} (timestep {self._timesteps[s]})"

        check_finite_output(output, where)

    def _program(
        self, noise: NoiseSource, reporting: Reporting, masked: bool, first: int, latents: bool
    ) -> Program | None:
        """The graph for this run; None where it cannot be captured."""
        with_x_0 = reporting.callback is not None
        run = Run(
            noise, with_x_0, reporting.return_trajectory, masked, first, latents, reporting.progress
        )
        return self._programs.choose(run, self._arguments)

    def _replay(self, program: Program, noise: NoiseSource, first: int) -> None:
        staged = program.noise
        if staged is not None and isinstance(noise, Tensor):
            # In one copy: a launch for each step would take longer than the steps of a small model.
            staged.copy_(noise[first : first + len(staged)])
        elif staged is not None:
            for s, row in enumerate(staged, start=first):
                z = noise_at(noise, s, self.buffers.state)
                assert z is not None
                row.copy_(z)
        program.graph.replay()

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.buffers.tensors()
        yield from self.counters.tensors()
        yield from self.step.tensors()
        yield from self._inputs.tensors()
        for program in self._programs.values():
            yield from program.tensors()


def _values(tensors: Iterable[Tensor | None]) -> Hashable:
    """The bits of tensors; None where some cannot be read, or not without waiting for a device."""
    given = [tensor for tensor in tensors if tensor is not None]
    return tuple(t.numpy().tobytes() for t in given) if all(map(readable, given)) else None
