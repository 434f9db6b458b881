"""`fastddim sample`."""

from __future__ import annotations

from dataclasses import replace

import click

from fastddim.choices import Prediction
from fastddim.cli.classes import Labelling, labelling_options
from fastddim.cli.options import (
    Denoising,
    Machine,
    TunableVisits,
    columns_option,
    denoising_options,
    fresh_seeds,
    machine_options,
    model_argument,
    prediction_option,
    scale_option,
    tell_seeds,
    tunable_visits_options,
)
from fastddim.cli.program import Command, import_library, usage_errors


def _recall(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    if path is not None and not ctx.resilient_parsing:
        import_library()
        from fastddim.cli.record import recall

        recall(ctx, path)


@click.command(
    "sample",
    cls=Command,
    epilog="""\b
Examples:
  fastddim sample digits --steps 20 --count 100 --out digits.png
  fastddim sample fashion --eta 1 --steps 1000 --count 8      DDPM's own sampling
  fastddim sample runs/digits --out many/ --count 5000        000000.png, 000001.png, ...
  fastddim sample runs/digits --out a.npz --count 2500
  fastddim sample runs/digits --out b.npz --count 2500 --sample-offset 2500
  fastddim sample path/to/ddpm-church --clip 1 --device cuda
  fastddim sample path/to/unet --classes balanced --guidance 4 --null-class 1000
  fastddim sample digits --gif digits.gif                     from noise to digits
  fastddim sample --like digits.png --eta 1 --out noisy.png   all else as it was

\b
Image i of a seed starts from the same noise in every batch size, on every
device and whichever other images are drawn, so the last two .npz commands
together draw the 5000 images of the folder.""",
)
@model_argument
@tunable_visits_options
@denoising_options
@click.option("--count", type=click.IntRange(min=1), default=64, help="Number of images.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    show_default="a new one, named on stderr",
    help="Seed of all noise.",
)
@click.option(
    "--sample-offset",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Number of the first image.",
)
@click.option(
    "--latents",
    type=click.Path(),
    show_default="drawn from --seed",
    help="File of 'fastddim invert' to start from; --count is then the number in it.",
)
@prediction_option
@labelling_options
@click.option(
    "--like",
    type=click.Path(),
    is_eager=True,
    expose_value=False,
    callback=_recall,
    show_default="none",
    help="PNG file that this command wrote, to draw it again: MODEL and all options that are not "
    "given are those of the file.",
)
@click.option(
    "--out",
    type=click.Path(),
    default="samples.png",
    help="A grid (.png), an archive (.npz, uint8 arr_0 of shape [N, H, W, C]), or a folder of "
    "numbered PNG files.",
)
@click.option(
    "--gif",
    type=click.Path(),
    show_default="none",
    help="Also write the states from the noise to the images, one frame a step.",
)
@columns_option
@scale_option
@machine_options
def command(
    model: str,
    visits: TunableVisits,
    denoising: Denoising,
    count: int,
    seed: int | None,
    sample_offset: int,
    latents: str | None,
    prediction: Prediction | None,
    labelling: Labelling,
    out: str,
    gif: str | None,
    columns: int | None,
    scale: int | None,
    machine: Machine,
) -> None:
    """Draw images from MODEL.

    MODEL is the name of a bundled model (digits, fashion), a .safetensors file or folder written by
    examples/train.py, or a diffusers folder: a UNet2DModel, or a pipeline with one, whose scheduler
    gives the noise schedule. A class-conditional model needs --classes.

    PNG files hold the seed and all else that they depend on, for --like. An image from a folder is
    drawn again alone, with the same bytes if --out is a folder; with --count, others are drawn with
    it.
    """
    from fastddim.cli.drawing import Drawing
    from fastddim.cli.files import Animation, Pictures, latents_path, open_sink, read_latents
    from fastddim.cli.record import recalled, record
    from fastddim.cli.sources import load
    from fastddim.validation import check_sample_range

    latents_file = None if latents is None else latents_path("--latents", latents)
    source = load(model, machine.torch_device, prediction, labelled=labelling.asked())
    x_T = None if latents_file is None else read_latents(latents_file, source.sample_shape)
    count = count if x_T is None else len(x_T)
    with usage_errors():
        check_sample_range(sample_offset, count, per_sample_seed=False)
    like = recalled()
    rows = None if like is None else like.rows_of(count)
    start, stop = (0, count) if rows is None else (rows.start, rows.stop)
    labels = labelling.of(source.model, sample_offset + start, sample_offset + stop)
    arguments = {**visits.arguments(), **vars(denoising)}
    drawing = Drawing(source, machine, stop - start, arguments, labels)
    unseeded = seed is None and (x_T is None or denoising.eta != 0)
    seed = fresh_seeds(1)[0] if unseeded else seed
    files = visits.files() | labelling.files()
    files |= {} if latents is None else {"latents": latents}
    made = record(source.model, machine, files, seed=seed, **visits.decided())
    if like is not None:
        like.compare(made)
        made = replace(made, rows=rows)
    first = sample_offset if rows is None else sample_offset + rows.image
    pictures = Pictures(
        open_sink(out, made, first=first, columns=columns, scale=scale),
        None if gif is None else Animation(gif, columns=columns, scale=scale),
        rows,
    )
    if unseeded and seed is not None:
        tell_seeds([seed])
    for drawn in drawing.batches(
        seed=seed,
        sample_offset=sample_offset + start,
        latents=None if x_T is None else x_T[start:stop],
        return_trajectory=gif is not None,
    ):
        pictures.add(drawn)
    pictures.finish()
    for path in filter(None, (out, gif)):
        click.echo(path)
