"""Tuned steps: timesteps and weights that were chosen for one model, as an object and as a file.

A step of any order takes the state to √ᾱ_prev·x_0 + direction·ε + history·ε_before (eq. 12 of arXiv
2010.02502, with the epsilon of the step before added). Usually the schedule gives `direction` and
the order gives `history`. Tuned steps have their own values of both, and their own timesteps.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from torch import Tensor

from fastddim.files import atomic_file
from fastddim.schedule import Schedule
from fastddim.validation import check_bool, check_choice, check_int, check_number

FORMAT = "fastddim tuned steps"
VERSION = 1

CHOICES = ("tuned", "order 1", "order 2")
"""The kinds of steps that the tuner compares."""

# A file can come from anywhere; the steps of a model take some kilobytes.
_LARGEST_FILE = 16 * 2**20
_DIGITS = 64


@dataclass(frozen=True, kw_only=True, repr=False)
class TunedFor:
    """All that tuned weights depend on besides the model; they are valid for nothing else.

    Attributes:
        schedule: SHA-256 of ᾱ, as `schedule_digest` gives it.
        T: number of timesteps of the schedule.
        prediction: an option of `fastddim.sample`, as are the following attributes.
    """

    schedule: str
    T: int
    prediction: str
    clip: float | None
    rederive_eps: bool
    guidance_scale: float | None
    guidance_rescale: float
    dynamic_thresholding_ratio: float | None
    sample_max_value: float | None

    def __post_init__(self) -> None:
        for name in ("schedule", "prediction"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a string, got {value!r}")
        if len(self.schedule) != _DIGITS or set(self.schedule) - set("0123456789abcdef"):
            raise ValueError(
                f"schedule: expected a SHA-256 of {_DIGITS} hex digits, got {self.schedule!r}"
            )
        numbers: dict[str, Any] = {"T": check_int("T", self.T, 1, 2**31)}
        check_bool("rederive_eps", self.rederive_eps)
        numbers["guidance_rescale"] = check_number("guidance_rescale", self.guidance_rescale)
        for name in ("clip", "guidance_scale", "dynamic_thresholding_ratio", "sample_max_value"):
            value = getattr(self, name)
            numbers[name] = None if value is None else check_number(name, value)
        vars(self).update(numbers)

    @classmethod
    def of(cls, schedule: Schedule, options: Any) -> TunedFor:
        """The part of some options that weights depend on.

        Args:
            schedule: the model's schedule.
            options: an object with the names of the other fields, such as a checked
                `fastddim.plan.Update`. Guidance may be a tensor or a sequence if all its numbers
                are equal.

        Raises:
            TypeError, ValueError: an option is of the wrong type or range, or guidance differs
                between steps or samples.
        """
        values = {name: getattr(options, name) for name in _OPTIONS}
        guidance = set(_numbers(values["guidance_scale"]))
        if len(guidance) > 1:
            raise ValueError(
                "guidance_scale: expected the same number at each step and for each sample of "
                f"tuned steps, got {sorted(guidance)}"
            )
        values["guidance_scale"] = guidance.pop() if guidance else None
        return cls(schedule=schedule_digest(schedule), T=schedule.T, **values)

    def __repr__(self) -> str:
        return f"TunedFor({self.described()})"

    def described(self) -> str:
        """T and the options that are in use, on one line."""
        given = {name: getattr(self, name) for name in ("T", *_OPTIONS)}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value)


_OPTIONS = tuple(each.name for each in fields(TunedFor))[2:]


@dataclass(frozen=True, kw_only=True, repr=False)
class TunedSteps:
    """Timesteps and weights chosen for one model, to be given as `steps` wherever it samples.

    A step takes x_t to √ᾱ_prev·x_0 + direction·ε + history·ε_before, with x_0 and ε predicted at
    x_t, and ε_before predicted at the step before. After the last step ᾱ is 1.

    Attributes:
        timesteps: the S timesteps, strictly decreasing.
        direction: factor of ε at each step.
        history: factor of ε_before at each step, 0 at the first.
        tuned_for: conditions that the weights are valid for; others are refused.
        errors: root mean square distances to the exact solution, on latents that the tuner did not
            use, for each kind of steps: "tuned", "order 1" and "order 2".
        chosen: the best kind of steps; the weights of "order 1" or "order 2" are those of
            `fastddim.sample` at the same timesteps.
        record: origin of the numbers, as JSON.

    Raises:
        TypeError, ValueError: a field is of the wrong type, length or range; the message names it.
    """

    timesteps: tuple[int, ...]
    direction: tuple[float, ...]
    history: tuple[float, ...]
    tuned_for: TunedFor
    errors: dict[str, float] = field(default_factory=dict, hash=False)
    chosen: str = "tuned"
    record: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.tuned_for, TunedFor):
            raise TypeError(f"tuned_for: expected a TunedFor, got {type(self.tuned_for).__name__}")
        checked: dict[str, Any] = {"timesteps": self._checked_timesteps()}
        for name in ("direction", "history"):
            values = _sequence(name, getattr(self, name))
            if len(values) != self.steps:
                raise ValueError(
                    f"{name}: expected one value a step, {self.steps}, got {len(values)} of them"
                )
            checked[name] = tuple(check_number(f"{name}[{s}]", v) for s, v in enumerate(values))
        if checked["history"][0] != 0:
            raise ValueError(
                "history[0]: expected 0, since no step comes before the first, "
                f"got {checked['history'][0]}"
            )
        errors = _mapping("errors", self.errors)
        for name in errors:
            check_choice("errors", name, CHOICES)
        checked["errors"] = {n: check_number(f"errors[{n!r}]", v, 0.0) for n, v in errors.items()}
        check_choice("chosen", self.chosen, CHOICES)
        checked["record"] = dict(_mapping("record", self.record))
        vars(self).update(checked)

    def _checked_timesteps(self) -> tuple[int, ...]:
        T, given = self.tuned_for.T, _sequence("timesteps", self.timesteps)
        timesteps = tuple(check_int(f"timesteps[{s}]", t, 0, T - 1) for s, t in enumerate(given))
        if not timesteps:
            raise ValueError("timesteps: expected at least one, got none")
        for s, (before, after) in enumerate(itertools.pairwise(timesteps), start=1):
            if after >= before:
                raise ValueError(
                    "timesteps: expected strictly decreasing values, "
                    f"got timesteps[{s}] = {after} after {before}"
                )
        return timesteps

    @property
    def steps(self) -> int:
        """S, the number of steps."""
        return len(self.timesteps)

    def __repr__(self) -> str:
        """The number of steps, their errors and the conditions that they are for, on one line."""
        errors = (
            ", ".join(f"{name} {value:.3g}" for name, value in self.errors.items()) or "unknown"
        )
        given = self.tuned_for.described()
        return f"TunedSteps(S={self.steps}, {given}; errors: {errors}; chosen: {self.chosen})"

    def check_valid(self, schedule: Schedule, options: Any) -> None:
        """Refuse a schedule or options that the weights were not tuned for.

        Args:
            schedule: the model's schedule.
            options: as for `TunedFor.of`.

        Raises:
            ValueError: the schedule or an option differs; the message names it.
        """
        wanted, given = self.tuned_for, TunedFor.of(schedule, options)
        if (given.T, given.schedule) != (wanted.T, wanted.schedule):
            raise ValueError(
                f"steps: expected the schedule for which they were tuned, {_schedule(wanted)}, "
                f"got {schedule!r}, {_schedule(given)}"
            )
        for name in _OPTIONS:
            expected, value = getattr(wanted, name), getattr(given, name)
            if value != expected:
                raise ValueError(
                    f"steps: expected {name} {expected!r}, for which they were tuned, got {value!r}"
                )

    def as_dict(self) -> dict[str, Any]:
        """The fields in the types of JSON, for `from_dict`."""
        content = asdict(self)
        return content | {n: list(v) for n, v in content.items() if isinstance(v, tuple)}

    @classmethod
    def from_dict(cls, content: Any) -> TunedSteps:
        """Make the steps that `as_dict` describes.

        Raises:
            ValueError: `content` does not describe tuned steps; the message names the field.
        """
        try:
            given = dict(_named("tuned steps", content, _FIELDS))
            tuned_for = _named("tuned_for", given["tuned_for"], [f.name for f in fields(TunedFor)])
            given["tuned_for"] = _tuned_for(tuned_for)
            return cls(**given)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `fastddim.load_steps`, whole or not at all.

        Raises:
            ValueError: `record` holds a value that JSON cannot.
            OSError: the file cannot be written.
        """
        write_json(path, self.as_dict())


