"""A `Sampler` or a `Stream` in a few words."""

from __future__ import annotations

import numbers
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from fastddim.adapter import Model
from fastddim.backends import Backend
from fastddim.choices import Graph
from fastddim.options import PerStep, SamplerOptions
from fastddim.plan import Plan


def described_model(model: Model) -> str:
    """The name of a function, or of the class of anything else."""
    named = isinstance(model, types.FunctionType | types.MethodType)
    return model.__name__ if named else type(model).__name__


def described_steps(plan: Plan, options: SamplerOptions) -> str:
    """The number of steps, the timesteps at both ends, and what chose them."""
    if plan.tuned is not None:
        chosen = "tuned"
    else:
        chosen = options.spacing if isinstance(options.steps, numbers.Integral) else "given"
    first, last = (plan.timesteps[at].item() for at in (0, -1))
    return f"{plan.steps} ({first} to {last}, {chosen})"


def described_number(value: PerStep) -> str:
    """A number, those of the first and the last step, or the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Sequence):
        first, last = (described_number(value[at]) for at in (0, -1))
        return f"{first} to {last}"
    return str(value)


def described_placement(
    dtype: torch.dtype, device: torch.device, backend: Backend, graph: Graph
) -> list[str]:
    """The dtype, the device, the backend and the graph mode, as arguments."""
    impl = backend.__name__.rpartition(".")[2]
    return [f"dtype={dtype}", f"device={str(device)!r}", f"impl={impl!r}", f"graph={graph!r}"]
