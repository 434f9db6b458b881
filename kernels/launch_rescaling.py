"""Launches that take factors of coefficients from the data."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from .checks import Meta, check_rescaling, meta_of
from .launch import _device_of, _Launch, _options, _second_half, _warp_size
from .rescaling import THREADS, Data, rescaling_kernel
from .views import lay_out

_REGISTERS = 96
"""The registers of a thread: enough for none to be spilled, as there are few programs anyway."""


def fit_rows(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    rescale: float,
    ratio: float,
    limit: float,
    out: Tensor,
) -> None:
    """Write rows for these data; the arguments are those of `fastddim::fit_rows`.

    The values of `row` are not checked.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    data = Data(x, model_output)
    metas = Data(*map(meta_of, data))
    launch = _prepare(metas, meta_of(table), meta_of(row), meta_of(out), rescale > 0, ratio > 0)
    if launch is None:
        return
    # The kernel takes no quantile of a sample without elements.
    last = max(math.prod(x.shape[1:]) - 1, 0)
    position = ratio * last
    with _device_of(x):
        rescaling_kernel[launch.grid](
            Data(*launch.view(data)),
            table=table,
            row=row,
            out=out,
            rescale=rescale,
            rank=int(position),
            fraction=position - int(position),
            limit=limit,
            **launch.constants,
        )


@functools.lru_cache(maxsize=1024)
def _prepare(
    data: Data, table: Meta, row: Meta | None, out: Meta, rescales: bool, thresholds: bool
) -> _Launch | None:
    """The checked launch, or None where there is nothing to do."""
    check_rescaling(data, table, row, out, rescales=rescales)
    x, model_output = data
    batch = x.shape[0]
    if batch == 0:
        return None
    layout = lay_out(x.shape, [x.strides, model_output.strides], ordered_by=None, one_row=False)
    constants: dict[str, Any] = {
        "conditional": _second_half(model_output, batch),
        "sizes": layout.sizes,
        "count": layout.elements,
        "RESCALES": rescales,
        "THRESHOLDS": thresholds,
        "PER_SAMPLE": row is not None and row.shape[0] > 1,
        "WIDE": layout.wide,
        "num_warps": THREADS // _warp_size(x.device),
        **_options(_REGISTERS),
    }
    return _Launch((batch, 1), layout.strides, constants)