_FIELDS = tuple(each.name for each in fields(TunedSteps))


def load_steps(path: str | os.PathLike[str]) -> TunedSteps:
    """Load the steps from a file that `TunedSteps.save` wrote.

    Raises:
        ValueError: the file is not such a file, or of an unknown version; the message names the
            field.
        OSError: the file cannot be read.
    """
    content = read_json(path)
    try:
        return TunedSteps.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def schedule_digest(schedule: Schedule) -> str:
    """SHA-256 over the bytes of ᾱ, in float64 and little-endian, as hex digits."""
    values = schedule.alphas_cumprod.numpy()
    return hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write the fields of a file of tuned steps, whole or not at all."""
    heading = {"format": FORMAT, "version": VERSION}
    try:
        text = json.dumps({**heading, **content}, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"record: expected values that JSON can hold, got {error}") from error
    with atomic_file(path) as file:
        file.write((text + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a file of tuned steps.

    Raises:
        ValueError: the file is not such a file, or of an unknown version.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(_LARGEST_FILE + 1)
    if len(text) > _LARGEST_FILE:
        raise ValueError(f"{path}: expected at most {_LARGEST_FILE} bytes, got more")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON of tuned steps, got {error}") from error
    content = content if isinstance(content, dict) else {}
    for name, expected in (("format", FORMAT), ("version", VERSION)):
        got = content.pop(name, None)
        if type(got) is not type(expected) or got != expected:
            raise ValueError(f"{path}: {name}: expected {expected!r}, got {got!r}")
    return content


def _tuned_for(given: Mapping[str, Any]) -> TunedFor:
    try:
        return TunedFor(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tuned_for.{error}") from error


def _named(what: str, content: Any, names: Any) -> Mapping[str, Any]:
    """A JSON object, checked to have these fields and no others."""
    given = _mapping(what, content)
    missing, unknown = set(names) - set(given), set(given) - set(names)
    if missing or unknown:
        raise ValueError(
            f"{what}: expected the fields {', '.join(names)}, "
            f"got missing {sorted(missing)} and unknown {sorted(unknown)}"
        )
    return given


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: expected a mapping from strings, got {value!r}")
    return value


def _sequence(name: str, value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected a sequence of numbers, got {value!r}")
    return value


def _numbers(value: Any) -> list[float]:
    """The numbers in a coefficient, which may be a tensor, a sequence of either, or None."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return cast(list[float], value.reshape(-1).tolist())
    if isinstance(value, list | tuple):
        return [number for each in value for number in _numbers(each)]
    return [value]


def _schedule(tuned_for: TunedFor) -> str:
    return f"T = {tuned_for.T} and SHA-256 of alphas_cumprod {tuned_for.schedule[:16]}…"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which is not a number in JSON")
