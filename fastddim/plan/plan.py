"""The plan of a run: the timesteps that it visits and the numbers of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastddim.choices import Spacing, SpacingSynonym
from fastddim.options import Rescaling, Solver, Steps, Update, Visited
from fastddim.plan.multistep import (
    NO_HISTORY,
    ORDERS,
    EpsilonWeights,
    Weights,
    history_weights,
)
from fastddim.plan.rows import Row, coefficient_row, first_half_row, inversion_row, second_half_row
from fastddim.plan.table import stack_rows
from fastddim.plan.timesteps import select_timesteps
from fastddim.schedule import Schedule
from fastddim.tuned import TunedSteps
from fastddim.validation import check_choice, check_int


class StepKind(NamedTuple):
    """Everything that the steps of a loop have in common: the tensors and kernels that they need.

    Attributes:
        rescaling: the part of rows that comes from the data of a step, if any does.
        noisy: whether a step may add noise.
        guided: whether the model's output has 2B samples.
        history: the number of epsilons of earlier steps that a step reads.
        refine: the number of times that a step is repeated with the model evaluated at its result.
        split: whether a function of the user comes between the predicted x_0 and the new state.
        rederived: whether the second half of a split step reads the state instead of epsilon.
        apart: whether the halves of guidance come from two models, each evaluated on B samples.
    """

    rescaling: Rescaling | None
    noisy: bool
    guided: bool
    history: int = 0
    refine: int = 0
    split: bool = False
    rederived: bool = False
    apart: bool = False

    @property
    def parts(self) -> int:
        """The size of the model's batch in batches of the state."""
        return 2 if self.guided and not self.apart else 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The timesteps of a run, and the numbers of its steps.

    Attributes:
        timesteps: int64 `[S]` in the order visited, as the model is given them.
        alphas_cumprod: float64 `[S + 1]`, ᾱ of the states: before the first step and after each.
        table: float64 `[S, K]`, or `[B, S, K]` where a coefficient differs between samples; K =
            len(Row._fields).
        first_half: where steps are split, rows like those of `table` that give the predicted x_0
            as the new state; `table` then has the second halves.
        kind: what the steps have in common.
        order: the order of the integration; 2 for tuned steps, which need the same tensors.
        tuned: the tuned steps that the plan is made of, if any.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor
    table: Tensor
    first_half: Tensor | None = None
    kind: StepKind
    order: int
    tuned: TunedSteps | None = None

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]


