"""Every option of sampling, declared once: name, type, default and check.

Each of `sample`, `Sampler`, `invert`, `Stream` and `generate` has a class whose fields are its
arguments. The classes are put together from groups: an option that is added to a group belongs to
every call that has the group. A package with calls of its own has such classes in its own
`options.py`. `fastddim.signatures.takes` gives a function the signature of its class, and the
docstring of `fastddim.sample` explains the options. Only `fastddim.step` and the command line name
options again: a call of `step` takes less time than the construction of such an object.

Nothing changes an object of options after it is made. The classes are not frozen, since that would
triple the time to make an object, and each call of a `Sampler` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim.adapter import Model
from fastddim.choices import (
    PREDICTION_SYNONYMS,
    PREDICTIONS,
    VARIANCE_SYNONYMS,
    VARIANCES,
    EffortName,
    Graph,
    Impl,
    Prediction,
    PredictionSynonym,
    Spacing,
    SpacingSynonym,
    Variance,
    VarianceSynonym,
)
from fastddim.schedule import Schedule
from fastddim.tuned import TunedSteps
from fastddim.validation import check_bool, check_choice, check_coefficient, check_number

Coefficient: TypeAlias = float | Tensor
"""A number for all samples, or a tensor `[B]` with one for each."""
PerStep: TypeAlias = Coefficient | Sequence[Coefficient]
"""A coefficient for all steps, or a sequence with one for each step."""
Steps: TypeAlias = int | Sequence[int] | Tensor | TunedSteps
"""A number of steps, the timesteps in the order visited, or tuned steps."""
Seed: TypeAlias = int | Sequence[int] | Tensor
"""One seed for all samples, or one for each: a sequence, or an int64 tensor `[B]`."""
NoiseSource: TypeAlias = Tensor | torch.Generator | Sequence[torch.Generator] | None
"""The noise itself, the generator that draws it, or a generator for each sample."""
Callback: TypeAlias = Callable[[int, int, Tensor, Tensor], object]
"""`callback(step_index, timestep, x_t, x_0)`, called after each update."""
DenoisedFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`denoised_fn(x_0, t)`, which returns the x_0 to go on with."""
Conditions: TypeAlias = Mapping[str, Any] | Callable[[int, int], Mapping[str, Any]]
"""Rows by name for all samples of a run, or a function `(start, stop)` for those of a part."""


@dataclass(kw_only=True, repr=False, eq=False)
class Reading:
    """The meaning of the model's output."""

    prediction: Prediction | PredictionSynonym = "epsilon"
    guidance_rescale: float = 0.0


@dataclass(kw_only=True, repr=False, eq=False)
class Thresholding:
    """A limit of the predicted x_0 that follows from its values."""

    dynamic_thresholding_ratio: float | None = None
    sample_max_value: float | None = None


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Direction:
    """The new state, made of the predicted x_0 and epsilon."""

    eta: PerStep = 0.0
    clip: float | None = None
    rederive_eps: bool = False
    guidance_scale: PerStep | None = None


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Noising:
    """The noise of a step, besides `eta`."""

    variance: Variance | VarianceSynonym = "small"
    temperature: PerStep = 1.0


class Rescaling(NamedTuple):
    """The part of a row that depends on the data of its sample; see `reference.rescaled_rows`.

    Attributes:
        rescale: φ of guidance rescale, in [0, 1].
        ratio: quantile of dynamic thresholding, in (0, 1], or 0 for none.
        limit: upper limit of its threshold, or infinity.
    """

    rescale: float
    ratio: float
    limit: float


PER_STEP = ("eta", "guidance_scale", "temperature")
"""The options that may be sequences, one value a step."""


