"""`fastddim sample`."""

from __future__ import annotations

import click

from fastddim.choices import Prediction
from fastddim.cli.drawing import Drawing
from fastddim.cli.files import latents_path, open_sink, read_latents
from fastddim.cli.options import (
    Denoising,
    Machine,
    TunableVisits,
    columns_option,
    denoising_options,
    machine_options,
    model_argument,
    prediction_option,
    scale_option,
    seed_option,
    tunable_visits_options,
)
from fastddim.cli.program import usage_errors
from fastddim.cli.sources import load
from fastddim.images import to_uint8
from fastddim.options import SampleOptions
from fastddim.validation import check_sample_range


@click.command(
    "sample",
    epilog="""\b
Examples:
  fastddim sample digits --steps 20 --count 100 --out digits.png
  fastddim sample fashion --eta 1 --steps 1000 --count 8      DDPM's own sampling
  fastddim sample runs/digits --out many/ --count 5000        000000.png, 000001.png, ...
  fastddim sample runs/digits --out a.npz --count 2500
  fastddim sample runs/digits --out b.npz --count 2500 --sample-offset 2500
  fastddim sample path/to/ddpm-church --clip 1 --device cuda

\b
Image i of a seed starts from the same noise in every batch size, on every
device and whichever other images are drawn, so the last two .npz commands
together draw the 5000 images of the folder.""",
)
@model_argument
@tunable_visits_options
@denoising_options
@click.option("--count", type=click.IntRange(min=1), default=64, help="Number of images.")
@seed_option
@click.option(
    "--sample-offset",
    type=click.IntRange(0, 2**32 - 1),
    default=SampleOptions.sample_offset,
    help="Number of the first image.",
)
@click.option(
    "--latents",
    show_default="drawn from --seed",
    help="File of 'fastddim invert' to start from; --count is then the number in it.",
)
@prediction_option
@click.option(
    "--out",
    default="samples.png",
    help="A grid (.png), an archive (.npz, uint8 arr_0 of shape [N, H, W, C]), or a folder of "
    "numbered PNG files.",
)
@columns_option
@scale_option
@machine_options
def command(
    model: str,
    visits: TunableVisits,
    denoising: Denoising,
    count: int,
    seed: int,
    sample_offset: int,
    latents: str | None,
    prediction: Prediction | None,
    out: str,
    columns: int | None,
    scale: int | None,
    machine: Machine,
) -> None:
    """Draw images from MODEL.

    MODEL is the name of a bundled model (digits, fashion), a .safetensors file or folder written by
    examples/train.py, or a diffusers folder: an unconditional UNet2DModel, or a pipeline with one,
    whose scheduler tells the noise schedule.
    """
    latents_file = None if latents is None else latents_path("--latents", latents)
    source = load(model, machine.torch_device, prediction)
    x_T = None if latents_file is None else read_latents(latents_file, source.sample_shape)
    count = count if x_T is None else len(x_T)
    with usage_errors():
        check_sample_range(sample_offset, count, per_sample_seed=False)
    arguments = {**visits.arguments(), **vars(denoising)}
    drawing = Drawing(source, machine, count, arguments)
    sink = open_sink(out, first=sample_offset, columns=columns, scale=scale)
    for samples in drawing.batches(seed=seed, sample_offset=sample_offset, latents=x_T):
        sink.add(to_uint8(samples))
    sink.finish()
    click.echo(out)
