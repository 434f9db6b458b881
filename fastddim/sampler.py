"""The loop: static buffers and one step program, which reads everything that changes from device
memory.

Per step: the model is evaluated at (state, t), the fused update writes the next state over the old
one, and the counters advance. Nothing in it is a Python number that a captured graph would freeze,
waits for the device, or moves data between devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastddim import adapter, backends, philox
from fastddim.adapter import Model
from fastddim.philox import Keys
from fastddim.plan import Coefficient, Plan, Update, make_plan, to_table
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.validation import (
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_int,
    check_model_output,
    check_same_dtype,
    check_state,
)

Callback: TypeAlias = Callable[[int, int, Tensor, Tensor], None]
NoiseSource: TypeAlias = Tensor | torch.Generator | Sequence[torch.Generator] | None

GRAPH_MODES = ("auto", True, False, "loop")


class Loop:
    """Runs one plan on one model, shape and device; prepared once, run many times."""

    # A buffer made under the caller's inference mode could not be written to outside it.
    @torch.inference_mode(False)
    def __init__(
        self,
        model: Model,
        plan: Plan,
        shape: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        impl: str,
        model_kwargs: Mapping[str, Any] | None,
        check_finite: bool,
    ) -> None:
        self.model = model
        self.plan = plan
        self.check_finite = check_finite
        self._idle = threading.Lock()
        self.model_kwargs = check_model_kwargs(model_kwargs)
        self._backend = backends.choose(impl, device)
        self._timestep_list = plan.timesteps.tolist()
        batch = shape[0]
        model_batch = 2 * batch if plan.guided else batch
        model_dtype = adapter.own_dtype(model) or dtype

        self.state = torch.zeros(shape, dtype=dtype, device=device)
        self.x_0 = torch.zeros_like(self.state)
        separate = plan.guided or model_dtype != dtype
        self._next_input = (
            torch.zeros((model_batch, *shape[1:]), dtype=model_dtype, device=device)
            if separate
            else None
        )
        self.table = to_table(plan.table, compute_dtype(dtype), device)
        # The counters run one past the last step, where the repeated timestep keeps the read in
        # bounds.
        self._timesteps = torch.cat([plan.timesteps, plan.timesteps[-1:]]).to(device)
        self.t = torch.zeros(model_batch, dtype=torch.int64, device=device)

        first_rows = (
            torch.arange(batch, device=device) * plan.steps
            if plan.table.ndim == 3
            else torch.zeros(0, dtype=torch.int64, device=device)
        )
        self._start = torch.cat([torch.zeros_like(self.t), first_rows])
        self._counters = self._start.clone()
        self._step = self._counters[:model_batch]
        self._row = self._counters[model_batch:] if plan.table.ndim == 3 else self._step[:1]
        self._keys = Keys(
            seed=torch.zeros(batch, dtype=torch.int64, device=device),
            step=self._step[:batch],
            sample=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def run(
        self,
        x: Tensor,
        *,
        keys: Keys | None = None,
        noise: NoiseSource = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Walk the plan from `x`; see `Sampler.__call__`."""
        with self._alone(), torch.inference_mode(False), torch.no_grad():
            self._reset(x, keys)
            trajectory = self._new_trajectory() if return_trajectory else None
            for s in self._step_indices(progress):
                self.step(self._noise_of(noise, s), s, with_x_0=callback is not None)
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

    def latents(self, keys: Keys) -> Tensor:
        """x_T of the keys, as `philox.initial_latents` specifies it."""
        x_T = torch.empty_like(self.state)
        self._backend.normal_out(keys, philox.LATENTS, x_T)
        return x_T

    def step(self, noise: Tensor | None, s: int, *, with_x_0: bool) -> None:
        """The step program; `s` only serves to name the step in an error."""
        result = self.model(self._model_input, self.t, **self.model_kwargs)
        output = check_model_output(
            "model output", adapter.output_tensor(result), self.state, guided=self.plan.guided
        )
        if self.check_finite:
            self._refuse_nonfinite(output, s)
        self._backend.update_out(
            self.state,
            output,
            self.table,
            self._row,
            noise=noise,
            keys=self._keys if self.plan.noisy and noise is None else None,
            out=self.state,
            x_0=self.x_0 if with_x_0 else None,
            model_input=self._next_input,
        )
        self._counters.add_(1)
        torch.index_select(self._timesteps, 0, self._step, out=self.t)

    @property
    def _model_input(self) -> Tensor:
        return self.state if self._next_input is None else self._next_input

    def _reset(self, x: Tensor, keys: Keys | None) -> None:
        self._counters.copy_(self._start)
        torch.index_select(self._timesteps, 0, self._step, out=self.t)
        self.state.copy_(x)
        if self._next_input is not None:
            for part in self._next_input.chunk(2 if self.plan.guided else 1):
                part.copy_(x)
        if keys is not None:
            self._keys.seed.copy_(keys.seed)
            self._keys.sample.copy_(keys.sample)

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
        if noise is None or not self.plan.noisy:
            return None
        return noise[s] if isinstance(noise, Tensor) else draw(noise, self.state)

    def _refuse_nonfinite(self, output: Tensor, s: int) -> None:
        if not bool(output.isfinite().all()):
            raise ValueError(
                "model output: expected finite values, got NaN or infinity "
                f"at step {s} (timestep {self._timestep_list[s]})"
            )


