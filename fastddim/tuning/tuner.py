"""Everything that the tuning of one model shares: its options, its teacher and its latents."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim import philox
from fastddim._version import __version__
from fastddim.adapter import check_eval, check_model, warn_of_training
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.inputs import Inputs
from fastddim.loop.modes import without_autograd
from fastddim.loop.setup import (
    check_uncond_model,
    resolve_device,
    resolve_model_dtype,
    resolve_schedule,
    resolve_shape,
)
from fastddim.options import TuneOptions, Update
from fastddim.plan import select_timesteps
from fastddim.signatures import shared
from fastddim.tuned import TunedFor, TunedSteps
from fastddim.tuning.candidate import Candidate, Course, Numbers, resampled
from fastddim.tuning.network import Network
from fastddim.tuning.search import EFFORTS, Effort, Search
from fastddim.tuning.teacher import jump_costs, kept, shortest_path
from fastddim.tuning.trials import Task, Trace, Trials
from fastddim.validation import check_bool, check_choice, check_dtype, check_int

# Far from the samples that users draw.
FIRST_SAMPLE = 2**31
SETS = 3
"""Latents to fit, to choose and to report by."""
# The powers of the costs by which shortest paths are found.
_POWERS = (1, 2)
# Elements of a batch's states, by default.
_BATCH_ELEMENTS = 1 << 20
_LARGEST_BATCH = 64
# Equations wanted for each unknown.
_EQUATIONS = 4


class Tuner:
    """Tunes numbers of steps one after the other; a context, within which the bar is shown.

    Attributes:
        numbers: the numbers of steps that were asked for.
    """

    def __init__(self, options: TuneOptions) -> None:
        check_model(options.model)
        check_eval(options.model)
        check_bool("progress", options.progress)
        self._effort: Effort = EFFORTS[check_choice("effort", options.effort, tuple(EFFORTS))]
        self._schedule = resolve_schedule(options.model, options.schedule)
        teacher_steps = self._effort.teacher_steps
        if options.teacher_steps is not None:
            teacher_steps = check_int("teacher_steps", options.teacher_steps, 2, self._schedule.T)
        self._teacher_steps = min(teacher_steps, self._schedule.T)
        self.numbers = _numbers(options.steps, self._teacher_steps)
        self._device = resolve_device(options.model, options.device)
        self._dtype = torch.float32
        if options.dtype is not None:
            self._dtype = check_dtype("dtype", options.dtype)
        self._shape, self._batches = self._resolve_samples(options)
        self._seed = check_int("seed", options.seed, 0, 2**64 - 1)
        update = shared(Update, options).checked(None)
        if update.noisy:
            raise ValueError(
                "eta: expected 0, since steps are tuned to the solution of an ODE, "
                f"got {options.eta}"
            )
        self._tuned_for = TunedFor.of(self._schedule, update)
        model_dtype = resolve_model_dtype(options.model, options.model_dtype, self._dtype)
        arguments = ModelArguments.of(
            options.model_kwargs,
            options.uncond_kwargs,
            batch=self._shape[0],
            guided=update.guided,
            apart=options.uncond_model is not None,
        )
        if options.uncond_model is not None:
            check_uncond_model(
                options.uncond_model, options, update.guided, model_dtype, self._device
            )
            warn_of_training("uncond_model", options.uncond_model)
        inputs = Inputs()
        inputs.load(arguments)
        self._network = Network(
            options.model,
            update,
            model_dtype,
            uncond_model=options.uncond_model,
            arguments=inputs.arguments,
        )
        self._trials = Trials(self._network, self._schedule, update)
        self._options = options
        self._taught: Taught | None = None
        self._found: dict[int, list[int]] = {}
        self._bar: Any = None

    def _resolve_samples(self, options: TuneOptions) -> tuple[tuple[int, ...], int]:
        """The shape of a batch, and the number of batches in a set of latents."""
        batch = options.batch_size
        shape = resolve_shape(options.model, options.shape, 1 if batch is None else batch)
        if 0 in shape:
            raise ValueError(f"shape: expected samples that are not empty, got {shape}")
        numel = int(np.prod(shape[1:]))
        wanted = self._effort.samples(numel)
        if options.samples is not None:
            wanted = check_int("samples", options.samples, 1, 2**20)
        least = -(-_EQUATIONS * 3 * max(self.numbers) // numel)
        if options.samples is not None and wanted < least:
            raise ValueError(
                f"samples: expected at least {least} of {numel} elements for "
                f"{max(self.numbers)} steps, got {wanted}"
            )
        if options.shape is None and batch is None:
            fitting = max(1, min(_LARGEST_BATCH, _BATCH_ELEMENTS // numel))
            shape = (min(fitting, wanted), *shape[1:])
        return shape, -(-max(wanted, least) // shape[0])

    def __enter__(self) -> Tuner:
        if self._options.progress:
            from tqdm.auto import tqdm

            total = SETS * self._teacher_steps
            total += sum(self._planned(steps) for steps in self.numbers)
            self._bar = tqdm(total=total * self._samples, desc="tuning", unit="evaluation")
            self._network.evaluated = self._bar.update
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def _samples(self) -> int:
        return self._shape[0] * self._batches

    def _planned(self, steps: int) -> int:
        """The most evaluations of the model on one sample of each set."""
        return self._effort.evaluations(steps, 2 + len(_POWERS)) + 3 * steps

    def tuned(self, steps: int) -> TunedSteps:
        """The best timesteps and weights for this number of steps.

        Raises:
            ValueError: the model's output is not finite.
        """
        with without_autograd():
            return self._tuned(steps)

    def _tuned(self, steps: int) -> TunedSteps:
        if self._taught is None:
            self._taught = self._teach()
        taught, steps_of = self._taught, self._trials.steps
        began, before = time.perf_counter(), self._network.evaluations
        trailing = select_timesteps(self._schedule.T, steps, "trailing").tolist()
        fitted, chosen_by, reported = taught.sets
        search = Search(self._trials, fitted, chosen_by, self._show)
        starts = self._starts(taught, trailing)
        found = steps_of.course(search.best(starts, self._effort).candidate)
        self._found[steps] = found.timesteps
        courses = {
            "tuned": found,
            "order 1": steps_of.untuned(trailing, 1),
            "order 2": steps_of.untuned(trailing, 2),
        }
        squares = self._trials.squares(list(courses.values()), reported)
        means = zip(courses, np.sqrt(squares.mean(1)).tolist(), strict=True)
        by_name = {name: mean for name, mean in means if np.isfinite(mean)}
        if not by_name:
            raise ValueError(
                "model output: expected finite values, got NaN or infinity in "
                f"{steps} steps of every kind"
            )
        chosen = min(by_name, key=lambda name: by_name[name])
        medians = np.sqrt(np.median(squares, axis=1)).tolist()
        record = {
            **taught.record,
            "medians": dict(zip(courses, medians, strict=True)),
            "evaluations": self._network.evaluations - before,
            "seconds": round(time.perf_counter() - began, 1),
        }
        self._advance(self._planned(steps) * self._samples - record["evaluations"])
        return self._as_steps(courses[chosen], by_name, chosen, record)

    def _starts(self, taught: Taught, trailing: list[int]) -> list[Candidate]:
        """The starts of the search: trailing timesteps, those of shortest paths, and those of the
        nearest number of steps that has been tuned.
        """
        steps = len(trailing)
        paths = [shortest_path(taught.costs, steps, power) for power in _POWERS]
        starts = [Candidate.at_order_2(trailing)]
        starts += [Candidate.at_order_2(taught.timesteps[i] for i in path) for path in paths]
        if self._found:
            nearest = min(self._found, key=lambda number: abs(number - steps))
            starts.append(resampled(self._found[nearest], steps).settled(self._schedule.T))
        return starts

    def _as_steps(
        self, course: Course, errors: dict[str, float], chosen: str, record: dict[str, Any]
    ) -> TunedSteps:
        return TunedSteps(
            timesteps=tuple(course.timesteps),
            direction=tuple(weights.direction for weights in course.weights),
            history=tuple(weights.history for weights in course.weights),
            tuned_for=self._tuned_for,
            errors=errors,
            chosen=chosen,
            record=record,
        )

    def _show(self, error: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix(error=f"{error:.3g}")

    def _advance(self, evaluations: int) -> None:
        if self._bar is not None:
            self._bar.update(evaluations)

    def _teach(self) -> Taught:
        """The exact solution for all latents, and the costs of jumps along some of it."""
        began = time.perf_counter()
        timesteps = select_timesteps(self._schedule.T, self._teacher_steps, "trailing").tolist()
        course = self._trials.steps.untuned(timesteps, 2)
        first: Trace | None = None
        sets: list[list[Task]] = [[] for _ in range(SETS)]
        for number in range(SETS * self._batches):
            x_T = self._latents(number)
            known = kept(self._teacher_steps, x_T) if first is None else 0
            trace = self._trials.trace(course, x_T, known)
            first = first or trace
            sets[number // self._batches].append(Task(x_T, trace.end))
        assert first is not None
        record = {
            "version": __version__,
            "effort": self._options.effort,
            "seed": self._seed,
            "samples": self._samples,
            "teacher_steps": self._teacher_steps,
            "teacher_evaluations": self._network.evaluations,
            "teacher_seconds": round(time.perf_counter() - began, 1),
        }
        costs = jump_costs(first, self._trials.steps.alphas(timesteps))
        return Taught(timesteps, sets, costs, record)

    def _latents(self, number: int) -> Tensor:
        return philox.initial_latents(
            self._shape,
            self._seed,
            sample_offset=FIRST_SAMPLE + number * self._shape[0],
            dtype=self._dtype,
            device=self._device,
        )


def warn_where_untuned(steps: TunedSteps, *, stacklevel: int) -> None:
    """Warn of steps for which tuning did not help."""
    if steps.chosen == "tuned":
        return
    tuned = steps.errors.get("tuned", np.inf)
    warnings.warn(
        f"tuning {steps.steps} steps did not help: the distance to the exact solution is "
        f"{tuned:.3g}, and {steps.errors[steps.chosen]:.3g} at {steps.chosen} with trailing "
        "timesteps, which are returned",
        stacklevel=stacklevel + 1,
    )


@dataclass(frozen=True, eq=False)
class Taught:
    """The results of the teacher.

    Attributes:
        timesteps: those that it visits.
        sets: the latents to fit, to choose and to report by.
        costs: the cost of one step from each of its states to each later one.
        record: its part of the record of `TunedSteps`.
    """

    timesteps: list[int]
    sets: Sequence[Sequence[Task]]
    costs: Numbers
    record: dict[str, Any]


def _numbers(steps: Any, teacher_steps: int) -> list[int]:
    """The numbers of steps that are asked for."""
    given = [steps] if isinstance(steps, int) else steps
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise TypeError(f"steps: expected an integer or a sequence of integers, got {steps!r}")
    numbers = [check_int("steps", number, 1, 2**31) for number in given]
    for number in numbers:
        # Paths through the teacher's states need a choice of them.
        if number > teacher_steps // 2:
            raise ValueError(
                f"steps: expected at most {teacher_steps // 2}, half of the teacher's "
                f"{teacher_steps} (see teacher_steps), got {number}"
            )
    return numbers
