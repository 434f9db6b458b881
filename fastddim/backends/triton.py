"""The Triton kernels (kernels/), on NVIDIA and AMD GPUs.

Each launch is an operator: `torch.compile` takes it without a graph break, and fake tensors and
dispatch modes see it. Calling the operator takes little time compared with Triton's launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim import derivatives, ops
from fastddim.ops import LoopStep
from fastddim.philox import Keys
from fastddim.plan import Rescaling

__all__ = [
    "PRIORITY",
    "advance",
    "loop_step",
    "normal_out",
    "rescale_rows",
    "unavailable",
    "update",
    "update_out",
]

PRIORITY = 15

_library = torch.library.Library("fastddim", "FRAGMENT")
for _name in (
    *("update_out", "update", "backward_out", "backward"),
    *("normal_out", "fit_rows", "advance"),
):
    ops.define_like(_library, f"triton_{_name}", _name)
derivatives.register(_library, "triton_update", "triton_backward")

_advance_op = torch.ops.fastddim.triton_advance.default


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on GPUs only"
    try:
        _launchers()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


# The values of `row` are not checked.
update_out = ops.update_out_through(torch.ops.fastddim.triton_update_out.default)
update = ops.update_through(torch.ops.fastddim.triton_update.default)


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """See `fastddim.backends.Backend.normal_out`."""
    torch.ops.fastddim.triton_normal_out(*keys, stream, out)


def rescale_rows(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    rescaling: Rescaling,
    out: Tensor,
) -> None:
    """See `fastddim.backends.Backend.rescale_rows`; the values of `row` are not checked."""
    torch.ops.fastddim.triton_fit_rows(x, model_output, table, row, *rescaling, out)


def advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    """See `fastddim.backends.Backend.advance`; the values of the counters are not checked."""
    _advance_op(counters, timesteps, t)


def loop_step(*operands: Tensor | None, **others: Any) -> LoopStep:
    """`update_out` and `advance` as launches whose arguments are held: see `Backend`.

    For small states, most of the time of a step goes into passing its arguments to Triton.
    """
    from fastddim.kernels import loop_step

    made: LoopStep = loop_step.loop_step(*operands, **others)
    return made


def _launchers() -> Any:
    """The module of the launches, which imports Triton and so is imported on first use."""
    from fastddim.kernels import launch

    return launch


@torch.library.impl(_library, "triton_update_out", "CompositeExplicitAutograd")
def _update_out(*operands: Any) -> None:
    _launchers().update_out(*operands)


@torch.library.impl(_library, "triton_update", "CompositeExplicitAutograd")
def _update(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    x_prev, x_0 = torch.empty_like(x), torch.empty_like(x)
    torch.ops.fastddim.triton_update_out(x, *inputs, *ops.Outputs(x_prev, x_0))
    return x_prev, x_0


@torch.library.impl(_library, "triton_backward_out", "CompositeExplicitAutograd")
def _backward_out(*operands: Any) -> None:
    from fastddim.kernels import launch_backward

    launch_backward.backward_out(*operands)


@torch.library.impl(_library, "triton_backward", "CompositeExplicitAutograd")
def _backward(
    grad_x_prev: Tensor | None, grad_x_0: Tensor | None, x: Tensor, model_output: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    grads = ops.new_gradients(x, model_output)
    torch.ops.fastddim.triton_backward_out(grad_x_prev, grad_x_0, x, model_output, *rest, *grads)
    return grads


@torch.library.impl(_library, "triton_fit_rows", "CompositeExplicitAutograd")
def _fit_rows(*operands: Any) -> None:
    from fastddim.kernels import launch_rescaling

    launch_rescaling.fit_rows(*operands)


@torch.library.impl(_library, "triton_normal_out", "CompositeExplicitAutograd")
def _normal_out(seed: Tensor, step: Tensor, sample: Tensor, stream: int, out: Tensor) -> None:
    _launchers().normal_out(Keys(seed, step, sample), stream, out)


@torch.library.impl(_library, "triton_advance", "CompositeExplicitAutograd")
def _advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    _launchers().advance(counters, timesteps, t)
