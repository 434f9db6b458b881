"""Sampling in a program: of `torch.compile`, `torch.export`, `torch.jit.trace` or `make_fx`.

This module imports the compiler, so it is imported only where something is traced. The compiler
follows all of its functions except `_prepare`, which works with numbers on the host.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastddim import philox
from fastddim.kept import elsewhere
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.masks import check_known
from fastddim.loop.noise import check_noise_source
from fastddim.loop.setup import (
    Setup,
    check_denoised_fn,
    prepare_inversion,
    prepare_sampling,
)
from fastddim.loop.start import check_first_step, seed_of
from fastddim.loop.walk import Functions, Mixing, Noise, Walk
from fastddim.options import (
    PER_STEP,
    Autoguidance,
    CallOptions,
    Conditioning,
    InvertOptions,
    Reporting,
    SampleOptions,
    SamplerOptions,
)
from fastddim.tracing import HELD, constant, is_jit_traced
from fastddim.validation import check_bool, check_device, check_same_dtype, check_state

Eager: TypeAlias = Callable[[Any], Tensor]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Earlier compilers do not hand a user's object on to code that they do not follow.
_HANDS_ON_OBJECTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_HANDED_ON = {"model", "denoised_fn", "x_0"} | {
    f.name for group in (Autoguidance, Conditioning, Reporting) for f in fields(group)
}
"""Options that a walk does not depend on, or that are handed on by themselves."""

_OF_SAMPLING = tuple(f.name for f in fields(SamplerOptions) if f.name not in _HANDED_ON)
_OF_INVERSION = tuple(f.name for f in fields(InvertOptions) if f.name not in _HANDED_ON)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The parts of a run that are worked out before the first step."""

    walk: Walk
    shape: tuple[int, ...]
    dtype: torch.dtype


def draw(walk: Walk, setup: Setup, options: CallOptions, eager: Eager) -> Tensor:
    """A call of a `Sampler`.

    Args:
        walk: the setup's.
        setup: the sampler's.
        options: the call's.
        eager: the call where nothing is traced.
    """
    unfit = _unfit(options, setup.check_finite)
    if unfit is not None:
        return _outside(eager, options, *unfit)
    x_T = options.x_T

    def arguments() -> ModelArguments:
        batch = setup.shape[0] if x_T is None else x_T.shape[0]
        return setup.arguments.replaced(options.model_kwargs, options.uncond_kwargs, batch=batch)

    functions = Functions(
        setup.model,
        setup.uncond_model,
        setup.denoised_fn,
        _joined(arguments, setup.shape[0] if x_T is None else x_T.shape[0]),
    )
    return _drawn(Prepared(walk, setup.shape, setup.dtype), functions, options)


def sample(options: SampleOptions, eager: Eager) -> Tensor:
    """A call of `fastddim.sample`, which is `eager` where nothing is traced."""
    unfit = _unfit(options, options.check_finite) or _inconstant(options)
    if unfit is not None:
        return _outside(eager, options, *unfit)
    check_denoised_fn(options.denoised_fn)
    values = {name: _constant(getattr(options, name)) for name in _OF_SAMPLING}
    x_T, dtype, device = options.x_T, None, None
    if x_T is not None:
        dtype, device = check_state("x_T", x_T).dtype, x_T.device
        # Sizes may be unknown numbers, and a walk does not depend on them.
        values |= {"shape": None, "batch_size": 1}
    split = options.denoised_fn is not None
    models = (options.model, options.uncond_model)
    prepared = _prepared(_sampling, *models, dtype, device, split, **values)
    if prepared is None:
        run: Tensor = _run_eagerly(eager, options)
        return run
    if x_T is not None:
        shape = tuple(x_T.shape) if options.shape is None else tuple(options.shape)
        prepared = Prepared(prepared.walk, shape, prepared.dtype)
    functions = Functions(
        *models, options.denoised_fn, _given_arguments(options, x_T, prepared.shape[0])
    )
    return _drawn(prepared, functions, options)


