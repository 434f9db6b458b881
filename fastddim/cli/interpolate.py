"""`fastddim interpolate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fastddim.choices import Prediction
from fastddim.cli.options import (
    Machine,
    TunableVisits,
    fresh_seeds,
    integers,
    machine_options,
    model_argument,
    prediction_option,
    scale_option,
    tell_seeds,
    tunable_visits_options,
)
from fastddim.cli.program import Command, usage_errors

if TYPE_CHECKING:
    from torch import Tensor

STRIP, CORNERS = 2, 4


@click.command(
    "interpolate",
    cls=Command,
    epilog="""\b
Examples:
  fastddim interpolate digits --seeds 3,8
  fastddim interpolate fashion --seeds 1,2,3,4 --frames 7 --out square.png""",
)
@model_argument
@click.option(
    "--seeds",
    callback=integers,
    metavar="INT,INT,...",
    show_default="two new ones, named on stderr",
    help="Two seeds for the ends of a strip, or four for the corners of a square (top left, top "
    "right, bottom left, bottom right).",
)
@click.option(
    "--frames", type=click.IntRange(min=2), default=9, help="Images from one end to the other."
)
@tunable_visits_options
@prediction_option
@click.option(
    "--out",
    type=click.Path(),
    default="interpolation.png",
    help="A grid (.png), an archive (.npz) or a folder, as in 'fastddim sample'.",
)
@scale_option
@machine_options
def command(
    model: str,
    seeds: list[int] | None,
    frames: int,
    visits: TunableVisits,
    prediction: Prediction | None,
    out: str,
    scale: int | None,
    machine: Machine,
) -> None:
    """Draw the images between two or four images of MODEL.

    The latents of the seeds are mixed by spherical interpolation and decoded with DDIM. The end of
    seed s is the first image of 'fastddim sample --seed s'. MODEL is as in 'fastddim sample'.
    """
    from fastddim import philox
    from fastddim.cli.drawing import Drawing
    from fastddim.cli.files import open_sink
    from fastddim.cli.record import record
    from fastddim.cli.sources import load
    from fastddim.images import to_uint8

    unseeded = seeds is None
    seeds = fresh_seeds(STRIP) if seeds is None else seeds
    if len(seeds) not in (STRIP, CORNERS):
        raise click.UsageError(f"--seeds: expected two or four seeds, got {len(seeds)}")
    source = load(model, machine.torch_device, prediction)
    with usage_errors():
        ends = philox.initial_latents((len(seeds), *source.sample_shape), seeds)
    latents = mixed(ends, frames)
    drawing = Drawing(source, machine, len(latents), visits.arguments())
    sink = open_sink(
        out,
        record(source.model, machine, visits.files(), seeds=seeds, eta=0.0, **visits.decided()),
        first=0,
        columns=frames,
        scale=scale,
    )
    if unseeded:
        tell_seeds(seeds)
    for samples in drawing.batches(latents=latents):
        sink.add(to_uint8(samples))
    sink.finish()
    click.echo(out)


def mixed(ends: Tensor, frames: int) -> Tensor:
    """Latents `[frames, …]` between two ends, or `[frames·frames, …]` row by row between four."""
    import numpy as np
    import torch

    from fastddim.interpolation import slerp

    # NumPy rounds the same on every CPU; torch does not.
    weights = torch.from_numpy(np.linspace(0, 1, frames))
    if len(ends) == STRIP:
        return slerp(ends[:1], ends[1:], weights).flatten(0, 1)
    left = slerp(ends[0:1], ends[2:3], weights).flatten(0, 1)
    right = slerp(ends[1:2], ends[3:4], weights).flatten(0, 1)
    return slerp(left, right, weights).transpose(0, 1).flatten(0, 1)
