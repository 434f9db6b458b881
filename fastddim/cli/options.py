"""Options that several commands share, in groups that a command gets as one object each."""

from __future__ import annotations

import functools
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click
from click.core import ParameterSource

from fastddim.choices import (
    PREDICTION_SYNONYMS,
    PREDICTIONS,
    SPACING_SYNONYMS,
    VARIANCE_SYNONYMS,
    VARIANCES,
    Impl,
    Spacing,
    Variance,
)
from fastddim.cli.completion import complete_backend, complete_device, complete_model

if TYPE_CHECKING:
    import torch

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = ("float32", "float64", "float16", "bfloat16")


def integers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Parse the value of an option that takes integers separated by commas."""
    try:
        return None if value is None else [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"expected integers separated by commas, got {value!r}", ctx, param
        ) from error


class Word(click.Choice):  # type: ignore[type-arg]  # click is generic from 8.2 on
    """A choice among words for which other libraries have other names."""

    def __init__(self, words: Iterable[str], synonyms: Mapping[Any, str]) -> None:
        super().__init__(tuple(words))
        self._synonyms = synonyms

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word: str = super().convert(self._synonyms.get(value, value), param, ctx)
        return word


# These options choose timesteps, and mean nothing if timesteps are given.
_CHOOSING = ("steps", "spacing", "steps_offset")


@dataclass(frozen=True)
class Visits:
    """The timesteps to visit: their number and spacing, or the timesteps themselves."""

    steps: int
    timesteps: list[int] | None
    spacing: str
    steps_offset: int

    def arguments(self) -> dict[str, Any]:
        """The values as arguments of `fastddim.sample` and `invert`.

        Raises:
            click.UsageError: timesteps and a way to choose them are both given.
        """
        if self.listed is None:
            return {name: getattr(self, name) for name in _CHOOSING}
        return {"steps": self.listed}

    @property
    def listed(self) -> list[int] | None:
        """The timesteps, if they take precedence."""
        return self.timesteps if _decides("timesteps", _CHOOSING) else None

    def decided(self) -> dict[str, Any]:
        """The options that may have given way to others; None for those that did."""
        return {"timesteps": self.listed}


@dataclass(frozen=True)
class TunableVisits(Visits):
    """The timesteps to visit, which may also be tuned steps in a file."""

    steps_file: str | None

    def arguments(self) -> dict[str, Any]:
        """The values as arguments of `fastddim.sample`.

        Raises:
            click.UsageError: two ways to choose the timesteps are given.
            ValueError, OSError: the file holds no tuned steps, or cannot be read.
        """
        if self.file is None:
            return super().arguments()
        from fastddim.tuned import load_steps

        return {"steps": load_steps(self.file)}

    @property
    def file(self) -> str | None:
        """The file of tuned steps, if it takes precedence."""
        return self.steps_file if _decides("steps_file", ("timesteps", *_CHOOSING)) else None

    def files(self) -> dict[str, str]:
        """The file of tuned steps by the name of its option, or nothing."""
        return {} if self.file is None else {"steps_file": self.file}

    def decided(self) -> dict[str, Any]:
        """The options that may have given way to others; None for those that did."""
        listed = self.listed if self.file is None else None
        return {"timesteps": listed, "steps_file": self.file}


def is_given(name: str) -> bool:
    """Tell whether the user gave the parameter; defaults and values of `--like` do not count."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def _decides(option: str, others: Sequence[str]) -> bool:
    """Tell whether an option takes precedence: not if `--like` set it and others are given.

    Raises:
        click.UsageError: the user gave the option and one of the others.
    """
    beside = [name for name in others if is_given(name)]
    if beside and is_given(option):
        names = [name.replace("_", "-") for name in (option, beside[0])]
        raise click.UsageError(f"--{names[0]}: expected no --{names[1]} with it, got one")
    return not beside


@dataclass(frozen=True)
class Denoising:
    """The computation of each step."""

    eta: float
    variance: Variance
    clip: float | None
    rederive_eps: bool


@dataclass(frozen=True)
class Placing:
    """The device and number type of a computation, and its progress bar."""

    device: str
    dtype: str
    progress: bool | None

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @functools.cached_property
    def torch_device(self) -> torch.device:
        """The device, see `working_device`."""
        return working_device(self.device)


@dataclass(frozen=True)
class Computation(Placing):
    """The device, the number type and the backend of the update."""

    impl: Impl


@dataclass(frozen=True)
class Machine(Computation):
    """The device, the number type, the backend, and a batch size chosen by the user."""

    batch_size: int


def working_device(name: str = "auto") -> torch.device:
    """The device of that name, after a trial; "auto" is CUDA if there is any, else the CPU.

    Raises:
        click.UsageError: the device is unknown, or cannot be used here.
    """
    import torch

    from fastddim.validation import first_sentence

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    # A torch without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(
            f"--device: expected a device that works here, got {name!r}: {first_sentence(error)}"
        ) from error
    return device


