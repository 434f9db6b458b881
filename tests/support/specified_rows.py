"""Rows that take factors from their data, to the bit, on NumPy: the specification of csrc/cpu/fit.h
and of the GPU kernels.

`reference.rescaled_rows` says what they mean; here the order of sums is told and where numbers are
rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.plan import Rescaling, Row

from .gpuless import exact
from .updates import Case

LANES = 256


def specified_rows(case: Case, rescaling: Rescaling) -> Tensor:
    """Rows `[B, K]` in the dtype of the table."""
    table, index = case.table.numpy(), case.row.numpy()
    rows = np.empty((len(case.x), len(Row._fields)), table.dtype)
    with np.errstate(all="ignore"):
        for sample in range(len(case.x)):
            row = Row(*table[index[sample if len(index) > 1 else 0]])
            rows[sample] = _rescaled(row, *_values(case, sample), rescaling)
    return torch.from_numpy(rows)


def _values(case: Case, sample: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """x, and the unconditional and conditional output if there are two, in row-major order."""
    batch, dtype = len(case.x), case.table.dtype
    channels = case.x.shape[1] if case.x.ndim > 1 else None
    halves = case.model_output.split(batch)
    x, *outputs = (
        values.to(dtype).reshape(-1).numpy()
        for values in (case.x[sample], *(half[sample, :channels] for half in halves))
    )
    return x, outputs


def _rescaled(row: Any, x: np.ndarray, outputs: list[np.ndarray], rescaling: Rescaling) -> Any:
    number = row.cx.dtype.type
    fma = exact.fma64 if number is np.float64 else exact.fma32
    m = outputs[0]
    if len(outputs) == 2:
        m = fma(np.full_like(m, row.g), outputs[1] - m, m)
    if rescaling.rescale > 0:
        ratio = np.sqrt(_squared_deviations(outputs[1]) / _squared_deviations(m))
        ratio = ratio if np.isfinite(ratio) else 1.0
        factor = number(rescaling.rescale * ratio + (1 - rescaling.rescale))
        row = row._replace(cm=row.cm * factor, km=row.km * factor, em=row.em * factor)
    if rescaling.ratio > 0:
        x_0 = fma(np.full_like(x, row.cx), x, row.cm * m)
        s = _threshold(np.abs(x_0), rescaling, number)
        row = row._replace(cx=row.cx / s, cm=row.cm / s, r=number(1))
    return row


def _squared_deviations(values: np.ndarray) -> Any:
    """The squared deviations: element i goes to sum i % 256, then the upper half of the sums is
    added to the lower one.
    """
    count = len(values)
    d = values.astype(np.float64) - (np.float64(values[0]) if count else 0.0)
    d = np.append(d, np.zeros(-count % LANES)).reshape(-1, LANES)
    totals = []
    for terms in (d, d * d):
        sums = np.zeros(LANES)
        for term in terms:
            sums = sums + term
        while len(sums) > 1:
            low, high = np.split(sums, 2)
            sums = low + high
        totals.append(sums[0])
    return totals[1] - totals[0] * totals[0] / np.float64(count)


def _threshold(magnitudes: np.ndarray, rescaling: Rescaling, number: Any) -> Any:
    count = len(magnitudes)
    if count == 0:
        return number(1)
    if np.isnan(magnitudes).any():
        return number(np.nan)
    ordered, position = np.sort(magnitudes), rescaling.ratio * (count - 1)
    rank = int(position)
    low, high = ordered[rank], ordered[min(rank + 1, count - 1)]
    s = low + (high - low) * number(position - rank)
    s = number(1) if s < 1 else s
    return number(rescaling.limit) if s > rescaling.limit else s
