"""Timesteps and coefficients of one sampling run."""

from fastddim.choices import PREDICTIONS, VARIANCES
from fastddim.options import Coefficient, PerStep, Rescaling, Update
from fastddim.plan.multistep import (
    NO_HISTORY,
    ORDERS,
    EpsilonWeights,
    HistoryWeights,
    epsilon_weights,
    history_weights,
)
from fastddim.plan.plan import Plan, StepKind, make_inversion_plan, make_plan
from fastddim.plan.rows import (
    Row,
    Scales,
    coefficient_row,
    first_half_row,
    inversion_row,
    mixing_row,
    prediction_coefficients,
    row_of,
    second_half_row,
    settled,
    unchecked_row,
)
from fastddim.plan.table import known_rows, stack_row, stack_rows, to_table
from fastddim.plan.timesteps import SPACINGS, select_timesteps

__all__ = [
    "NO_HISTORY",
    "ORDERS",
    "PREDICTIONS",
    "SPACINGS",
    "VARIANCES",
    "Coefficient",
    "EpsilonWeights",
    "HistoryWeights",
    "PerStep",
    "Plan",
    "Rescaling",
    "Row",
    "Scales",
    "StepKind",
    "Update",
    "coefficient_row",
    "epsilon_weights",
    "first_half_row",
    "history_weights",
    "inversion_row",
    "known_rows",
    "make_inversion_plan",
    "make_plan",
    "mixing_row",
    "prediction_coefficients",
    "row_of",
    "second_half_row",
    "select_timesteps",
    "settled",
    "stack_row",
    "stack_rows",
    "to_table",
    "unchecked_row",
]
