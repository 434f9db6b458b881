"""A prepared step without its tensors, which `fastddim.step` makes from numbers and keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastddim import backends, transfer
from fastddim.choices import Impl, Prediction, PredictionSynonym, Variance, VarianceSynonym
from fastddim.kept import ordinary
from fastddim.options import PER_STEP, Coefficient, NoiseSource, Rescaling, Seed, Update
from fastddim.plan import coefficient_row, stack_row, to_table
from fastddim.reference import compute_dtype
from fastddim.steptable import backend_in_graph
from fastddim.tracing import HELD, PLAIN, constant, is_constant
from fastddim.transforms import bare
from fastddim.validation import check_coefficient, with_derivatives


class StepOptions(TypedDict, total=False):
    """The options of `fastddim.step` besides `return_x0`, which selects the type of the result."""

    eta: Coefficient
    variance: Variance | VarianceSynonym
    prediction: Prediction | PredictionSynonym
    clip: float | None
    rederive_eps: bool
    guidance_scale: Coefficient | None
    temperature: Coefficient
    guidance_rescale: float
    dynamic_thresholding_ratio: float | None
    sample_max_value: float | None
    seed: Seed | None
    sample_offset: int
    step_index: int | Tensor
    noise: NoiseSource
    out: Tensor | None
    impl: Impl


class PreparedStep(NamedTuple):
    """A step without its tensors."""

    backend: backends.Backend
    table: Tensor  # [1 or B, K]
    row: Tensor  # [1 or B]
    rescaling: Rescaling | None
    noisy: bool
    guided: bool
    tracked: bool  # the table has derivatives
    in_graph: bool = False  # the step is traced


def prepared_step(
    x_t: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    impl: str,
    update: Mapping[str, Any],
) -> PreparedStep:
    """A step without its tensors, remembered if it follows from plain numbers."""
    has_values = type(x_t) in PLAIN
    if is_dynamo_compiling() or (not has_values and is_compiling()):
        return _step_in_graph(x_t, alpha_t, alpha_prev, impl, update)
    coefficients = (alpha_t, alpha_prev, *map(update.__getitem__, PER_STEP))
    plain = has_values and not any(map(_is_tensor, coefficients))
    # A table made while a graph is captured holds its values only after the graph is replayed.
    if plain and not transfer.captured(x_t.device):
        try:
            return _remembered_step(x_t.dtype, x_t.device, alpha_t, alpha_prev, impl, **update)
        except TypeError:
            pass  # An argument is not hashable, or a check failed; the checks below name it.
    device, batch = x_t.device, x_t.shape[0]
    return _prepare_step(x_t.dtype, device, alpha_t, alpha_prev, impl, batch, **update)


@lru_cache(maxsize=4096, typed=True)
def _remembered_step(
    dtype: torch.dtype,
    device: torch.device,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    impl: str,
    **update: Any,
) -> PreparedStep:
    def prepared() -> PreparedStep:
        step = _prepare_step(dtype, device, alpha_t, alpha_prev, impl, None, **update)
        transfer.wait(device)  # Another stream may use the step.
        return step

    return ordinary(prepared)


def _prepare_step(
    dtype: torch.dtype,
    device: torch.device,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    impl: str,
    batch: int | None,
    **given: Any,
) -> PreparedStep:
    backend = backends.choose(impl, device)
    a, p, update = _checked(alpha_t, alpha_prev, batch, given)
    update = replace(update, **{name: _on(device, getattr(update, name)) for name in PER_STEP})
    rows = stack_row(coefficient_row(_on(device, a), _on(device, p), update))
    table = transfer.upload(to_table(rows, compute_dtype(dtype), rows.device), device)
    row = torch.arange(table.shape[0], device=device)
    kind = (update.rescaling, update.noisy, update.guided)
    return PreparedStep(backend, table, row, *kind, tracked=not bare(table))


def _checked(
    alpha_t: Coefficient, alpha_prev: Coefficient, batch: int | None, given: Mapping[str, Any]
) -> tuple[Coefficient, Coefficient, Update]:
    """The coefficients and the kind of step; coefficients keep the derivatives of the arguments."""
    update = Update(**given).checked(batch)
    changed: dict[str, Any] = {
        name: with_derivatives(getattr(update, name), given[name]) for name in PER_STEP
    }
    a, p = (
        with_derivatives(check_coefficient(name, value, batch, 0.0, 1.0), value)
        for name, value in (("alpha_t", alpha_t), ("alpha_prev", alpha_prev))
    )
    return a, p, replace(update, **changed)


def _step_in_graph(
    x_t: Tensor,
    alpha_t: Coefficient,
    alpha_prev: Coefficient,
    impl: str,
    given: Mapping[str, Any],
) -> PreparedStep:
    """`prepared_step` for a graph that is traced: numbers that the graph holds constant become a
    constant table, and numbers that are inputs of the graph become tensors.
    """
    device, batch = x_t.device, x_t.shape[0]
    a, p, update = _checked(alpha_t, alpha_prev, batch, given)
    coefficients = (a, p, *(getattr(update, name) for name in PER_STEP))
    tensors = any(map(_is_tensor, coefficients))
    if not tensors and all(v is None or is_constant(v) for v in coefficients):
        name = _constant_table(x_t.dtype, device, alpha_t, alpha_prev, impl, **given)
        table = getattr(HELD, name)
    else:
        count = batch if tensors else 1

        def tensor(value: Any) -> Any:
            if value is None or _is_tensor(value) or is_constant(value):
                return _on(device, value)
            # A factor of a tensor may be an input of a graph; a fill value becomes a constant.
            return torch.ones(count, dtype=torch.float64, device=device) * value

        changed = {name: tensor(getattr(update, name)) for name in PER_STEP}
        rows = stack_row(coefficient_row(tensor(a), tensor(p), replace(update, **changed)))
        table = to_table(rows, compute_dtype(x_t.dtype), device)
    return PreparedStep(
        backend_in_graph(impl, device),
        table,
        torch.arange(table.shape[0], device=device),
        update.rescaling,
        update.noisy,
        update.guided,
        tracked=not bare(table),
        in_graph=True,
    )


@constant
def _constant_table(*arguments: Any, **update: Any) -> str:
    """The name under which the graph holds the table."""
    return HELD.name_of(_remembered_step(*arguments, **update).table)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
