"""Options, checked and resolved to everything that a loop is made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from fastddim import adapter, backends, transfer
from fastddim.adapter import Model, check_model
from fastddim.choices import Graph
from fastddim.loop import cuda
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.capture import check_graph
from fastddim.loop.start import LateStart
from fastddim.notices import warn_once
from fastddim.options import (
    DenoisedFn,
    InvertOptions,
    Placement,
    SamplerOptions,
    TuneOptions,
    Update,
)
from fastddim.plan import Plan, make_inversion_plan, make_plan, to_table
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.transforms import check_sampler_unfollowed
from fastddim.validation import (
    check_bool,
    check_dtype,
    check_initial,
    check_int,
    check_state,
    check_working_device,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """Everything that a loop is made for, checked."""

    model: Model
    plan: Plan
    table: Tensor  # [R, K]
    first_half: Tensor | None  # [R, K]
    denoised_fn: DenoisedFn | None
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    model_dtype: torch.dtype
    impl: str
    backend: backends.Backend
    graph: Graph
    check_finite: bool
    arguments: ModelArguments
    uncond_model: Model | None
    channels_last: bool
    late_start: LateStart | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "backend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Choose the backend anew: a pickle may come from a machine with other backends."""
        vars(self).update(state, backend=backends.choose(state["impl"], state["device"]))

    @property
    def captures(self) -> bool:
        joins = self.graph == "auto" and transfer.captured(self.device)
        return captures(self.graph, self.device, self.check_finite) and not joins

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that a loop's buffers and programs depend on; `Loop.load` sets the rest."""
        return (
            self.plan.steps,
            self.plan.table.ndim,
            self.plan.kind,
            self.shape,
            self.device,
            self.dtype,
            self.model_dtype,
            self.channels_last,
            self.backend.__name__,
            self.graph,
        )


def captures(graph: Graph, device: torch.device, check_finite: bool) -> bool:
    """True where steps are captured, unless they join a capture of the caller's."""
    if graph == "auto":
        return cuda.available(device) and not check_finite
    return graph is not False


def prepare_sampling(options: SamplerOptions, *, x_T: Tensor | None = None) -> Setup:
    """The setup of `sample`.

    Args:
        options: the caller's.
        x_T: the starting state, if any, whose shape, dtype and device are the defaults.
    """
    check_sampler_unfollowed()
    check_model(options.model)
    check_denoised_fn(options.denoised_fn)
    given = options.shape
    if x_T is not None:
        check_state("x_T", x_T)
        if given is None:
            given = tuple(x_T.shape)
            adapter.check_batched("x_T", given, options.model, tensor=True)
    shape = resolve_shape(options.model, given, options.batch_size)
    dtype, device = resolve_placement(options, options.model, x_T)
    schedule = resolve_schedule(options.model, options.schedule)
    update = options.checked(shape[0], per_step=True)
    split = options.denoised_fn is not None
    plan = make_plan(schedule, options.steps, update, split=split, **_walk(options))
    return make_setup(
        options,
        plan,
        shape,
        dtype=dtype,
        device=device,
        denoised_fn=options.denoised_fn,
        late_start=LateStart.of(plan, options.steps, options.spacing),
    )


def prepare_inversion(options: InvertOptions) -> Setup:
    """The setup of `invert`."""
    x_0 = options.x_0
    check_sampler_unfollowed()
    check_model(options.model)
    check_state("x_0", x_0)
    for name, neutral in (("eta", 0.0), ("clip", None), ("rederive_eps", False)):
        value = getattr(options, name)
        if isinstance(value, Tensor) or value != neutral:
            raise ValueError(f"{name}: expected {neutral} for an invertible step, got {value!r}")
    shape = tuple(x_0.shape)
    adapter.check_batched("x_0", shape, options.model, tensor=True)
    dtype, device = resolve_placement(options, options.model, x_0)
    check_initial("x_0", x_0, shape, dtype, device)
    schedule = resolve_schedule(options.model, options.schedule)
    update = Update(
        prediction=options.prediction,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
    ).checked(shape[0], per_step=True)
    refine = options.refine
    plan = make_inversion_plan(schedule, options.steps, update, refine=refine, **_walk(options))
    return make_setup(options, plan, shape, dtype=dtype, device=device)


def _walk(options: SamplerOptions | InvertOptions) -> dict[str, Any]:
    """The options that go into plans of both directions unchanged."""
    return {
        "spacing": options.spacing,
        "steps_offset": options.steps_offset,
        "order": options.order,
    }


