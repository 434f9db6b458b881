"""Times of loops: those of the host or those of the device, whichever are longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from loops import MODELS, diffusers, make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import measures
from .assumptions import assumed
from .operations import Tally, counted
from .rows import row

LATENT = "latent U-Net"
# Steps over which the operations of a scheduler are averaged: the first does without some.
SCHEDULER_STEPS = 10


class Counted(NamedTuple):
    """A model's operations and its parameters, which a captured loop looks at."""

    tally: Tally
    parameters: int


def count_model(name: str) -> Counted:
    """One of `loops.MODELS` on the batch of its loop."""
    model, shape = make(name)
    x, t = torch.zeros(shape), torch.full((shape[0],), 500)
    return Counted(counted(lambda: model(x, t)), _parameters(model))


def count_latent_unet() -> Counted:
    """A U-Net of Stable Diffusion 1.5's size on a guided latent of 64 × 64, in float16."""
    ordinary = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with FakeTensorMode():
            unet = (
                diffusers()
                .UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
                .eval()
            )
            x, text = torch.zeros(2, 4, 64, 64), torch.zeros(2, 77, 768)
            t = torch.full((2,), 500)
            tally = counted(lambda: unet(x, t, encoder_hidden_states=text, return_dict=False))
            return Counted(tally, _parameters(unet))
    finally:
        torch.set_default_dtype(ordinary)


def _parameters(model: Any) -> int:
    if not isinstance(model, nn.Module):
        return 0
    return len(list(model.parameters())) + len(list(model.buffers()))


def count_schedulers() -> dict[str, Tally]:
    """Operations of a step of diffusers' loops around a model that does nothing."""
    return {
        "DDIM, eta 0": _count_scheduler(diffusers().DDIMScheduler(clip_sample=False), eta=0.0),
        "DDIM, eta 1": _count_scheduler(diffusers().DDIMScheduler(clip_sample=False), eta=1.0),
        "DDPM": _count_scheduler(diffusers().DDPMScheduler(clip_sample=False)),
        "DDIM, guided": _count_scheduler(diffusers().DDIMScheduler(clip_sample=False), guided),
    }


def guided(x: Tensor, t: Tensor) -> Tensor:
    """Arithmetic of a loop with guidance, around a model that does nothing."""
    unconditional, conditional = torch.cat([x, x]).chunk(2)
    return unconditional + 3.0 * (conditional - unconditional)


def _count_scheduler(
    scheduler: Any, model: Callable[[Tensor, Tensor], Tensor] = lambda x, t: x, **options: Any
) -> Tally:
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.zeros(1, 4, 64, 64)

    def steps() -> None:
        x = x_T
        for t in scheduler.timesteps[:SCHEDULER_STEPS]:
            output = model(x, t.expand(len(x)))
            x = scheduler.step(output, t, x, generator=generator, **options).prev_sample

    return counted(steps, SCHEDULER_STEPS)


class Step(NamedTuple):
    """Seconds of a step, their bound and their parts."""

    seconds: float
    bound: str
    parts: dict[str, float]


def fastddim_step(model: Counted, graph: str, steps: int) -> Step:
    """Around a model, in a mode of `graph`."""
    device = dict(model.tally.device)
    # The update and the move to the next step.
    device["launches"] = device.get("launches", 0.0) + 2 * assumed("small_kernel")
    call = assumed("host_call")
    if graph == "graph=False":
        return _step(model.tally.host + assumed("host_step"), device, call / steps)
    call += model.parameters * assumed("host_state")
    if graph == "graph=loop":
        return _step(0.0, device, (call + assumed("host_replay")) / steps)
    device["launches"] += assumed("graph_gap")
    return _step(assumed("host_replay"), device, call / steps)


def diffusers_step(model: Counted, scheduler: Tally) -> Step:
    """The scheduler waits for its timestep, and so for the model."""
    alone = scheduler.host + assumed("host_scheduler")
    return _step(model.tally.host, dict(model.tally.device), alone)


def compiled_step(model: Counted) -> Step:
    """Model and update compiled with CUDA graphs."""
    kinds = model.tally.operations
    products = kinds.get("product", 0)
    convolutions = kinds.get("convolution", 0)
    # What follows a product or a convolution is one kernel, a norm is two; inputs are copied.
    small = products + 2 * convolutions + 2 * kinds.get("norm", 0) + COPIES
    device = (
        small * assumed("small_kernel")
        + products * assumed("small_product")
        + convolutions * assumed("small_convolution")
        + kinds.get("attention", 0) * assumed("small_attention")
    )
    return _step(assumed("host_compiled"), {"launches": device}, 0.0)


# x, t and the coefficients in, the samples out.
COPIES = 4


def _step(host: float, device: dict[str, float], alone: float) -> Step:
    """The host is ahead of the device or it is not; `alone` is spent while the other one waits."""
    device = {"launches": 0.0, **device}
    busy = sum(device.values())
    seconds = max(host, busy) + alone
    largest = max(device, key=lambda part: device[part])
    bound = "host" if max(host, alone) > busy else largest
    return Step(seconds, bound, {"host": host, "device": busy, "alone": alone})


def predicted_loops(
    models: dict[str, Counted], schedulers: dict[str, Tally]
) -> list[dict[str, Any]]:
    """A row for each measure that is not an update.

    Args:
        models: by the names of `loops.MODELS`, and `LATENT`.
        schedulers: as `count_schedulers` gives them.
    """
    return [row(measure, *step) for measure, step in _steps(models, schedulers)]


def _steps(models: dict[str, Counted], schedulers: dict[str, Tally]) -> Iterator[tuple[str, Step]]:
    for name, etas in measures.LOOP_ETAS.items():
        for eta in etas:
            for contender in measures.LOOP_CONTENDERS:
                step = _contender(
                    models[name], contender, schedulers[f"DDIM, eta {eta:g}"], measures.LOOP_STEPS
                )
                yield measures.loop(name, eta, contender), step
    for contender in measures.LATENT_CONTENDERS:
        step = _contender(
            models[LATENT], contender, schedulers["DDIM, guided"], measures.LATENT_STEPS
        )
        yield measures.latent(contender), step
    for name in measures.DDPM_MODELS:
        for contender in measures.DDPM_CONTENDERS:
            yield measures.ddpm(name, contender), _run(models[name], contender, schedulers)
    for name in measures.COMPILED_MODELS:
        yield measures.compiled(name), compiled_step(models[name])


def _contender(model: Counted, contender: str, scheduler: Tally, steps: int) -> Step:
    if contender == "diffusers":
        return diffusers_step(model, scheduler)
    return fastddim_step(model, contender, steps)


def _run(model: Counted, contender: str, schedulers: dict[str, Tally]) -> Step:
    """All steps of a run."""
    loop, _, count = contender.partition(", ")
    steps = int(count)
    if loop == "fastddim":
        step = fastddim_step(model, "graph=loop" if steps == 50 else "graph=True", steps)
    else:
        step = diffusers_step(model, schedulers["DDPM" if loop.endswith("DDPM") else "DDIM, eta 0"])
    parts = {part: steps * seconds for part, seconds in step.parts.items()}
    return Step(steps * step.seconds, step.bound, parts)


def count_models() -> dict[str, Counted]:
    return {**{name: count_model(name) for name in MODELS}, LATENT: count_latent_unet()}
