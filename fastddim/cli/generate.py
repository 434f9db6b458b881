"""`fastddim generate`, and `merge` and `digest` for its results."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, get_args

import click

from fastddim.choices import Format, Prediction
from fastddim.cli.classes import Labelling, labelling_options
from fastddim.cli.options import (
    Computation,
    Denoising,
    TunableVisits,
    computation_options,
    denoising_options,
    model_argument,
    prediction_option,
    seed_option,
    shows_progress,
    tunable_visits_options,
    working_device,
)
from fastddim.cli.program import Command, usage_errors

if TYPE_CHECKING:
    import torch

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def _batch_size(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    if value == "auto" or (value.isascii() and value.isdecimal()):
        return value if value == "auto" else int(value)
    raise click.BadParameter(f"expected an integer or 'auto', got {value!r}", ctx, param)


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise click.BadParameter(
            f"expected bytes such as 500M or 4GiB (powers of 1024), got {value!r}", ctx, param
        )
    power = " KMGT".index(match[2].upper() or " ")
    return int(match[1]) << 10 * power


@click.command(
    "generate",
    cls=Command,
    epilog="""\b
Examples:
  fastddim generate digits --count 50000 --out run/ --merged samples.npz
  torchrun --nproc-per-node 8 -m fastddim.cli generate path/to/ddpm \\
      --count 50000 --batch-size 64 --out /shared/run --merged samples.npz
  fastddim generate path/to/unet --classes balanced --count 50000 --out classes/
  fastddim generate digits --start 25000 --count 25000 --out second/
  fastddim merge first/ second/ --out samples.npz
  fastddim digest run/

\b
Killed at any moment and started again, with any number of processes, the
command continues its run and ends with the same bytes. With a larger --count
it draws those that are missing. It refuses to continue with other arguments,
another model, other versions or another number of threads (torchrun gives each
process one thread on the CPU, see --threads), and says what differs.""",
)
@model_argument
@click.option(
    "--out",
    type=click.Path(),
    required=True,
    show_default="none",
    help="Folder of the run: new, empty, or that of a run to continue.",
)
@click.option(
    "--start",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Number of the first sample.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 2**32),
    show_default="to --stop",
    help="Number of samples in total, including those of earlier calls.",
)
@click.option(
    "--stop",
    type=click.IntRange(1, 2**32),
    show_default="--start plus --count",
    help="Number after that of the last sample, instead of --count.",
)
@seed_option
@tunable_visits_options
@denoising_options
@click.option("--order", type=int, default=1, help="2 for second order, with --eta 0.")
@prediction_option
@labelling_options
@click.option(
    "--format",
    type=click.Choice(get_args(Format)),
    default="npz",
    help="Format of the shards: npz (uint8), safetensors (float32), or one PNG file an image.",
)
@click.option(
    "--merged",
    type=click.Path(),
    show_default="none",
    help="Also write one .npz of all images (uint8 RGB arr_0), as evaluators read it.",
)
@click.option(
    "--batch-size",
    callback=_batch_size,
    default="auto",
    metavar="INT|auto",
    help="Images drawn and written at a time; 'auto' fits them to --memory.",
)
@click.option(
    "--memory",
    callback=_bytes,
    metavar="SIZE",
    show_default="a share of the free memory",
    help="Memory that --batch-size auto may use besides the model, such as 4GiB.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    show_default="PyTorch's choice",
    help="Threads of each process on the CPU; a run keeps its number.",
)
@click.option("--check-finite", is_flag=True, help="Name the step of a NaN or infinity.")
@computation_options
def command(
    model: str,
    visits: TunableVisits,
    denoising: Denoising,
    prediction: Prediction | None,
    labelling: Labelling,
    computation: Computation,
    threads: int | None,
    start: int,
    count: int | None,
    stop: int | None,
    **options: Any,
) -> None:
    """Draw COUNT samples of a seed from MODEL into a folder, or all samples up to STOP.

    Under torchrun every process draws its share. MODEL is as in 'fastddim sample', or a diffusers
    folder with a class-conditional UNet2DModel, with --classes.
    """
    stop = _stop(start, count, stop)
    import torch

    from fastddim.cli.sources import load
    from fastddim.runs import ManifestMismatchError
    from fastddim.runs.generation import Generation
    from fastddim.runs.options import GenerateOptions

    if threads is not None:
        torch.set_num_threads(threads)
    device = _device_of_rank(computation)
    source = load(model, device, prediction, labelled=labelling.asked())
    labels = labelling.of(source.model, start, stop)
    conditions = {} if labels is None else {"conditions": labels.condition(), **labels.guided()}
    steps = visits.arguments()
    with usage_errors():
        generation = Generation(
            GenerateOptions(
                source.model,
                schedule=source.schedule,
                prediction=source.prediction,
                device=device,
                dtype=computation.torch_dtype,
                impl=computation.impl,
                progress=shows_progress(computation.progress),
                start=start,
                stop=stop,
                **conditions,
                **steps,
                **vars(denoising),
                **options,
            )
        )
    try:
        generation.run()
    except ManifestMismatchError as error:
        raise click.UsageError(str(error)) from error
    if os.environ.get("RANK", "0") == "0":
        for path in filter(None, (options["out"], options["merged"])):
            click.echo(path)


@click.command(
    "merge",
    cls=Command,
    epilog="""\b
Example:
  fastddim merge first/ second/ --out samples.npz""",
)
@click.argument("folders", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(), required=True, show_default="none", help="The .npz file to write."
)
def merge(folders: tuple[str, ...], out: str) -> None:
    """Join the runs of 'fastddim generate' in FOLDERS into one .npz file.

    The file holds arr_0, uint8 [N, H, W, 3], as the evaluators of sample quality read it. The
    ranges of samples must follow one another.
    """
    from fastddim import runs

    click.echo(runs.merge(folders, out))


@click.command(
    "digest",
    cls=Command,
    epilog="""\b
Example:
  fastddim digest run/""",
)
@click.argument("folders", type=click.Path(), nargs=-1, required=True)
def digest(folders: tuple[str, ...]) -> None:
    """Print one SHA-256 for all samples of each run in FOLDERS, after checking every file.

    Without the checks, 'cat FOLDER/*.sha256 | sha256sum' prints the same.
    """
    from fastddim import runs

    for folder in folders:
        click.echo(f"{runs.digest(folder)}  {folder}")


def _stop(start: int, count: int | None, stop: int | None) -> int:
    """The number after that of the last sample, from the option that gives it."""
    if count is not None and stop is None:
        return start + count
    if stop is not None and count is None:
        return stop
    got = "neither" if stop is None else "both"
    raise click.UsageError(f"--count: expected either --count or --stop, got {got}")


def _device_of_rank(computation: Computation) -> torch.device:
    """The requested device; under torchrun each process of a machine gets a GPU of its own."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    several = computation.device in ("auto", "cuda") and local.isdecimal()
    if not several or not torch.cuda.is_available():
        return computation.torch_device
    device = working_device(f"cuda:{local}")
    torch.cuda.set_device(device)
    return device