def make_setup(
    options: SamplerOptions | InvertOptions,
    plan: Plan,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    denoised_fn: DenoisedFn | None = None,
    late_start: LateStart | None = None,
) -> Setup:
    """A setup for a plan, with tables in the dtype that is computed in."""
    halves = (plan.table, plan.first_half)
    table, first_half = (
        None if rows is None else to_table(rows, compute_dtype(dtype), rows.device)
        for rows in halves
    )
    assert table is not None
    apart = options.uncond_model is not None
    arguments = ModelArguments.of(
        options.model_kwargs,
        options.uncond_kwargs,
        batch=shape[0],
        guided=plan.kind.guided,
        apart=apart,
    )
    model_dtype = resolve_model_dtype(options.model, options.model_dtype, dtype)
    if apart:
        check_uncond_model(options.uncond_model, options, plan.kind.guided, model_dtype, device)
        plan = replace(plan, kind=plan.kind._replace(apart=True))
    return Setup(
        model=options.model,
        plan=plan,
        table=table,
        first_half=first_half,
        denoised_fn=denoised_fn,
        shape=shape,
        device=device,
        dtype=dtype,
        model_dtype=model_dtype,
        impl=options.impl,
        backend=backends.choose(options.impl, device),
        graph=options.graph,
        check_finite=options.check_finite,
        arguments=arguments,
        uncond_model=options.uncond_model,
        channels_last=adapter.is_channels_last(options.model, len(shape)),
        late_start=late_start,
    )


def resolve_placement(
    placement: Placement, model: Model, like: Tensor | None = None
) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the state; by default those of `like`, or float32 and the model's."""
    if placement.dtype is None:
        dtype = torch.float32 if like is None else like.dtype
    else:
        dtype = check_dtype("dtype", placement.dtype)
    device = resolve_device(model, placement.device, like)
    check_bool("check_finite", placement.check_finite)
    check_graph(placement.graph, device, placement.check_finite)
    return dtype, device


def resolve_model_dtype(
    model: Model, model_dtype: torch.dtype | None, dtype: torch.dtype
) -> torch.dtype:
    """The dtype in which the model gets the state; by default the model's own, or the state's."""
    if model_dtype is not None:
        return check_dtype("model_dtype", model_dtype)
    return adapter.own_dtype(model) or dtype


def check_denoised_fn(denoised_fn: Any) -> None:
    if denoised_fn is not None and not callable(denoised_fn):
        raise TypeError(f"denoised_fn: expected a callable, got {type(denoised_fn).__name__}")


def check_uncond_model(
    uncond_model: Any,
    placement: Placement | TuneOptions,
    guided: bool,
    model_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse an unconditional model that cannot read the input of the other one."""
    check_model(uncond_model, "uncond_model")
    if not guided:
        raise ValueError(
            f"uncond_model: expected None without guidance, got {type(uncond_model).__name__}"
        )
    own_dtype = adapter.own_dtype(uncond_model)
    if placement.model_dtype is None and own_dtype not in (None, model_dtype):
        raise ValueError(
            f"uncond_model: expected a model that reads {model_dtype} like the other one, got one "
            f"that reads {own_dtype}; pass model_dtype= where it takes both"
        )
    own_device = None if placement.device is not None else adapter.own_device(uncond_model)
    if own_device is not None and torch.empty(0, device=own_device).device != device:
        raise ValueError(
            f"uncond_model: expected the device of the state, {device}, got {own_device}"
        )


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
    adapter.check_batched("shape", resolved, model, tensor=False)
    if batch_size not in (1, resolved[0]):
        raise ValueError(f"batch_size: expected {resolved[0]}, as in shape, got {batch_size}")
    return resolved


def resolve_device(model: Model, device: Device, x: Tensor | None = None) -> torch.device:
    if device is None and x is not None:
        return x.device
    if device is None:
        device = adapter.own_device(model)
        device = "cpu" if device is None else device
    return check_working_device("device", device)


def resolve_schedule(model: Model, schedule: Schedule | None) -> Schedule:
    if schedule is None:
        schedule = adapter.own_schedule(model)
        return _assumed_schedule(model) if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(
            "schedule: expected a fastddim.Schedule (Schedule.from_diffusers converts one), "
            f"got {type(schedule).__name__}"
        )
    return schedule


def _assumed_schedule(model: Model) -> Schedule:
    kind = type(model)
    schedule = Schedule.linear()
    warn_once(
        f"no schedule is given, and a model of class {kind.__qualname__} tells none: assuming "
        f"Schedule.linear(), DDPM's {schedule.T} timesteps; pass schedule=, the one that the model "
        "was trained with",
        "schedule",
        f"{kind.__module__}.{kind.__qualname__}",
    )
    return schedule
