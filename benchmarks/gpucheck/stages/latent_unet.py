"""A U-Net of the size of Stable Diffusion 1.5 with random weights, guided."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from loops import AGREEMENT, Loop, diffusers
from torch import Tensor

import fastddim
from fastddim.choices import Graph
from gpucheck import measures
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.stages.loops import HALF_AGREEMENT, agreeing
from gpucheck.timing import in_turn, spread, wait

ROUNDS = 5
DRY_STEPS, DRY_ROUNDS = 2, 1
GUIDANCE = 3.0
TOKENS = 77


class Problem(NamedTuple):
    """A U-Net, the hidden states of a prompt (unconditional first), latents, a scheduler."""

    unet: Any
    text: Tensor
    x_T: Tensor
    scheduler: Any
    steps: int


@torch.no_grad()
def run(record: Record, settings: Settings) -> None:
    problem = make(settings)
    record.row(parameters=sum(p.numel() for p in problem.unet.parameters()))
    contenders: dict[str, Loop] = {"diffusers": partial(their_loop, problem)}
    for mode in settings.modes:
        loop = record.attempt(partial(our_loop, settings, problem, mode), graph=mode)
        if loop is not None:
            contenders[f"graph={mode}"] = loop
    most = HALF_AGREEMENT if problem.x_T.dtype == torch.float16 else AGREEMENT
    alive = agreeing(record, contenders, base="diffusers", most=most)
    for contender, loop in alive.items():
        start = time.perf_counter()
        loop()
        wait(settings.device)
        record.row(contender=contender, first_call_seconds=round(time.perf_counter() - start, 3))
    alone = record.attempt(partial(network_alone, settings, problem))
    if alone is not None:
        alive[measures.LATENT_ALONE] = alone
    rounds = DRY_ROUNDS if settings.dry else ROUNDS
    for contender, values in in_turn(alive, settings.device, rounds).items():
        a_step = spread([value / problem.steps for value in values])
        record.show(
            measure=measures.latent(contender),
            seconds=a_step,
            steps=problem.steps,
            dtype=str(problem.x_T.dtype),
        )
    if settings.device.type == "cuda":
        record.row(most_bytes_allocated=torch.cuda.max_memory_allocated())


def make(settings: Settings) -> Problem:
    channels = (32, 64) if settings.dry else (320, 640, 1280, 1280)
    width = 32 if settings.dry else 768
    size = 8 if settings.dry else 64
    dtype = torch.float32 if settings.dry else torch.float16
    down = ("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",)
    torch.manual_seed(0)
    with settings.device:
        unet = diffusers().UNet2DConditionModel(
            sample_size=size,
            block_out_channels=channels,
            cross_attention_dim=width,
            attention_head_dim=8,
            down_block_types=down,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        )
        text = torch.randn(2, TOKENS, width).to(dtype)
        x_T = torch.randn(1, 4, size, size).to(dtype)
    scheduler = diffusers().DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    steps = DRY_STEPS if settings.dry else measures.LATENT_STEPS
    scheduler.set_timesteps(steps, device=settings.device)
    return Problem(unet.to(dtype).eval(), text, x_T, scheduler, steps)


def their_loop(problem: Problem) -> Tensor:
    """The loop of diffusers' Stable Diffusion pipelines."""
    x = problem.x_T
    for t in problem.scheduler.timesteps:
        output = problem.unet(
            torch.cat([x, x]), t, encoder_hidden_states=problem.text, return_dict=False
        )[0]
        unconditional, conditional = output.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        x = problem.scheduler.step(guided, t, x, return_dict=False)[0]
    return x


def network_alone(settings: Settings, problem: Problem) -> Loop:
    """The U-Net on the guided batch, once a step and always on the same input.

    On a GPU a call is one CUDA graph, replayed.
    """
    x = torch.cat([problem.x_T, problem.x_T])
    t = problem.scheduler.timesteps[:1].expand(len(x))

    def call() -> Tensor:
        output: Tensor = problem.unet(x, t, encoder_hidden_states=problem.text, return_dict=False)[
            0
        ]
        return output

    once = call if settings.device.type == "cpu" else captured(call)

    def loop() -> Tensor:
        for _ in range(problem.steps):
            output = once()
        return output

    return loop


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` as a CUDA graph, whose output the next call overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The first calls choose kernels.
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def our_loop(settings: Settings, problem: Problem, mode: Graph) -> Loop:
    """The loop of a prepared `fastddim.Sampler` with one kind of graph."""
    prepared = fastddim.Sampler(
        problem.unet,
        problem.steps,
        shape=tuple(problem.x_T.shape),
        schedule=fastddim.Schedule.from_diffusers(problem.scheduler),
        spacing="leading",
        steps_offset=1,
        guidance_scale=GUIDANCE,
        dtype=problem.x_T.dtype,
        device=settings.device,
        graph=mode,
        model_kwargs={"encoder_hidden_states": problem.text},
    )

    def loop() -> Tensor:
        return prepared(x_T=problem.x_T)

    return loop