def invert(options: InvertOptions, eager: Eager) -> Tensor:
    """A call of `fastddim.invert`, which is `eager` where nothing is traced."""
    unfit = _unfit(options, options.check_finite) or _inconstant(options)
    if unfit is not None:
        return _outside(eager, options, *unfit)
    x_0 = check_state("x_0", options.x_0)
    values = {name: _constant(getattr(options, name)) for name in _OF_INVERSION}
    models = (options.model, options.uncond_model)
    prepared = _prepared(_inversion, *models, x_0.dtype, x_0.device, False, **values)
    if prepared is None:
        run: Tensor = _run_eagerly(eager, options)
        return run
    functions = Functions(*models, None, _given_arguments(options, x_0, x_0.shape[0]))
    with torch.no_grad():
        return _reported(prepared.walk.states(functions, x_0, Noise(None, None), None), options)


def _given_arguments(
    options: SampleOptions | InvertOptions, x: Tensor | None, batch: int
) -> tuple[dict[str, Any], ...]:
    """The arguments of each model, for a state or for a number of samples."""

    def arguments() -> ModelArguments:
        return ModelArguments.of(
            options.model_kwargs,
            options.uncond_kwargs,
            batch=batch if x is None else x.shape[0],
            guided=options.guidance_scale is not None,
            apart=options.uncond_model is not None,
        )

    return _joined(arguments, batch)


def _joined(arguments: Callable[[], ModelArguments], batch: Any) -> tuple[dict[str, Any], ...]:
    # Sizes are tensors under torch.jit.trace, and numbers in a thread that it does not trace.
    made = elsewhere(arguments) if is_jit_traced() else arguments()
    return made.joined(batch)


def _drawn(prepared: Prepared, functions: Functions, options: CallOptions) -> Tensor:
    walk, shape, dtype = prepared.walk, prepared.shape, prepared.dtype
    x = options.x_T
    if x is not None:
        _check_start(x, prepared)
    noise = options.noise if isinstance(options.noise, Tensor) else None
    with torch.no_grad():
        first = check_first_step(options, walk.steps, walk.kind)
        samples = _samples(options, x, walk, shape)
        if x is None:
            x = walk.latents(samples, shape, dtype)
        # Under torch.jit.trace sizes are tensors; the operators refuse those that do not fit.
        if not is_jit_traced():
            check_noise_source(noise, walk.steps, x)
        mixing = None
        if options.mask is not None or options.known is not None:
            mask, known = check_known(options.mask, options.known, x, walk.clean)
            x_T = walk.latents(samples, tuple(x.shape), dtype) if first else x
            mixing = Mixing(mask.to(dtype).expand_as(x).contiguous(), known.to(dtype), x_T)
        states = walk.states(functions, x, Noise(noise, samples), mixing, first)
        return _reported(states, options)


def _reported(states: list[Tensor], reporting: Reporting) -> Tensor:
    # Not every program keeps the mode without gradients.
    if check_bool("return_trajectory", reporting.return_trajectory):
        return torch.stack(states).detach()
    return states[-1].detach()


def _samples(
    options: CallOptions, x: Tensor | None, walk: Walk, shape: tuple[int, ...]
) -> philox.Samples:
    # The batch of x_T may be open, and is needed for one seed per sample alone.
    open_batch = x is not None and isinstance(options.seed, int | None)
    batch = 1 if open_batch else (shape if x is None else x.shape)[0]
    return philox.check_samples(
        seed_of(options, noisy=walk.kind.noisy),
        batch,
        sample_offset=options.sample_offset,
        device=walk.timesteps.device,
    )


def _check_start(x: Tensor, prepared: Prepared) -> None:
    """Refuse a state of another shape than the sampler's.

    The batch may differ, since a program may leave it open, unless samples have rows of their own.
    """
    walk, shape = prepared.walk, prepared.shape
    check_same_dtype("x_T", check_state("x_T", x), prepared.dtype)
    check_device("x_T", x, "the state", walk.timesteps.device)
    if is_jit_traced():
        return
    own_rows = walk.rows is not None and walk.rows.shape[1] > 1
    if tuple(x.shape[1:]) != shape[1:] or (own_rows and x.shape[0] != shape[0]):
        raise ValueError(f"x_T: expected shape {shape}, got {tuple(x.shape)}")