class Sampler:
    """Sampling prepared once: checked arguments, plan, coefficient table, buffers.

    `sampler(seed=3)` then draws a batch. The arguments are those of `fastddim.sample` that do not
    change from call to call.
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
        eta: Coefficient = 0.0,
        variance: str = "small",
        prediction: str = "epsilon",
        clip: float | None = None,
        rederive_eps: bool = False,
        guidance_scale: Coefficient | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        graph: str | bool = "auto",
        check_finite: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        self.shape = resolve_shape(model, shape, batch_size)
        self.dtype = check_dtype("dtype", dtype) if dtype is not None else torch.float32
        self.device = resolve_device(model, device)
        check_graph(graph, self.device)
        check_bool("check_finite", check_finite)
        update = Update(eta, variance, prediction, clip, rederive_eps, guidance_scale)
        self.plan = make_plan(
            resolve_schedule(model, schedule),
            steps,
            update.checked(self.shape[0]),
            spacing=spacing,
            steps_offset=steps_offset,
        )
        self._loop = Loop(
            model,
            self.plan,
            self.shape,
            device=self.device,
            dtype=self.dtype,
            impl=impl,
            model_kwargs=model_kwargs,
            check_finite=check_finite,
        )

    def __call__(
        self,
        *,
        seed: int | Sequence[int] | Tensor = 0,
        sample_offset: int = 0,
        x_T: Tensor | None = None,
        noise: NoiseSource = None,
        progress: bool = False,
        callback: Callback | None = None,
        return_trajectory: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw one batch, the caller's own; see `fastddim.sample` for the arguments."""
        check_watching(progress, callback, return_trajectory)
        keys = philox.make_keys(
            seed, self.shape[0], sample_offset=sample_offset, device=self.device
        )
        self._check_noise(noise)
        if x_T is not None:
            check_initial("x_T", x_T, self.shape, self.dtype, self.device)
        elif noise is None or isinstance(noise, Tensor):
            x_T = self._loop.latents(keys)
        else:
            x_T = draw(noise, self._loop.state)
        return self._loop.run(
            x_T,
            keys=keys,
            noise=noise,
            progress=progress,
            callback=callback,
            return_trajectory=return_trajectory,
        )

    def _check_noise(self, noise: NoiseSource) -> None:
        if noise is None or isinstance(noise, torch.Generator):
            return
        if isinstance(noise, Tensor):
            check_state("noise", noise)
            expected = (self.plan.steps, *self.shape)
            if tuple(noise.shape) != expected:
                raise ValueError(
                    f"noise: expected shape [S, B, ...] = {expected}, got {tuple(noise.shape)}"
                )
            check_device("noise", noise, "the state", self._loop.state.device)
            return
        check_generators("noise", noise, self.shape[0])


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
    drawn = torch.randn(
        tuple(shape), generator=generator, dtype=like.dtype, device=generator.device
    )
    return drawn.to(like.device)


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


def check_watching(progress: Any, callback: Any, return_trajectory: Any) -> None:
    check_bool("progress", progress)
    check_bool("return_trajectory", return_trajectory)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")


def check_model_kwargs(model_kwargs: Any) -> dict[str, Any]:
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(
            f"model_kwargs: expected a mapping of names to values, got {model_kwargs!r}"
        )
    return dict(model_kwargs or {})


def check_graph(graph: Any, device: torch.device) -> None:
    check_choice("graph", graph, GRAPH_MODES)
    if graph in (True, "loop"):
        raise ValueError(f"graph: {graph!r} needs CUDA graph capture, not available on {device}")


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
        try:
            return torch.empty(0, device=device).device
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"device: expected a device that works here, got {device!r}: {error}"
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
