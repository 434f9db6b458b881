"""The derivatives of the update: gradients by a kernel, all others by PyTorch's own operators.

The update is affine in all its tensors where the clip does not act. Its gradients take one pass, in
`fastddim::backward` or an operator like it. A gradient that is itself differentiated is worked out
by `reference.gradients`. The update is that of `reference.updated` where a transform of
`torch.func` or forward-mode differentiation is at work, or where the table or the mask has a
gradient. PyTorch knows every derivative of the operators that these two functions are made of.

`torch.vmap` makes one batch of all samples, which the kernel takes at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from fastddim import philox, reference
from fastddim.ops import Inputs
from fastddim.plan import Row
from fastddim.transforms import below_autograd, followed, transformed

_ADDED = ("noise", "history", "known")
"""Inputs that are added to the new state, each with a factor of its own."""

_CONTIGUOUS = ("table", "row", "seed", "step", "sample")
"""Inputs that kernels read as contiguous memory."""


def composed(inputs: Inputs) -> reference.Updated:
    """The update by `reference.updated`, in PyTorch's own operators."""
    x, keys, noise = inputs.x, inputs.keys, inputs.noise
    if keys is not None:
        noise = philox.normal(keys, x.shape[1:], philox.STEP_NOISE)
    rows = reference.rows_in(inputs.table, inputs.row)
    return reference.updated(
        x, inputs.model_output, rows, noise, inputs.history, inputs.mask, inputs.known
    )


class _Fused(torch.autograd.Function):
    """An operator with the schema of `fastddim::update`, and one for its gradients."""

    @staticmethod
    def forward(ctx: Any, operator: Any, backward: Any, keys: Any, *inputs: Any) -> Any:
        given = Inputs(*inputs)
        ctx.save_for_backward(given.x, given.model_output, given.table, given.row, given.mask)
        added = {name: getattr(given, name) for name in _ADDED}
        ctx.dtypes = {name: tensor.dtype for name, tensor in added.items() if tensor is not None}
        ctx.operator = backward
        ctx.set_materialize_grads(False)
        return below_autograd(operator, keys, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, *_gradients(ctx, *grads)


def _gradients(ctx: Any, grad_x_prev: Tensor | None, grad_x_0: Tensor | None) -> tuple[Any, ...]:
    x, model_output, table, row, mask = ctx.saved_tensors
    grads: dict[str, Tensor | None] = {}
    if any(ctx.needs_input_grad[3:5]):
        grads["x"], grads["model_output"] = _state_gradients(
            ctx.operator, grad_x_prev, grad_x_0, x, model_output, table, row, mask
        )
    if grad_x_prev is not None:
        rows = reference.rows_in(table, row)
        columns = rows.reshape(-1, len(Row._fields), *[1] * (x.ndim - 1))
        pn, ph = (columns[:, Row._fields.index(name)] for name in ("pn", "ph"))
        kept = grad_x_prev if mask is None else grad_x_prev * (1 - mask)
        known = None if mask is None else grad_x_prev * mask
        grads |= {"noise": pn * kept, "history": ph * kept, "known": known}
    for name in _ADDED:
        grad, dtype = grads.get(name), ctx.dtypes.get(name)
        grads[name] = None if grad is None or dtype is None else grad.to(dtype)
    return tuple(map(grads.get, Inputs._fields))


def _state_gradients(
    operator: Any,
    grad_x_prev: Tensor | None,
    grad_x_0: Tensor | None,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the model output."""
    # With create_graph, autograd runs a backward pass in grad mode.
    if is_grad_enabled() or transformed():
        rows = reference.rows_in(table, row)
        return reference.gradients(grad_x_prev, grad_x_0, x, model_output, rows, mask)
    results: tuple[Tensor, Tensor] = operator(
        grad_x_prev, grad_x_0, x, model_output, table, row, mask
    )
    return results


def _one_batch(count: int, dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> Inputs:
    """The inputs of `count` calls as those of one call.

    Args:
        dims: the dimension of each input that counts the calls; None where they share it.
    """

    def stacked(tensor: Tensor | None, dim: int | None) -> Any:
        if tensor is None:
            return None
        return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    calls = Inputs(*map(stacked, inputs, dims))
    batch, rows = calls.x.shape[1], calls.table.shape[1]
    one = {name: t.flatten(0, 1) for name, t in calls._asdict().items() if t is not None}
    if calls.model_output.shape[1] != batch:
        # Unconditional outputs come first, those of all calls.
        halves = calls.model_output.unflatten(1, (2, batch))
        one["model_output"] = halves.transpose(0, 1).flatten(0, 2)
    first_rows = rows * torch.arange(count, device=calls.table.device)[:, None]
    row = first_rows if calls.row is None else calls.row + first_rows
    one["row"] = row.expand(count, batch).flatten()
    one |= {name: t.contiguous() for name, t in one.items() if name in _CONTIGUOUS}
    return Inputs(**one)


def register(library: torch.library.Library, name: str, backward_name: str) -> None:
    """Give derivatives and a rule of `torch.vmap` to an operator with the schema of
    `fastddim::update`; its gradients are those of one with the schema of `fastddim::backward`.
    """
    operator, backward = (
        getattr(torch.ops.fastddim, found).default for found in (name, backward_name)
    )

    def differentiate(keys: Any, *inputs: Any) -> Any:
        given = Inputs(*inputs)
        if transformed() and followed(*inputs):
            return composed(given)[:2]
        if not (is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
            return below_autograd(operator, keys, *inputs)
        if given.table.requires_grad or (given.mask is not None and given.mask.requires_grad):
            return composed(given)[:2]
        return _Fused.apply(operator, backward, keys, *inputs)  # type: ignore[no-untyped-call]

    def batch(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> Any:
        count = info.batch_size
        given = _one_batch(count, dims, inputs)
        shape = (count, given.x.shape[0] // count)
        return tuple(result.unflatten(0, shape) for result in operator(*given)), (0, 0)

    library.impl(name, differentiate, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"fastddim::{name}", batch, lib=library)


_library = torch.library.Library("fastddim", "IMPL")
register(_library, "update", "backward")


@torch.library.impl(_library, "step", "FuncTorchDynamicLayerFrontMode")
def _step(
    x: Tensor, model_output: Tensor, table: Tensor, row: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`fastddim::step` under a transform of `torch.func`, without a check by the caller."""
    inputs = Inputs(x, model_output, table, row, noise)
    results: tuple[Tensor, Tensor] = torch.ops.fastddim.update(*inputs)
    return results
