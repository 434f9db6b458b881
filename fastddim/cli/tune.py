"""`fastddim tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from fastddim.choices import EffortName, Prediction
from fastddim.cli.options import (
    Placing,
    clip_option,
    integers,
    model_argument,
    placing_options,
    prediction_option,
    rederive_option,
    seed_option,
    shows_progress,
)
from fastddim.cli.program import Command, usage_errors


@click.command(
    "tune",
    cls=Command,
    epilog="""\b
Examples:
  fastddim tune runs/digits --steps 5,8,10 --out tuned/      tuned/steps-5.json, ...
  fastddim sample runs/digits --steps-file tuned/steps-8.json
  fastddim tune runs/digits --effort thorough --out runs/digits/model-tuned.json

\b
Each file is written as soon as its steps are found. The last command's file is
read with the model: fastddim.models.load("runs/digits").tuned[10]""",
)
@model_argument
@click.option(
    "--steps",
    callback=integers,
    default="10",
    metavar="INT,INT,...",
    help="Numbers of steps to tune; one teacher serves all.",
)
@click.option(
    "--out",
    type=click.Path(),
    required=True,
    show_default="none",
    help="Folder with a file for each number, or one .json file for all.",
)
@click.option(
    "--effort",
    type=click.Choice(get_args(EffortName)),
    default="quick",
    help="How long to search.",
)
@click.option(
    "--samples",
    type=int,
    show_default="by the size of the images",
    help="Latents in each of three sets: to fit, to choose, and to report the errors.",
)
@click.option(
    "--teacher-steps",
    type=int,
    show_default="that of --effort",
    help="Steps of the solution that is taken as exact.",
)
@seed_option
@clip_option
@rederive_option
@prediction_option
@placing_options
def command(
    model: str,
    steps: list[int],
    out: str,
    prediction: Prediction | None,
    placing: Placing,
    **options: Any,
) -> None:
    """Choose few timesteps, and the weights of each step, for MODEL.

    The tuned steps come as close to the exact solution of DDIM's ODE as that many evaluations of
    the model can. MODEL is as in 'fastddim sample'.
    """
    from dataclasses import replace

    from fastddim.cli.sources import load
    from fastddim.models.tuned import write_tuned
    from fastddim.options import TuneOptions
    from fastddim.tuned import TunedSteps
    from fastddim.tuning.tuner import Tuner, warn_where_untuned

    source = load(model, placing.torch_device, prediction)
    with usage_errors():
        tuner = Tuner(
            TuneOptions(
                source.model,
                steps,
                schedule=source.schedule,
                prediction=source.prediction,
                device=placing.torch_device,
                dtype=placing.torch_dtype,
                progress=shows_progress(placing.progress),
                **options,
            )
        )
    path, made_by = Path(out), _given(model)
    found: dict[int, TunedSteps] = {}
    with tuner:
        for number in tuner.numbers:
            tuned = tuner.tuned(number)
            found[number] = replace(tuned, record={"command": made_by, **tuned.record})
            warn_where_untuned(tuned, stacklevel=1)
            click.echo(found[number], err=True)
            if path.suffix == ".json":
                write_tuned(path, found)
            else:
                path.mkdir(parents=True, exist_ok=True)
                found[number].save(path / f"steps-{number}.json")
    click.echo(out)


def _given(model: str) -> str:
    """The command, with the given options that the result depends on."""
    ctx = click.get_current_context()
    words = ["fastddim tune", model]
    for name, value in ctx.params.items():
        if name in ("model", "out", "progress", "device"):
            continue
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT and value is not False:
            words.append("--" + name.replace("_", "-"))
            if isinstance(value, list):
                words.append(",".join(map(str, value)))
            elif value is not True:
                words.append(str(value))
    return " ".join(words)