def _unfit(options: Any, check_finite: bool) -> tuple[str, Any] | None:
    """(name, value) of an option that no program can hold."""
    if options.callback is not None:
        return "callback", options.callback
    if options.progress:
        return "progress", options.progress
    if check_finite:
        return "check_finite", check_finite
    out = getattr(options, "out", None)
    if out is not None:
        return "out", out
    noise = getattr(options, "noise", None)
    if noise is not None and not isinstance(noise, Tensor):
        return "noise", noise
    return None


def _inconstant(options: Any) -> tuple[str, Any] | None:
    """(name, tensor) of an option that the walk depends on and that is not a constant."""
    for name in ("steps", *PER_STEP):
        value = getattr(options, name, None)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Tensor | np.ndarray):
                return name, each
    return None


def _constant(value: Any) -> Any:
    """The value with its integers, which a compiled function may not know, as constants."""
    if isinstance(value, list | tuple):
        return [_constant(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return operator.index(value)
    return value


def _outside(eager: Eager, options: Any, name: str, value: Any) -> Tensor:
    """The call itself, in a break of a compiled function; other programs cannot have one."""
    if not torch.compiler.is_dynamo_compiling():
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name}: expected what a program can hold, since sampling is traced (by torch.export, "
            f"torch.jit.trace or make_fx), got {shown}"
        )
    run: Tensor = _run_eagerly(eager, options)
    return run


def call_outside(
    owner: str,
    call: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Call a method that keeps something between calls, in a break of a compiled function.

    Args:
        owner: the class that is called, as an error names it.

    Raises:
        RuntimeError: the program is of another kind, which cannot have a break.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"{owner}: expected calls outside of programs (of torch.export, torch.jit.trace or "
            "make_fx), which cannot follow what it keeps between calls; fastddim.sample and a "
            "fastddim.Sampler can be traced"
        )
    result: Result = _run_eagerly(call, *args, **kwargs)
    return result


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="fastddim: callback, progress, check_finite, out, generators as noise, tensors as "
    "steps, eta, guidance_scale or temperature, a Stream, an ActionSampler, and arguments that are "
    "refused, have no place in programs"
)
def _run_eagerly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def _prepared(*arguments: Any, **values: Any) -> Prepared | None:
    """The result of `_prepare`.

    None where a compiled function cannot have it, or where it would raise an error: the same call
    outside of the program then raises it.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _prepare(*arguments, **values)
    if not _HANDS_ON_OBJECTS:
        return None
    name: str = _kept(*arguments, **values)
    kept: Prepared | None = getattr(HELD, name) if name else None
    return kept


@constant
def _kept(*arguments: Any, **values: Any) -> str:
    """The name in `HELD` of what was prepared, or an empty one."""
    try:
        return HELD.name_of(_prepare(*arguments, **values))
    except (TypeError, ValueError):
        return ""


def _prepare(
    prepare: Callable[..., Setup],
    model: Any,
    uncond_model: Any,
    dtype: torch.dtype | None,
    device: torch.device | None,
    split: bool,
    /,
    **values: Any,
) -> Prepared:
    """
    Args:
        prepare: makes a setup of the other arguments.
        model, uncond_model: the user's.
        dtype, device: those of the tensor that the walk starts from, if there is one.
        split: whether there is a `denoised_fn`.
        values: options.
    """

    def work() -> Prepared:
        like = None if dtype is None else torch.empty(1, dtype=dtype, device=device)
        setup = prepare(model, uncond_model, like, split, values)
        return Prepared(Walk.of(setup), setup.shape, setup.dtype)

    return elsewhere(work)


def _sampling(
    model: Any, uncond_model: Any, x_T: Tensor | None, split: bool, values: dict[str, Any]
) -> Setup:
    denoised_fn = torch.add if split else None  # Only whether there is one matters.
    options = SamplerOptions(
        model=model, uncond_model=uncond_model, denoised_fn=denoised_fn, **values
    )
    return prepare_sampling(options, x_T=x_T)


def _inversion(
    model: Any, uncond_model: Any, x_0: Tensor, split: bool, values: dict[str, Any]
) -> Setup:
    return prepare_inversion(
        InvertOptions(model=model, uncond_model=uncond_model, x_0=x_0, **values)
    )