@dataclass(kw_only=True, repr=False, eq=False)
class Update(Noising, Direction, Thresholding, Reading):
    """A kind of step, independent of its place in the schedule."""

    def checked(self, batch: int | None, *, per_step: bool = False) -> Update:
        """An `Update` with every field checked, synonyms replaced and tensors turned to float64.

        Args:
            batch: B, or None if tensors cannot be used.
            per_step: whether sequences with one value a step can be used.

        Raises:
            TypeError, ValueError: a field is of the wrong type, shape or range; the message names
                it.
        """

        def coefficient(name: str, low: float = -math.inf) -> Any:
            value = getattr(self, name)
            if per_step and isinstance(value, Sequence) and not isinstance(value, str | bytes):
                return tuple(
                    check_coefficient(f"{name}[{s}]", v, batch, low) for s, v in enumerate(value)
                )
            return check_coefficient(name, value, batch, low)

        guidance, clip = self.guidance_scale, self.clip
        checked = Update(
            eta=coefficient("eta", 0.0),
            variance=check_choice("variance", self.variance, VARIANCES, VARIANCE_SYNONYMS),
            prediction=check_choice(
                "prediction", self.prediction, PREDICTIONS, PREDICTION_SYNONYMS
            ),
            clip=None if clip is None else check_number("clip", clip, 0.0, open_low=True),
            rederive_eps=check_bool("rederive_eps", self.rederive_eps),
            guidance_scale=None if guidance is None else coefficient("guidance_scale"),
            temperature=coefficient("temperature", 0.0),
            guidance_rescale=check_number("guidance_rescale", self.guidance_rescale, 0.0, 1.0),
            dynamic_thresholding_ratio=self.dynamic_thresholding_ratio,
            sample_max_value=self.sample_max_value,
        )
        checked._check_rescaling()
        return checked

    def _check_rescaling(self) -> None:
        if self.guidance_rescale > 0 and self.guidance_scale is None:
            raise ValueError(
                f"guidance_rescale: expected 0 without guidance_scale, got {self.guidance_rescale}"
            )
        ratio, limit = self.dynamic_thresholding_ratio, self.sample_max_value
        if ratio is None:
            if limit is not None:
                raise ValueError(
                    "sample_max_value: expected None without dynamic_thresholding_ratio, "
                    f"got {limit!r}"
                )
            return
        check_number("dynamic_thresholding_ratio", ratio, 0.0, 1.0, open_low=True)
        if limit is not None:
            check_number("sample_max_value", limit, 1.0)
        if self.clip is not None:
            raise ValueError(
                f"clip: expected None with dynamic_thresholding_ratio, got {self.clip!r}"
            )

    @property
    def noisy(self) -> bool:
        """True if any step adds noise."""
        etas = self.eta if isinstance(self.eta, tuple) else (self.eta,)
        return any(isinstance(eta, Tensor) or eta > 0 for eta in etas)

    @property
    def guided(self) -> bool:
        """True if the model is evaluated on 2B samples."""
        return self.guidance_scale is not None

    @property
    def rescaling(self) -> Rescaling | None:
        """The part of each row that depends on the data; None if no part does."""
        ratio, limit = self.dynamic_thresholding_ratio, self.sample_max_value
        if ratio is None and self.guidance_rescale == 0:
            return None
        return Rescaling(self.guidance_rescale, ratio or 0.0, math.inf if limit is None else limit)

    def at_each(self, steps: int) -> list[Update]:
        """The update of every step.

        Raises:
            ValueError: a sequence does not have one value a step.
        """
        series = {}
        for name in PER_STEP:
            values = getattr(self, name)
            if not isinstance(values, tuple):
                continue
            if len(values) != steps:
                raise ValueError(
                    f"{name}: expected one value a step, {steps}, got {len(values)} of them"
                )
            series[name] = values
        return [replace(self, **{n: v[s] for n, v in series.items()}) for s in range(steps)]


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Solver:
    """The equation, and the order to which it is solved."""

    schedule: Schedule | None = None
    order: int = 1


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Visited:
    """The timesteps to visit, if `steps` is only their number."""

    spacing: Spacing | SpacingSynonym = "trailing"
    steps_offset: int = 0


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Hook:
    """A function of the user within each step."""

    denoised_fn: DenoisedFn | None = None


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Batch:
    """The number of samples, and their shape."""

    shape: Sequence[int] | None = None
    batch_size: int = 1


