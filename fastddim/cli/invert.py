"""`fastddim invert`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from fastddim.choices import Prediction
from fastddim.cli.options import (
    Machine,
    Visits,
    machine_options,
    model_argument,
    prediction_option,
    scale_option,
    visits_options,
)
from fastddim.cli.program import Command

if TYPE_CHECKING:
    from torch import Tensor

    from fastddim.images import Images


@click.command(
    "invert",
    cls=Command,
    epilog="""\b
Examples:
  fastddim sample digits --out drawn/ --count 16
  fastddim invert digits drawn/ --steps 100 --decode pairs.png
  fastddim sample digits --latents latents.npz --steps 100

\b
The last command decodes the latents: it must visit the timesteps of the
encoding. The error falls as --steps grows.""",
)
@model_argument
@click.argument("images", type=click.Path(), nargs=-1, required=True)
@visits_options
@prediction_option
@click.option(
    "--out",
    type=click.Path(),
    default="latents.npz",
    help="Latents [N, C, H, W] as 'latents' in an .npz or .safetensors file.",
)
@click.option(
    "--decode",
    type=click.Path(),
    show_default="no decoding",
    help="Also decode, and draw each image next to its reconstruction (.png, .npz or folder/).",
)
@scale_option
@machine_options
def command(
    model: str,
    images: tuple[str, ...],
    visits: Visits,
    prediction: Prediction | None,
    out: str,
    decode: str | None,
    scale: int | None,
    machine: Machine,
) -> None:
    """Encode IMAGES into the latents that MODEL decodes to them.

    IMAGES are PNG files, folders of them, or .npz files with uint8 images [N, H, W, C] in arr_0,
    all of the model's size. MODEL is as in 'fastddim sample'.

    With --decode, the mean squared error of a pixel in [0, 1] is printed on stderr.
    """
    import torch

    from fastddim.cli.drawing import Drawing, Encoding
    from fastddim.cli.files import latents_path, open_sink, read_images, write_latents
    from fastddim.cli.record import record
    from fastddim.cli.sources import load
    from fastddim.files import check_writable
    from fastddim.images import from_uint8

    out_path = latents_path("--out", out)
    source = load(model, machine.torch_device, prediction)
    encoding = Encoding(source, machine, visits.arguments())
    originals = from_uint8(read_images(images, source.sample_shape))
    check_writable(out_path)
    sink = (
        None
        if decode is None
        else open_sink(
            decode,
            record(source.model, machine, {}, eta=0.0, **visits.decided()),
            first=0,
            columns=_columns(originals),
            scale=scale,
        )
    )
    latents = torch.cat(list(encoding.batches(originals)))
    write_latents(out_path, latents)
    click.echo(out)
    if sink is None:
        return
    drawing = Drawing(source, machine, len(originals), visits.arguments())
    decoded = torch.cat([x.cpu() for x in drawing.batches(latents=latents)])
    sink.add(_pairs(originals, decoded))
    sink.finish()
    click.echo(decode)
    click.echo(
        f"mean squared error of a pixel in [0, 1]: {_error(originals, decoded):.3g}", err=True
    )


def _columns(originals: Tensor) -> int:
    """The columns of a nearly square grid, an even number so that pairs stay together."""
    return 2 * math.ceil(math.sqrt(len(originals) / 2))


def _pairs(originals: Tensor, decoded: Tensor) -> Images:
    import torch

    from fastddim.images import to_uint8

    pairs = torch.stack([originals, decoded.to(originals)], dim=1)
    return to_uint8(pairs.flatten(0, 1))


def _error(originals: Tensor, decoded: Tensor) -> float:
    # A difference in [−1, 1] is twice that in [0, 1].
    return ((decoded.double() - originals.double()) / 2).square().mean().item()
