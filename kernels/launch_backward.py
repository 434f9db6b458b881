"""Launches of the backward pass."""

from __future__ import annotations

import functools

from torch import Tensor

from .backward import Tensors, backward_kernel
from .checks import Meta, check_gradients, meta_of
from .launch import _aligned, _device_of, _Launch, _launch, _second_half
from .views import lay_out


def backward_out(
    grad_x_prev: Tensor | None,
    grad_x_0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    mask: Tensor | None,
    grad_x: Tensor,
    grad_model_output: Tensor,
) -> None:
    """Write the gradients of an update; the arguments are those of `fastddim::backward_out`.

    Channels of the model output that are not read have no gradient, and none is written. The values
    of `row` are not checked.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    tensors = (grad_x_prev, grad_x_0, x, model_output, mask, grad_x, grad_model_output)
    launch = _prepare(
        Tensors(*map(meta_of, tensors)), meta_of(table), meta_of(row), _aligned(tensors)
    )
    if launch is None:
        return
    with _device_of(x):
        backward_kernel[launch.grid](
            Tensors(*launch.view(tensors)), table=table, row=row, **launch.constants
        )


@functools.lru_cache(maxsize=1024)
def _prepare(tensors: Tensors, table: Meta, row: Meta | None, aligned: bool) -> _Launch | None:
    """The checked launch, or None where there is nothing to do."""
    check_gradients(tensors, table, row)
    x, per_sample = tensors.x, row is not None and row.shape[0] > 1
    if 0 in x.shape:
        return None
    layout = lay_out(
        x.shape,
        [None if tensor is None else tensor.strides for tensor in tensors],
        ordered_by=Tensors._fields.index("grad_x"),
        one_row=not per_sample,
    )
    return _launch(
        layout,
        [tensor for tensor in tensors if tensor is not None],
        capped=False,
        aligned=aligned,
        conditional=_second_half(tensors.model_output, x.shape[0]),
        second_gradient=_second_half(tensors.grad_model_output, x.shape[0]),
        PER_SAMPLE=per_sample,
    )
