"""The loop: static buffers and one step program, which reads everything that changes from device
memory.

Per step: the model is evaluated at (state, t), the fused update writes the next state over the old
one, and the counters advance. Nothing in it is a Python number that a captured graph would freeze,
waits for the device, or moves data between devices: so the same step program runs eagerly, is
captured as one CUDA graph a step, or as one for all steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from fastddim import adapter, backends, graph, philox, transfer
from fastddim.adapter import Model
from fastddim.buffers import aligned_rows
from fastddim.counters import Counters, Position
from fastddim.graph import check_graph
from fastddim.philox import Samples
from fastddim.plan import Fit, PerStep, Plan, Update, known_rows, make_plan, to_table
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.validation import (
    check_bool,
    check_device,
    check_dtype,
    check_int,
    check_like,
    check_mask,
    check_model_output,
    check_same_dtype,
    check_state,
)

Callback: TypeAlias = Callable[[int, int, Tensor, Tensor], None]
NoiseSource: TypeAlias = Tensor | torch.Generator | Sequence[torch.Generator] | None
DenoisedFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Setup:
    """What a loop is made for, all of it checked."""

    model: Model
    plan: Plan
    table: Tensor  # [R, K]
    predicting: Tensor | None  # [R, K]
    denoised_fn: DenoisedFn | None
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    backend: backends.Backend
    graph: bool | str
    check_finite: bool
    model_kwargs: dict[str, Any]

    @property
    def model_dtype(self) -> torch.dtype:
        return adapter.own_dtype(self.model) or self.dtype

    @property
    def captures(self) -> bool:
        if self.graph == "auto":
            joins = transfer.captured(self.device)
            return graph.available(self.device) and not (self.check_finite or joins)
        return self.graph is not False

    @property
    def key(self) -> tuple[Any, ...]:
        """All that a loop's buffers and step program depend on; what else there is, `load` sets."""
        return (
            self.plan.steps,
            self.plan.noisy,
            self.plan.guided,
            self.plan.table.ndim,
            self.plan.fit,
            self.plan.order,
            self.plan.refine,
            self.plan.rederived,
            self.denoised_fn is None,
            self.shape,
            self.device,
            self.dtype,
            self.model_dtype,
            self.backend.__name__,
            self.graph,
        )