def make_plan(
    schedule: Schedule,
    steps: Steps,
    update: Update,
    *,
    spacing: Spacing | SpacingSynonym = "trailing",
    steps_offset: int = 0,
    order: int = 1,
    split: bool = False,
) -> Plan:
    """The plan of `sample`: down the timesteps, to ᾱ = 1 after the last.

    Args:
        schedule: ᾱ of the model.
        steps: the number of steps (`spacing` and `steps_offset` then choose them), or the timesteps
            themselves in the order they are visited, or tuned steps, which have weights as well.
        update: the kind of step, checked.
        order: 1, or 2 for the two-step Adams–Bashforth form of eq. 14, whose first step is of
            order 1.
        split: whether steps are split at the predicted x_0.

    Raises:
        TypeError, ValueError: see `select_timesteps` and `coefficient_row`; the message names the
            step. Also raised for an unknown `order`, and for order 2 with noise. Tuned steps refuse
            noise, any `spacing`, `steps_offset` or `order` except the defaults, and options that
            they were not tuned for.
    """
    check_choice("order", order, ORDERS)
    tuned = steps if isinstance(steps, TunedSteps) else None
    if tuned is not None:
        _check_tuned(tuned, schedule, update, spacing, steps_offset, order)
        order = 2
    elif order > 1 and update.noisy:
        raise ValueError("order: expected 1 with eta > 0, since order 2 solves an ODE, got 2")
    timesteps = select_timesteps(schedule.T, steps, spacing, steps_offset)
    alphas = [*schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    weights = _solver_weights(order, alphas) if tuned is None else _tuned_weights(tuned)
    rows: list[Row] = []
    first_half: list[Row] = []
    for s, (t, each) in enumerate(
        zip(timesteps.tolist(), update.at_each(len(timesteps)), strict=True)
    ):
        a, p = alphas[s], alphas[s + 1]
        row = coefficient_row(a, p, each, where=_where(s, t), weights=weights[s])
        if split:
            first_half.append(first_half_row(row))
            row = second_half_row(a, p, each, row, weights[s])
        rows.append(row)
    table, first_halves = stack_rows(rows), stack_rows(first_half) if split else None
    if first_halves is not None:
        # One index finds the rows of both, even where only one differs between samples.
        table, first_halves = torch.broadcast_tensors(table, first_halves)
    return Plan(
        timesteps=timesteps,
        alphas_cumprod=torch.tensor(alphas, dtype=torch.float64, device="cpu"),
        table=table,
        first_half=first_halves,
        kind=StepKind(
            rescaling=update.rescaling,
            noisy=update.noisy,
            guided=update.guided,
            history=order - 1,
            split=split,
            rederived=split and update.rederive_eps,
        ),
        order=order,
        tuned=tuned,
    )


def make_inversion_plan(
    schedule: Schedule,
    steps: Steps,
    update: Update,
    *,
    spacing: Spacing | SpacingSynonym = "trailing",
    steps_offset: int = 0,
    order: int = 1,
    refine: int = 0,
) -> Plan:
    """The plan of `invert`: the same timesteps upwards, from ᾱ = 1.

    At order 1 the step to timestep t evaluates the model at t. At order 2 every step except the
    first evaluates it at the timestep from which the step starts, as that order requires.

    Raises:
        TypeError, ValueError: see `select_timesteps` and `inversion_row`; also for an unknown
            `order`, and for `refine` where it is not an integer in [0, 100] or not 0 at order 2.
            Tuned steps are refused: their weights integrate downwards.
    """
    if isinstance(steps, TunedSteps):
        raise ValueError(
            "steps: expected a number or timesteps to invert, since tuned weights only lead from "
            f"noise to data; steps.timesteps are those of the tuned steps, got {steps!r}"
        )
    check_choice("order", order, ORDERS)
    check_int("refine", refine, 0, 100)
    if refine and order > 1:
        raise ValueError(
            f"refine: expected 0 at order 2, which leaves nothing to iterate, got {refine}"
        )
    timesteps = select_timesteps(schedule.T, steps, spacing, steps_offset).flip(0)
    alphas = [1.0, *schedule.alphas_cumprod[timesteps].tolist()]
    rows = []
    for s, (t, each) in enumerate(
        zip(timesteps.tolist(), update.at_each(len(timesteps)), strict=True)
    ):
        p, a, where = alphas[s], alphas[s + 1], _where(s, t)
        if order > 1 and s > 0:
            weights = history_weights(order, alphas[s - 1], p, a)
            rows.append(coefficient_row(p, a, each, where=where, weights=weights))
        else:
            rows.append(inversion_row(a, p, each, where=where))
    if order > 1:
        timesteps = torch.cat([timesteps[:1], timesteps[:-1]])
    return Plan(
        timesteps=timesteps,
        alphas_cumprod=torch.tensor(alphas, dtype=torch.float64, device="cpu"),
        table=stack_rows(rows),
        kind=StepKind(
            rescaling=update.rescaling,
            noisy=False,
            guided=update.guided,
            history=order - 1,
            refine=refine,
        ),
        order=order,
    )


def _solver_weights(order: int, alphas: Sequence[float]) -> list[Weights]:
    """The weights of each step; `alphas` are those of the states."""
    later = [history_weights(order, *alphas[s : s + 3]) for s in range(len(alphas) - 2)]
    return [NO_HISTORY, *later]


def _tuned_weights(tuned: TunedSteps) -> list[Weights]:
    return [EpsilonWeights(*pair) for pair in zip(tuned.direction, tuned.history, strict=True)]


def _check_tuned(
    tuned: TunedSteps,
    schedule: Schedule,
    update: Update,
    spacing: Spacing | SpacingSynonym,
    steps_offset: int,
    order: int,
) -> None:
    if update.noisy:
        raise ValueError(
            f"eta: expected 0 with tuned steps, which solve an ODE, got {update.eta!r}"
        )
    for name, value, default in (
        ("spacing", spacing, Visited.spacing),
        ("steps_offset", steps_offset, Visited.steps_offset),
        ("order", order, Solver.order),
    ):
        if value != default:
            raise ValueError(
                f"{name}: expected {default!r}, the default, with tuned steps, which have "
                f"timesteps and weights of their own, got {value!r}"
            )
    tuned.check_valid(schedule, update)


def _where(s: int, t: int) -> str:
    return f" at step {s} (timestep {t})"