def fresh_seeds(count: int) -> list[int]:
    """Seeds for a command without given seeds, small enough to be typed again."""
    return [secrets.randbelow(2**32) for _ in range(count)]


def tell_seeds(seeds: Sequence[int]) -> None:
    """Print seeds that the user did not choose."""
    names = "seed" if len(seeds) == 1 else "seeds"
    click.echo(f"fastddim: {names} {','.join(map(str, seeds))}", err=True)


def shows_progress(asked: bool | None = None) -> bool:
    """Return the user's choice; without one, tell whether stderr is a terminal."""
    return sys.stderr.isatty() if asked is None else asked


def bundled(
    name: str, kind: type[Any], options: Sequence[Callable[[Any], Any]]
) -> Callable[[Command], Command]:
    """Make a decorator that adds `options` to a command, which gets their values as one argument.

    Args:
        name: name of the argument.
        kind: dataclass of the argument, with a field for each option.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def collected(**values: Any) -> Any:
            taken = {field.name: values.pop(field.name) for field in fields(kind)}
            return command(**{name: kind(**taken)}, **values)

        decorated: Any = collected
        for option in reversed(options):
            decorated = option(decorated)
        result: Command = decorated
        return result

    return decorate


_VISITS = [
    click.option("--steps", type=int, default=50, help="Number of sampling steps."),
    click.option(
        "--timesteps",
        callback=integers,
        metavar="INT,INT,...",
        show_default="chosen by --steps and --spacing",
        help="The timesteps themselves, decreasing.",
    ),
    click.option(
        "--spacing",
        type=Word(get_args(Spacing), SPACING_SYNONYMS),
        default="trailing",
        help="Rule that chooses --steps of the model's timesteps.",
    ),
    click.option(
        "--steps-offset",
        type=int,
        default=0,
        help="Number added to every timestep of 'leading'.",
    ),
]

visits_options = bundled("visits", Visits, _VISITS)

tunable_visits_options = bundled(
    "visits",
    TunableVisits,
    [
        *_VISITS,
        click.option(
            "--steps-file",
            type=click.Path(),
            metavar="FILE",
            show_default="none",
            help="File of tuned steps, instead of --steps and --spacing.",
        ),
    ],
)

clip_option = click.option(
    "--clip",
    type=float,
    show_default="no clipping",
    help="Clamp the predicted image to +-CLIP.",
)

rederive_option = click.option(
    "--rederive-eps", is_flag=True, help="Recompute epsilon after clipping."
)

denoising_options = bundled(
    "denoising",
    Denoising,
    [
        click.option("--eta", type=float, default=0.0, help="0 is DDIM, 1 is DDPM's noise."),
        click.option(
            "--variance",
            type=Word(VARIANCES, VARIANCE_SYNONYMS),
            default="small",
            help="Variance of the noise under --eta; with --eta 1, 'large' is DDPM's other choice.",
        ),
        clip_option,
        rederive_option,
    ],
)

_device_option = click.option(
    "--device",
    default="auto",
    shell_complete=complete_device,
    show_default="cuda where there is one, else cpu",
    help="Device to compute on: cpu, cuda, cuda:1, ...",
)

_dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    help="Type of the state; the model computes in the type of its weights.",
)

_impl_option = click.option(
    "--impl",
    default="auto",
    shell_complete=complete_backend,
    show_default="the fastest that works here",
    help="Backend of the update; if it cannot be used, an error says why (see 'fastddim env').",
)

_progress_option = click.option(
    "--progress/--no-progress",
    default=None,
    show_default="where stderr is a terminal",
    help="Show a progress bar on stderr.",
)

placing_options = bundled("placing", Placing, [_device_option, _dtype_option, _progress_option])

_COMPUTATION = [_device_option, _dtype_option, _impl_option, _progress_option]

computation_options = bundled("computation", Computation, _COMPUTATION)

machine_options = bundled(
    "machine",
    Machine,
    [
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=64,
            help="Images computed at a time; the noise does not depend on it.",
        ),
        *_COMPUTATION,
    ],
)

model_argument = click.argument("model", shell_complete=complete_model)

seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Seed of all noise."
)

prediction_option = click.option(
    "--prediction",
    type=Word(PREDICTIONS, PREDICTION_SYNONYMS),
    default=None,
    show_default="the model's own, else epsilon",
    help="Quantity that the model predicts.",
)

columns_option = click.option(
    "--columns",
    type=click.IntRange(min=1),
    show_default="about square",
    help="Images per row of a grid.",
)

scale_option = click.option(
    "--scale",
    type=click.IntRange(min=1),
    show_default="small images to 64 pixels",
    help="Enlarge the images of a grid by a whole factor.",
)