def make_setup(
    model: Model,
    plan: Plan,
    shape: tuple[int, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    impl: str,
    graph: bool | str,
    check_finite: bool,
    model_kwargs: Mapping[str, Any] | None,
    denoised_fn: DenoisedFn | None = None,
) -> Setup:
    predicting = plan.predicting
    if predicting is not None:
        predicting = to_table(predicting, compute_dtype(dtype), predicting.device)
    return Setup(
        model=model,
        plan=plan,
        predicting=predicting,
        denoised_fn=denoised_fn,
        model_kwargs=check_model_kwargs(model_kwargs),
        backend=backends.choose(impl, device),
        table=to_table(plan.table, compute_dtype(dtype), plan.table.device),
        shape=shape,
        device=device,
        dtype=dtype,
        graph=graph,
        check_finite=check_finite,
    )


class Program(NamedTuple):
    """A captured part of the loop, one step or all, and what it reads and writes beside the loop's
    buffers.
    """

    graph: graph.Graph
    inputs: graph.Inputs
    noise: Tensor | None  # [steps, B, …]
    trajectory: Tensor | None  # [steps, B, …], the states after each step

    def tensors(self) -> list[Tensor]:
        own = [t for t in (self.noise, self.trajectory) if t is not None]
        return [*self.inputs.tensors, *own]


class Inpainting(NamedTuple):
    """Known data, and what mixes it for each step; like the state but for the table."""

    mask: Tensor
    data: Tensor
    x_T: Tensor
    known: Tensor
    table: Tensor  # [S, K]


class Loop:
    """Runs plans of one kind for one model and shape; prepared once, run many times."""

    # A buffer made under the caller's inference mode could not be written to outside it.
    @torch.inference_mode(False)
    def __init__(self, setup: Setup) -> None:
        plan, shape, device = setup.plan, setup.shape, setup.device
        self._backend = setup.backend
        self._graph = setup.graph
        self._captures = setup.captures
        self._whole = setup.captures and setup.graph == "loop"
        self._idle = threading.Lock()
        batch = shape[0]
        model_batch = 2 * batch if plan.guided else batch

        self.state = torch.zeros(shape, dtype=setup.dtype, device=device)
        self.x_0 = torch.zeros_like(self.state)
        separate = plan.guided or setup.model_dtype != setup.dtype
        self._next_input = (
            torch.zeros((model_batch, *shape[1:]), dtype=setup.model_dtype, device=device)
            if separate
            else None
        )
        self.table = torch.zeros_like(setup.table, device=device)
        self._allocate_extras(setup)
        self._counters = Counters(plan, batch, device, unrolled=self._whole)
        self._parameters: Any = None
        # None: cannot be captured.
        self._programs: graph.Recent[Program | None] = graph.Recent()
        self._turns = graph.Turns(device)
        self.load(setup)

    def _allocate_extras(self, setup: Setup) -> None:
        """What only some kinds of steps have."""
        plan, like, batch = setup.plan, self.state, setup.shape[0]
        self._history = torch.zeros_like(like, dtype=setup.model_dtype) if plan.order > 1 else None
        self._base = torch.zeros_like(like) if plan.refine else None
        hooked = setup.predicting is not None
        self._predicting = torch.zeros_like(self.table) if hooked else None
        self._epsilon = torch.zeros_like(like) if hooked and not plan.rederived else None
        self._rows = self.table.new_zeros((batch, self.table.shape[1])) if plan.fit else None
        self._each = torch.arange(batch, device=like.device)
        self._inpainting: Inpainting | None = None
        plain = plan.fit is None and not hooked and not plan.refine
        # Captured graphs and fake tensors are made for operators.
        plain &= not self._captures and type(like) is Tensor
        self._make_loop_step = getattr(self._backend, "loop_step", None) if plain else None
        self._loop_step: backends.LoopStep | None = None

    @torch.inference_mode(False)
    def load(self, setup: Setup) -> None:
        """Take over everything in `setup` that is not in its key."""
        self.model = setup.model
        self.plan = setup.plan
        self.model_kwargs = setup.model_kwargs
        self.denoised_fn = setup.denoised_fn
        self.check_finite = setup.check_finite
        self._model_state = graph.ModelState(setup.model, setup.denoised_fn)
        timesteps = setup.plan.timesteps
        self._timestep_list = timesteps.tolist()
        with self._turns.turn(self._tensors):
            self.table.copy_(transfer.upload(setup.table, self.table.device))
            if self._predicting is not None and setup.predicting is not None:
                self._predicting.copy_(transfer.upload(setup.predicting, self.table.device))
            self._counters.load(timesteps)

    def unload(self) -> None:
        """Let go of what is the caller's; `load` comes before the next run."""
        del self.model, self.plan, self.model_kwargs, self.denoised_fn, self._model_state

    def sample(
        self,
        *,
        seed: int | Sequence[int] | Tensor,
        sample_offset: int,
        x_T: Tensor | None,
        noise: NoiseSource,
        mask: Tensor | None,
        known: Tensor | None,
        progress: bool,
        callback: Callback | None,
        return_trajectory: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw one batch; see `fastddim.sample` for the arguments."""
        check_watching(progress, callback, return_trajectory, self._graph)
        graph.check_outer_capture(self._graph, self.state.device, self.check_finite)
        shape, device = tuple(self.state.shape), self.state.device
        samples = philox.check_samples(seed, shape[0], sample_offset=sample_offset)
        self._check_noise(noise)
        if mask is not None or known is not None:
            self._check_known(mask, known)
        if x_T is not None:
            check_initial("x_T", x_T, shape, self.state.dtype, device)
        elif noise is not None and not isinstance(noise, Tensor):
            x_T = draw(noise, self.state)
        return self.run(
            x_T,
            samples=samples,
            noise=noise,
            mask=mask,
            known=known,
            progress=progress,
            callback=callback,
            return_trajectory=return_trajectory,
        )

    def run(
        self,
        x: Tensor | None,
        *,
        samples: Samples | None = None,
        noise: NoiseSource = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Walk the plan from `x`, or from the latents of `samples`, step by step or by the graph of
        all steps.
        """
        noise = noise if self.plan.noisy else None
        with (
            self._alone(),
            self._turns.turn(self._tensors),
            _without_autograd(),
        ):
            masked = mask is not None
            if masked and self._inpainting is None:
                self._inpainting = self._new_inpainting()
            program = self._program(noise, callback is not None, return_trajectory, masked)
            self._begin(x, samples)
            if mask is not None and known is not None:
                self._load_known(mask, known)
            trajectory = self._new_trajectory() if return_trajectory else None
            if program is not None and self._whole:
                self._replay(program, noise, 0)
                if trajectory is not None and program.trajectory is not None:
                    trajectory[1:].copy_(program.trajectory)
                for _ in self._step_indices(progress):
                    pass
            else:
                for s in self._step_indices(progress):
                    if program is not None:
                        self._replay(program, noise, s)
                    else:
                        at, z = self._counters.now, self._noise_of(noise, s)
                        self.step(at, z, with_x_0=callback is not None, masked=masked)
                    if trajectory is not None:
                        trajectory[s + 1].copy_(self.state)
                    if callback is not None:
                        callback(s, self._timestep_list[s], self.state.clone(), self.x_0.clone())
            x = self.state.clone()
        return x if trajectory is None else (x, trajectory)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._idle.acquire(blocking=False):
            raise RuntimeError(
                "Sampler: expected one call at a time, got another from a callback or a thread"
            )
        try:
            yield
        finally:
            self._idle.release()

    def step(
        self,
        at: Position,
        noise: Tensor | None,
        *,
        with_x_0: bool,
        masked: bool,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Take one step, and move on where `at` is the position that moves: the step program, all
        that runs or is captured between two steps.
        """
        kwargs = self.model_kwargs if model_kwargs is None else model_kwargs
        start = self.state
        if self._base is not None:
            start = self._base.copy_(self.state)
            for _ in range(self.plan.refine):
                self._update(at, start, self._checked(self._evaluate(at, kwargs)), None)
        output = self._evaluate(at, kwargs)
        bare = noise is None and not (with_x_0 or masked or self.check_finite)
        if bare and self._make_loop_step is not None and self._take_in_one_call(output):
            return
        self._update(at, start, self._checked(output), noise, with_x_0=with_x_0, masked=masked)
        if at is self._counters.now:
            self._counters.advance(self._backend)

    def _evaluate(self, at: Position, model_kwargs: Mapping[str, Any]) -> Any:
        return adapter.output_tensor(self.model(self._model_input, at.t, **model_kwargs))

    def _checked(self, output: Any) -> Tensor:
        check_model_output("model output", output, self.state, guided=self.plan.guided)
        if self.check_finite:
            self._refuse_nonfinite(output)
        return cast(Tensor, output)

    def _take_in_one_call(self, output: Any) -> bool:
        """Update and advance by the backend's `loop_step`; False where it cannot take `output`."""
        if self._loop_step is None:
            assert self._make_loop_step is not None
            like = self._checked(output)
            if not like.is_contiguous() or not like.data_ptr():
                like = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            counters = self._counters
            self._loop_step = self._make_loop_step(
                self.state,
                like,
                self.table,
                counters.now.row,
                keys=counters.now.keys if self.plan.noisy else None,
                history=self._history,
                model_input=self._next_input,
                counters=counters.counting,
                timesteps=counters.timesteps,
                t=counters.now.t,
            )
        return self._loop_step(output)

    def _update(
        self,
        at: Position,
        x: Tensor,
        output: Tensor,
        noise: Tensor | None,
        *,
        with_x_0: bool = False,
        masked: bool = False,
    ) -> None:
        """The fused update of `x` into the state, and what some kinds of steps do before it."""
        fit, table = self.plan.fit, self.table
        if self._predicting is not None:
            x, output = self._predict(at, x, output, self._predicting)
            fit = None if fit is None else fit._replace(rescale=0.0)
        table, row = self._fitted(at, x, output, table, fit)
        known = self._mix_known(at) if masked else None
        self._backend.update_out(
            x,
            output,
            table,
            row,
            noise=noise,
            keys=at.keys if self.plan.noisy and noise is None else None,
            history=self._history,
            mask=None if known is None else known.mask,
            known=None if known is None else known.known,
            out=self.state,
            x_0=self.x_0 if with_x_0 else None,
            model_input=self._next_input,
            epsilon=self._history,
        )

    def _predict(
        self, at: Position, x: Tensor, output: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the second half of a step reads as state and model output, with the user's function
        between the halves.
        """
        assert self.denoised_fn is not None
        fit = self.plan.fit
        table, row = self._fitted(at, x, output, table, fit and fit._replace(ratio=0.0))
        self._write(x, output, table, row, self.x_0, epsilon=self._epsilon)
        x_0 = self.denoised_fn(self.x_0, at.t[: len(self.x_0)])
        check_like("denoised_fn's result", x_0, "the state", self.state)
        return (x if self._epsilon is None else self._epsilon), x_0

    def _fitted(
        self, at: Position, x: Tensor, output: Tensor, table: Tensor, fit: Fit | None
    ) -> tuple[Tensor, Tensor]:
        """The table and the rows in it of this step."""
        if self._rows is None or fit is None or (fit.rescale == 0 and fit.ratio == 0):
            return table, at.row
        self._backend.fit_rows(x, output, table, at.row, fit, self._rows)
        return self._rows, self._each

    def _mix_known(self, at: Position) -> Inpainting:
        """Known data as they are after this step."""
        own = self._inpainting
        assert own is not None
        self._write(own.data, own.x_T, own.table, at.step, own.known)
        return own

    def _write(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: Tensor,
        out: Tensor,
        epsilon: Tensor | None = None,
    ) -> None:
        """An update without noise and all else that only the step itself has."""
        self._backend.update_out(
            x,
            output,
            table,
            row,
            noise=None,
            keys=None,
            out=out,
            x_0=None,
            model_input=None,
            epsilon=epsilon,
        )

    @property
    def _model_input(self) -> Tensor:
        return self.state if self._next_input is None else self._next_input

    def _begin(self, x: Tensor | None, samples: Samples | None) -> None:
        """Write what a run begins with and the graph of the whole loop does not write."""
        counters = self._counters
        if not self._whole:
            counters.rewind()
        if samples is not None and (x is None or self.plan.noisy):
            counters.load_samples(samples)
        if x is None:
            keys = (counters.each[0] if self._whole else counters.now).keys
            self._backend.normal_out(keys, philox.LATENTS, self.state)
        else:
            self.state.copy_(x)
        if not self._whole:
            self._follow_state()

    def _follow_state(self) -> None:
        """Write what goes before the first step besides the state, from the state."""
        if self._history is not None:
            self._history.zero_()
        if self._next_input is not None:
            for part in self._next_input.chunk(2 if self.plan.guided else 1):
                part.copy_(self.state)

    def _new_inpainting(self) -> Inpainting:
        mask, data, x_T, known = (torch.zeros_like(self.state) for _ in range(4))
        table = self.table.new_zeros((self.plan.steps, self.table.shape[1]))
        return Inpainting(mask, data, x_T, known, table)

    def _load_known(self, mask: Tensor, known: Tensor) -> None:
        own = self._inpainting
        assert own is not None
        own.mask.copy_(mask)
        own.data.copy_(known)
        own.x_T.copy_(self.state)
        rows = known_rows(self.plan.alphas_cumprod)
        own.table.copy_(transfer.upload(rows, own.table.device))

    def _new_trajectory(self) -> Tensor:
        trajectory = self.state.new_empty((self.plan.steps + 1, *self.state.shape))
        trajectory[0].copy_(self.state)
        return trajectory

    def _step_indices(self, progress: bool) -> Any:
        if not progress:
            return range(self.plan.steps)
        from tqdm.auto import tqdm

        return tqdm(range(self.plan.steps), desc="sampling", unit="step")

    def _noise_of(self, noise: NoiseSource, s: int) -> Tensor | None:
        if noise is None:
            return None
        return noise[s] if isinstance(noise, Tensor) else draw(noise, self.state)

    def _refuse_nonfinite(self, output: Tensor) -> None:
        if not bool(output.isfinite().all()):
            s = int(self._counters.now.step)
            raise ValueError(
                "model output: expected finite values, got NaN or infinity "
                f"at step {s} (timestep {self._timestep_list[s]})"
            )

    def _program(
        self, noise: NoiseSource, with_x_0: bool, return_trajectory: bool, masked: bool
    ) -> Program | None:
        """The graph for this run, loaded with the caller's values; None where the run is eager."""
        joins = self._graph == "auto" and transfer.captured(self.state.device)
        if not self._captures or joins:
            return None
        parameters, training = self._model_state.read()
        if parameters != self._parameters:
            # Their graphs read memory that is no longer the model's.
            self._programs.clear()
            self._parameters = parameters
        kind = (
            training,
            graph.ambient(self.state.device),
            graph.signature(self.model_kwargs),
            noise.dtype if isinstance(noise, Tensor) else _listed(noise),
            with_x_0,
            return_trajectory and self._whole,
            masked,
        )
        program = self._programs.get(kind)
        if kind not in self._programs:
            program = graph.capture_if_possible(
                self._graph, lambda: self._capture(noise, with_x_0, return_trajectory, masked)
            )
        self._programs.put(kind, program)
        if program is not None:
            program.inputs.load(self.model_kwargs)
        return program

    def _capture(
        self, noise: NoiseSource, with_x_0: bool, return_trajectory: bool, masked: bool
    ) -> Program:
        device, shape = self.state.device, tuple(self.state.shape)
        positions = self._counters.each if self._whole else [self._counters.now]
        steps = len(positions)
        inputs = graph.Inputs(self.model_kwargs, device)
        generators = [] if isinstance(noise, Tensor) else _listed(noise)
        staged = None
        if noise is not None and not (generators and graph.draws_inside(generators, device)):
            dtype = noise.dtype if isinstance(noise, Tensor) else self.state.dtype
            staged = aligned_rows(steps, shape, dtype, device)
            noise, generators = staged, []
        trajectory = None
        if return_trajectory and self._whole:
            trajectory = torch.zeros((steps, *shape), dtype=self.state.dtype, device=device)

        def take_steps(positions: Sequence[Position]) -> None:
            if self._whole:
                self._follow_state()
            for s, at in enumerate(positions):
                z = self._noise_of(noise, s)
                self.step(at, z, with_x_0=with_x_0, masked=masked, model_kwargs=inputs.model_kwargs)
                if trajectory is not None:
                    trajectory[s].copy_(self.state)

        def warm_up() -> None:
            take_steps(positions[:1])
            self._counters.rewind()

        def body() -> None:
            take_steps(positions)

        self._counters.rewind()
        captured = graph.capture(body, warm_up=warm_up, device=device, generators=generators)
        return Program(captured, inputs, staged, trajectory)

    def _replay(self, program: Program, noise: NoiseSource, first: int) -> None:
        if program.noise is not None:
            for s, row in enumerate(program.noise, start=first):
                z = self._noise_of(noise, s)
                assert z is not None
                row.copy_(z)
        program.graph.replay()

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.state, self.x_0, self.table, self._each)
        yield from self._counters.tensors()
        extras = (self._next_input, self._history, self._base, self._predicting, self._epsilon)
        yield from (t for t in (*extras, self._rows) if t is not None)
        yield from self._inpainting or ()
        for program in self._programs.values():
            if program is not None:
                yield from program.tensors()

    def _check_known(self, mask: Tensor | None, known: Tensor | None) -> None:
        if known is None:
            raise ValueError("known: expected data beside mask, got None")
        if mask is None:
            raise ValueError("mask: expected a weight of known, got None")
        check_like("known", known, "the state", self.state)
        check_mask("mask", mask, self.state)
        if self.plan.alphas_cumprod[0] == 1:
            raise ValueError("mask: expected None where the first alpha_cumprod is 1, got a tensor")

    def _check_noise(self, noise: NoiseSource) -> None:
        if noise is None or isinstance(noise, torch.Generator):
            return
        if isinstance(noise, Tensor):
            check_state("noise", noise)
            expected = (self.plan.steps, *self.state.shape)
            if tuple(noise.shape) != expected:
                raise ValueError(
                    f"noise: expected shape [S, B, ...] = {expected}, got {tuple(noise.shape)}"
                )
            check_device("noise", noise, "the state", self.state.device)
            return
        check_generators("noise", noise, self.state.shape[0])


@contextmanager
def _without_autograd() -> Iterator[None]:
    """Ordinary tensors without gradients, whatever the caller's modes are; no mode is entered where
    it is on already, since that takes as long as a launch.
    """
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            modes.enter_context(torch.no_grad())
        yield


@contextmanager
def borrowed_loop(setup: Setup) -> Iterator[Loop]:
    """A loop for one call: one that an earlier call left with its graphs, or a new one.

    After an error it is not kept, nor where it holds a function of the caller's beside the model.
    """
    if not setup.captures or setup.denoised_fn is not None:
        yield Loop(setup)
        return
    loop: Loop | None = graph.SHELF.take(setup.model, setup.key)
    if loop is None:
        loop = Loop(setup)
    else:
        loop.load(setup)
    yield loop
    loop.unload()
    graph.SHELF.put_back(setup.model, setup.key, loop)


def sampling_setup(
    model: Model,
    steps: int | Sequence[int] | Tensor,
    update: Update,
    *,
    shape: Sequence[int] | None,
    batch_size: int,
    schedule: Schedule | None,
    spacing: str,
    steps_offset: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    impl: str,
    graph: str | bool,
    check_finite: bool,
    model_kwargs: Mapping[str, Any] | None,
    order: int,
    denoised_fn: DenoisedFn | None,
) -> Setup:
    """The checked arguments of `sample` that do not change from call to call of a `Sampler`."""
    check_model(model)
    if denoised_fn is not None and not callable(denoised_fn):
        raise TypeError(f"denoised_fn: expected a callable, got {type(denoised_fn).__name__}")
    resolved = resolve_shape(model, shape, batch_size)
    state_dtype = check_dtype("dtype", dtype) if dtype is not None else torch.float32
    target = resolve_device(model, device)
    check_bool("check_finite", check_finite)
    check_graph(graph, target, check_finite)
    plan = make_plan(
        resolve_schedule(model, schedule),
        steps,
        update.checked(resolved[0], per_step=True),
        spacing=spacing,
        steps_offset=steps_offset,
        order=order,
        hooked=denoised_fn is not None,
    )
    return make_setup(
        model,
        plan,
        resolved,
        device=target,
        dtype=state_dtype,
        impl=impl,
        graph=graph,
        check_finite=check_finite,
        model_kwargs=model_kwargs,
        denoised_fn=denoised_fn,
    )


class Sampler:
    """Sampling prepared once: checked arguments, plan, coefficient table, buffers, CUDA graph.

    `sampler(seed=3)` then draws a batch. The arguments are those of `fastddim.sample` that do not
    change from call to call. Buffers and graphs are the sampler's own and go with it.

    Attributes:
        plan: timesteps and coefficients, a `fastddim.plan.Plan`.
        shape: (B, …) of the state.
        dtype: of the state.
        device: of the state.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range; the message names
            it.
    """

    def __init__(
        self,
        model: Model,
        steps: int | Sequence[int] | Tensor,
        *,
        shape: Sequence[int] | None = None,
        batch_size: int = 1,
        schedule: Schedule | None = None,
        spacing: str = "uniform",
        steps_offset: int = 0,
        eta: PerStep = 0.0,
        variance: str = "small",
        prediction: str = "epsilon",
        clip: float | None = None,
        rederive_eps: bool = False,
        guidance_scale: PerStep | None = None,
        temperature: PerStep = 1.0,
        guidance_rescale: float = 0.0,
        dynamic_thresholding_ratio: float | None = None,
        sample_max_value: float | None = None,
        denoised_fn: DenoisedFn | None = None,
        order: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        graph: str | bool = "auto",
        check_finite: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        setup = sampling_setup(
            model,
            steps,
            Update(
                eta,
                variance,
                prediction,
                clip,
                rederive_eps,
                guidance_scale,
                temperature,
                guidance_rescale,
                dynamic_thresholding_ratio,
                sample_max_value,
            ),
            shape=shape,
            batch_size=batch_size,
            schedule=schedule,
            spacing=spacing,
            steps_offset=steps_offset,
            device=device,
            dtype=dtype,
            impl=impl,
            graph=graph,
            check_finite=check_finite,
            model_kwargs=model_kwargs,
            order=order,
            denoised_fn=denoised_fn,
        )
        self.plan = setup.plan
        self.shape = setup.shape
        self.dtype = setup.dtype
        self.device = setup.device
        self._loop = Loop(setup)

    def __call__(
        self,
        *,
        seed: int | Sequence[int] | Tensor = 0,
        sample_offset: int = 0,
        x_T: Tensor | None = None,
        noise: NoiseSource = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw one batch, in tensors that are the caller's own.

        The arguments are those of `fastddim.sample` that may change from call to call.

        Returns:
            The samples `[B, …]`, or `(samples, trajectory)` with trajectory `[S + 1, B, …]`.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, shape or range; the message
                names it.
            RuntimeError: another call is running, in a thread or around this one's callback.
        """
        return self._loop.sample(
            seed=seed,
            sample_offset=sample_offset,
            x_T=x_T,
            noise=noise,
            mask=mask,
            known=known,
            progress=progress,
            callback=callback,
            return_trajectory=return_trajectory,
        )


def draw(
    generators: torch.Generator | Sequence[torch.Generator],
    like: Tensor,
) -> Tensor:
    """Standard normals shaped like `like` from torch's generators, each on its own device.

    The same numbers as `torch.randn` of the whole batch, or of one sample per generator.
    """
    if isinstance(generators, torch.Generator):
        return _randn(like.shape, generators, like)
    return torch.cat([_randn((1, *like.shape[1:]), g, like) for g in generators])


def _randn(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    if generator.device.type == "cpu" and transfer.captured(like.device):
        raise ValueError(
            f"noise: expected generators on {like.device} while a CUDA graph is being captured, "
            "which cannot draw on the host, got one on cpu"
        )
    drawn = torch.randn(
        tuple(shape), generator=generator, dtype=like.dtype, device=generator.device
    )
    return drawn.to(like.device)


def _listed(
    generators: torch.Generator | Sequence[torch.Generator] | None,
) -> tuple[torch.Generator, ...]:
    if generators is None:
        return ()
    return (generators,) if isinstance(generators, torch.Generator) else tuple(generators)


def check_generators(name: str, value: Any, batch: int) -> None:
    if not isinstance(value, Sequence) or not all(isinstance(g, torch.Generator) for g in value):
        raise TypeError(
            f"{name}: expected a tensor, a torch.Generator or a list of them, "
            f"got {type(value).__name__}"
        )
    if len(value) != batch:
        raise ValueError(f"{name}: expected one generator per sample, {batch}, got {len(value)}")


def check_initial(
    name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A starting state must be exactly what was asked for; nothing is converted silently."""
    check_state(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    check_same_dtype(name, x, dtype)
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_model(model: Any) -> None:
    if not callable(model):
        raise TypeError(f"model: expected a callable model(x, t), got {type(model).__name__}")


def check_watching(progress: Any, callback: Any, return_trajectory: Any, graph: Any) -> None:
    check_bool("progress", progress)
    check_bool("return_trajectory", return_trajectory)
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
    if graph == "loop":
        raise ValueError(
            "callback: expected None with graph='loop', which runs all steps as one, "
            f"got {callback!r}"
        )


def check_model_kwargs(model_kwargs: Any) -> dict[str, Any]:
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(
            f"model_kwargs: expected a mapping of names to values, got {model_kwargs!r}"
        )
    return dict(model_kwargs or {})


def resolve_shape(model: Model, shape: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
    check_int("batch_size", batch_size, 1, 2**32)
    if shape is None:
        own = adapter.own_sample_shape(model)
        if own is None:
            raise ValueError(
                "shape: expected (B, ...), since the model does not tell its sample shape; got None"
            )
        return (batch_size, *own)
    if not isinstance(shape, Sequence) or not shape:
        raise TypeError(f"shape: expected a sequence of integers (B, ...), got {shape!r}")
    resolved = tuple(check_int(f"shape[{i}]", n, 0, 2**62) for i, n in enumerate(shape))
    if batch_size not in (1, resolved[0]):
        raise ValueError(f"batch_size: expected {resolved[0]}, as in shape, got {batch_size}")
    return resolved


def resolve_device(
    model: Model, device: torch.device | str | None, x: Tensor | None = None
) -> torch.device:
    if device is not None:
        if not isinstance(device, torch.device | str | int):
            raise TypeError(f"device: expected a torch.device or its name, got {device!r}")
        try:
            return torch.empty(0, device=device).device
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"device: expected a device that works here, got {device!r}: {reason}"
            ) from error
    if x is not None:
        return x.device
    return adapter.own_device(model) or torch.device("cpu")


def resolve_schedule(model: Model, schedule: Schedule | None) -> Schedule:
    if schedule is None:
        return adapter.own_schedule(model) or Schedule.linear()
    if not isinstance(schedule, Schedule):
        raise TypeError(
            "schedule: expected a fastddim.Schedule (Schedule.from_diffusers converts one), "
            f"got {type(schedule).__name__}"
        )
    return schedule
