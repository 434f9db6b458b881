"""The C++ kernel (csrc/cpu), vectorised for the instruction set at hand."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fastddim import ops
from fastddim.ops import Blending, LoopStep, advance, normal_out, rescale_rows, update, update_out
from fastddim.philox import Keys

__all__ = [
    "PRIORITY",
    "advance",
    "loop_step",
    "masked_loop_step",
    "normal_out",
    "rescale_rows",
    "unavailable",
    "update",
    "update_out",
]

PRIORITY = 10


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it runs on the CPU only"
    return ops.EXTENSION_ERROR


def loop_step(
    state: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    keys: Keys | None,
    history: Tensor | None,
    model_input: Tensor | None,
    counters: Tensor,
    timesteps: Tensor,
    t: Tensor,
    blending: Blending | None = None,
) -> LoopStep:
    """`update_out` and `advance` in one call without another look-up, after the mixing of known
    data where there is `blending`: see `fastddim.backends`.

    For small states, most of the time of a step goes into passing its fifteen arguments.
    """
    given = keys if keys is not None else (None, None, None)
    inputs = (state, model_output, table, row, *given, history, model_input)
    made = torch.ops.fastddim.make_loop_step(
        *inputs, counters, timesteps, t, *(() if blending is None else blending)
    )
    call = importlib.import_module("fastddim._C").take_loop_step(made)
    dtype, shape, strides = model_output.dtype, model_output.shape, model_output.stride()
    contiguous = model_output.is_contiguous()  # takes half of the time of strides
    # A step writes over the model's input: an output that lies there is read from a copy, unless it
    # is the state itself, of which each element is read before it is written.
    read = state if model_input is None else model_input
    first = read.data_ptr()
    end = first + read.nbytes
    may_be_state = model_input is None and shape == state.shape and strides == state.stride()
    apart = 0  # the last address found to be elsewhere, which later outputs often have too

    def take(output: Tensor) -> bool:
        nonlocal apart
        if (
            type(output) is not Tensor
            or output.dtype is not dtype
            or output.shape != shape
            or not output.is_cpu
            or not (output.is_contiguous() if contiguous else output.stride() == strides)
            or output.is_neg()
        ):
            return False
        address = output.data_ptr()
        # Empty, or zeros without memory.
        if not address:
            return False
        if address != apart:
            if first <= address < end and not (may_be_state and address == first):
                output = output.clone()
                if not contiguous and output.stride() != strides:
                    return False
                address = output.data_ptr()
            apart = address
        call(address)
        return True

    return take


masked_loop_step = loop_step
"""See `fastddim.backends`."""
