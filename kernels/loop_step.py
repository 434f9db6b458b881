"""A step of a loop with all that stays of it held: the update and the step on in two launches.

No operator is called, nothing is checked again, and of the arguments only the model output is new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.ops import LoopStep
from fastddim.philox import Keys
from fastddim.tracing import operators_are_seen

from .launch import _device_of, advance, find_advance, find_update
from .repeated import Repeated
from .update import Tensors
from .views import View

_LAYOUTS = 8
"""Kinds of model outputs, by strides and alignment, that a loop keeps launches for."""


def loop_step(
    state: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor | None,
    *,
    keys: Keys | None,
    history: Tensor | None,
    model_input: Tensor | None,
    counters: Tensor,
    timesteps: Tensor,
    t: Tensor,
) -> LoopStep:
    """`update_out` and `advance` of tensors that stay where they are: see `fastddim.backends`."""
    return _LoopStep(
        Tensors(
            x=state,
            model_output=model_output,
            noise=None,
            history=history,
            mask=None,
            known=None,
            out=state,
            x_0=None,
            model_input=model_input,
            epsilon=history,
        ),
        {"keys": keys, "table": table, "row": row},
        {"counters": counters, "timesteps": timesteps, "t": t},
    )
