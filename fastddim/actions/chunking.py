"""Real-time chunking (arXiv 2506.07339) in its DDIM form: a model guided towards the last chunk.

In the paper, a flow x_τ = τ·x_0 + (1 − τ)·ε with velocity v is guided by replacing v with
v + min(β, (1 − τ)/(τ·r²))·Jᵀ(w·(Y − x̂_0)), where r² = (1 − τ)²/(τ² + (1 − τ)²), J = ∂x̂_0/∂x_τ,
Y is the last chunk and w the soft mask (equations 2 and 3). The states of a diffusion are those of
a flow, scaled by √ᾱ + √(1 − ᾱ), at τ/(1 − τ) = √(ᾱ/(1 − ᾱ)), so r² = 1 − ᾱ. A change of v changes
x̂_0 by (1 − τ) times as much. Written with the Jacobian with respect to the state of the diffusion:

    x̂_0' = x̂_0 + min(β·√(1 − ᾱ), 1/√ᾱ)·Jᵀ(w·(Y − x̂_0))

For every prediction type, the guided model's output follows from x_t and x̂_0'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastddim import transfer
from fastddim.actions.chunks import Chunks
from fastddim.adapter import Model, output_tensor
from fastddim.choices import PREDICTION_SYNONYMS, PREDICTIONS, Prediction
from fastddim.elementary import sqrt
from fastddim.loop.setup import Setup, resolve_schedule
from fastddim.options import SamplerOptions
from fastddim.plan import prediction_coefficients
from fastddim.reference import compute_dtype
from fastddim.schedule import Schedule
from fastddim.validation import check_choice
from fastddim.wrappers import held_modules

LAST = "fastddim_last_chunk"
"""The argument of a guided model that holds the last chunk, shifted, and its actions' weights."""


def guided(
    network: Model,
    schedule: Schedule,
    prediction: Prediction,
    max_weight: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[..., Tensor]:
    """A network as a model that is guided through an argument `LAST` besides its own arguments.

    Args:
        network: the user's network.
        schedule: schedule that the network was trained with.
        prediction: quantity that the network predicts, not a synonym.
        max_weight: β.
        dtype: dtype that is computed in.
        device: device of the state.

    Raises:
        ValueError: the network has parameters or buffers of inference mode, which autograd cannot
            use.
    """
    for root in held_modules(network):
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            if tensor.is_inference():
                raise ValueError(
                    "model: expected parameters and buffers made outside of torch.inference_mode() "
                    f"with chunking='guide', which needs gradients in x, got {name} made inside"
                )
    numbers = _numbers(schedule.alphas_cumprod, prediction, max_weight)
    return partial(_guided_output, network, transfer.upload(numbers.to(dtype), device))


def guided_options(options: SamplerOptions, setup: Setup, max_weight: float) -> dict[str, Any]:
    """The guided network of some options, and arguments that replace what it does not declare.

    Args:
        options: options with the network and what it was trained for.
        setup: setup of these options.
        max_weight: β.

    Raises:
        ValueError: there is guidance by `guidance_scale` too, or `guided` refuses the network.
    """
    if options.guidance_scale is not None:
        raise ValueError(
            "guidance_scale: expected None with chunking='guide', which follows the network from "
            f"one input, got {options.guidance_scale!r}"
        )
    schedule = resolve_schedule(options.model, options.schedule)
    model = guided(
        options.model,
        schedule,
        check_choice("prediction", options.prediction, PREDICTIONS, PREDICTION_SYNONYMS),
        max_weight,
        dtype=compute_dtype(setup.dtype),
        device=setup.device,
    )
    return {
        "model": model,
        "schedule": schedule,
        "shape": setup.shape,
        "device": setup.device,
        "model_dtype": setup.model_dtype,
    }


def rederives_eps(options: SamplerOptions) -> bool:
    """Tell whether a guided step derives ε from x_0: if requested, and if x_0 has a limit.

    The output of the guided network holds the ε of x̂_0' before the limit. Combined with x_0 after
    the limit, that ε would push the state back by all that the limit removes.
    """
    limited = options.clip is not None or options.dynamic_thresholding_ratio is not None
    return options.rederive_eps or limited


def guiding(model_kwargs: Any, chunks: Chunks) -> dict[str, Any]:
    """The arguments of a guided model, including the chunk that guides it.

    Args:
        model_kwargs: arguments of the network.
        chunks: the last chunk, shifted, and its weights.

    Raises:
        TypeError: `model_kwargs` is not a mapping.
    """
    given = {} if model_kwargs is None else model_kwargs
    if not isinstance(given, Mapping):
        raise TypeError(f"model_kwargs: expected a mapping of names to values, got {given!r}")
    return {**given, LAST: chunks.guide}


def _numbers(a: Tensor, prediction: Prediction, max_weight: float) -> Tensor:
    """Three numbers a timestep, float64 `[3, T]`: x_0 is the first times the state plus the second
    times the network's output, which changes by the third times Jᵀ(w·(Y − x̂_0)).
    """
    signal, sigma = sqrt(a), sqrt(1 - a)
    of_state, of_output, *_ = prediction_coefficients(signal, sigma, prediction)
    strength = torch.minimum(max_weight * sigma, 1 / signal)
    rows = (of_state, of_output, strength / of_output)
    return torch.stack([torch.as_tensor(v, dtype=a.dtype).expand_as(a) for v in rows])


def _guided_output(
    network: Model, numbers: Tensor, x: Tensor, t: Tensor, /, **kwargs: Any
) -> Tensor:
    """The network's output for states `[B, …]` at timesteps `[B]`, changed so that x_0 is x̂_0'.

    Autograd follows only the path from x, outside of inference mode.
    """
    last, weights = kwargs.pop(LAST)
    of_state, of_output, gain = numbers.index_select(1, t)[:, :, None, None]
    with torch.inference_mode(False), torch.enable_grad():
        start = x.detach().requires_grad_()
        followed = output_tensor(network(start, t, **_ordinary(kwargs)))
        _check_followed(followed, x)
        output = followed.detach()
        error = (last - (of_state * x + of_output * output)).mul_(weights)
        (pulled,) = torch.autograd.grad(followed, start, (of_output * error).to(output.dtype))
    changed: Tensor = output + gain * (of_state * error + pulled)
    return changed.to(output.dtype)


def _ordinary(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that autograd can save: tensors of inference mode are replaced by copies."""
    ordinary: dict[str, Any] = tree_map_only(
        Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, kwargs
    )
    return ordinary


def _check_followed(output: Any, x: Tensor) -> None:
    if not isinstance(output, Tensor) or output.shape != x.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model output: expected shape {tuple(x.shape)} with chunking='guide', got {got}"
        )
    if not output.requires_grad:
        raise ValueError(
            "model output: expected a tensor that autograd follows to x with chunking='guide', got "
            "one without gradients, as from torch.no_grad() inside the model"
        )