@dataclass(kw_only=True, repr=False, eq=False)
class Placement:
    """The device, the dtype and the means of computation."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    model_dtype: torch.dtype | None = None
    impl: Impl = "auto"
    graph: Graph = "auto"
    check_finite: bool = False


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Conditioning:
    """The arguments of the model besides the state and the timestep."""

    model_kwargs: Mapping[str, Any] | None = None
    uncond_kwargs: Mapping[str, Any] | None = None


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Autoguidance:
    """The model of the unconditional half, if it differs from that of the conditional half."""

    uncond_model: Model | None = None


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class Drawing:
    """The sample to draw, and its ingredients."""

    seed: Seed | None = None
    sample_offset: int = 0
    x_T: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    first_step: int = 0


@dataclass(kw_only=True, repr=False, eq=False)
class Progress:
    """Reports during a run."""

    progress: bool = False
    callback: Callback | None = None


@dataclass(kw_only=True, repr=False, eq=False)
class Reporting(Progress):
    """Reports during a run, and the states to keep."""

    return_trajectory: bool = False


@dataclass(kw_only=True, repr=False, eq=False)
class SamplerOptions(Autoguidance, Conditioning, Placement, Batch, Hook, Update, Visited, Solver):
    """The arguments of `fastddim.Sampler`: all that does not change from call to call."""

    model: Model = field(kw_only=False)
    steps: Steps = field(kw_only=False)


@dataclass(kw_only=True, repr=False, eq=False)
class StepperOptions(Update, Visited):
    """The arguments of `fastddim.Stepper`."""

    schedule: Schedule = field(kw_only=False)
    steps: Steps = field(kw_only=False)
    impl: Impl = "auto"


@dataclass(kw_only=True, repr=False, eq=False)
class CallOptions(Reporting, Conditioning, Drawing):
    """The arguments that change from call to call."""

    noise: NoiseSource = None


@dataclass(kw_only=True, repr=False, eq=False)
class DrawOptions(CallOptions):
    """The arguments of a call of a `fastddim.Sampler`."""

    out: Tensor | None = None


@dataclass(kw_only=True, repr=False, eq=False)
class SampleOptions(CallOptions, SamplerOptions):
    """The arguments of `fastddim.sample`."""


@dataclass(kw_only=True, repr=False, eq=False)
class InvertOptions(
    Reporting, Autoguidance, Conditioning, Placement, Direction, Reading, Visited, Solver
):
    """The arguments of `fastddim.invert`."""

    model: Model = field(kw_only=False)
    x_0: Tensor = field(kw_only=False)
    steps: Steps = field(kw_only=False)
    refine: int = 0


@dataclass(kw_only=True, repr=False, eq=False)
class StreamOptions(Autoguidance, Placement, Hook, Thresholding, Reading, Solver):
    """The arguments of `fastddim.Stream`."""

    model: Model = field(kw_only=False)
    batch_size: int | None = None
    shape: Sequence[int] | None = None
    max_steps: int | None = None
    max_pending: int | None = None
    guided: bool = False
    masked: bool = False


@dataclass(kw_only=True, repr=False, eq=False)
class RequestOptions(Conditioning, Drawing, Noising, Direction, Visited):
    """The arguments of `fastddim.Stream.submit`."""

    steps: Steps = field(kw_only=False)
    seed: int | None = None


@dataclass(kw_only=True, repr=False, eq=False)
class TuneOptions(Autoguidance, Conditioning, Direction, Thresholding, Reading):
    """The arguments of `fastddim.tune`."""

    model: Model = field(kw_only=False)
    steps: int | Sequence[int] = field(kw_only=False)
    shape: Sequence[int] | None = None
    batch_size: int | None = None
    schedule: Schedule | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    model_dtype: torch.dtype | None = None
    effort: EffortName = "quick"
    samples: int | None = None
    seed: int = 0
    teacher_steps: int | None = None
    progress: bool = True
