"""`fastddim sample`."""

from __future__ import annotations

import click

from fastddim.cli.drawing import Drawing
from fastddim.cli.files import latents_path, open_sink, read_latents
from fastddim.cli.options import (
    SEED,
    Machine,
    Walk,
    columns_option,
    machine_options,
    prediction_option,
    scale_option,
    walk_options,
)
from fastddim.cli.program import usage_errors
from fastddim.cli.sources import load
from fastddim.images import to_uint8
from fastddim.plan import VARIANCES
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
@click.argument("model")
@walk_options
@click.option("--eta", type=float, default=0.0, help="0 is DDIM, 1 is DDPM's noise.")
@click.option("--count", type=click.IntRange(min=1), default=64, help="Number of images.")
@click.option("--seed", type=SEED, default=0, help="Seed of all noise.")
@click.option(
    "--sample-offset",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Number of the first image.",
)
@click.option(
    "--latents",
    show_default="drawn from --seed",
    help="File of 'fastddim invert' to start from; --count is then the number in it.",
)
@click.option(
    "--variance",
    type=click.Choice(VARIANCES),
    default="small",
    help="Of the noise under --eta; with --eta 1, 'large' is DDPM's other choice.",
)
@click.option(
    "--clip", type=float, show_default="no clipping", help="Clamp the predicted image to +-CLIP."
)
@click.option("--rederive-eps", is_flag=True, help="Recompute epsilon after clipping.")
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
    walk: Walk,
    eta: float,
    count: int,
    seed: int,
    sample_offset: int,
    latents: str | None,
    variance: str,
    clip: float | None,
    rederive_eps: bool,
    prediction: str | None,
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
    drawing = Drawing(
        source,
        machine,
        count,
        {
            **walk.arguments(),
            "eta": eta,
            "variance": variance,
            "clip": clip,
            "rederive_eps": rederive_eps,
        },
    )
    sink = open_sink(out, first=sample_offset, columns=columns, scale=scale)
    for samples in drawing.batches(seed=seed, sample_offset=sample_offset, latents=x_T):
        sink.add(to_uint8(samples))
    sink.finish()
    click.echo(out)
