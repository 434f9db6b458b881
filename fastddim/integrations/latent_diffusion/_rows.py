"""The rows of a `DDIMSampler`, from the buffers that its `make_schedule` registered.

Every function takes the sampler and `original`: True for the steps of all timesteps, False for
those of `make_schedule`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastddim.integrations._shared import each
from fastddim.plan import Row, first_half_row, mixing_row


def stepping_row(sampler: Any, original: bool, batch: int, temperature: float) -> Row:
    """A whole step."""
    cx, cm, ex, em = _prediction(sampler, original, batch)
    signal, direction, sigma = _destination(sampler, original, batch)
    return Row(
        cx=cx,
        cm=cm,
        r=math.inf,
        k0=signal,
        kx=direction * ex,
        km=direction * em,
        pn=sigma * temperature,
        g=1.0,
    )


def predicting_row(sampler: Any, original: bool, batch: int) -> Row:
    """A step whose new state is x_0."""
    return first_half_row(stepping_row(sampler, original, batch, 1.0))


def epsilon_row(sampler: Any, original: bool, batch: int) -> Row:
    """A step whose new state is epsilon."""
    _, _, ex, em = _prediction(sampler, original, batch)
    return mixing_row(ex, em)


def concluding_row(sampler: Any, original: bool, batch: int, temperature: float) -> Row:
    """The step that takes epsilon as the state and x_0 as the model output."""
    signal, direction, sigma = _destination(sampler, original, batch)
    return Row(
        cx=0.0,
        cm=1.0,
        r=math.inf,
        k0=signal,
        kx=direction,
        km=0.0,
        pn=sigma * temperature,
        g=1.0,
    )


def guiding_row(_sampler: Any, _original: bool, scale: float) -> Row:
    """A step to u + g·(c − u), with u as the state and c as the model output."""
    g = torch.tensor([scale], dtype=torch.float64, device="cpu")
    return mixing_row(1 - g, g)


def encoding_row(sampler: Any, original: bool) -> Row:
    """A step of eq. 13 upwards, multiplied by √ᾱ of its destination."""
    name = "alphas_cumprod" if original else "ddim_alphas"
    a, p = _host(getattr(sampler, name)), _host(getattr(sampler, f"{name}_prev"))
    kept, signal = each(torch.sqrt, a / p), each(torch.sqrt, a)
    added = signal * (each(torch.sqrt, 1 / a - 1) - each(torch.sqrt, 1 / p - 1))
    return mixing_row(kept.double(), added.double())


def noising_row(sampler: Any, original: bool) -> Row:
    """A step that noises an image, with the image as the state and noise as the model output."""
    if original:
        signal, noise = sampler.sqrt_alphas_cumprod, sampler.sqrt_one_minus_alphas_cumprod
    else:
        signal, noise = torch.sqrt(sampler.ddim_alphas), sampler.ddim_sqrt_one_minus_alphas
    return mixing_row(_host(signal).double(), _host(noise).double())


def _prediction(sampler: Any, original: bool, batch: int) -> tuple[Any, Any, Any, Any]:
    """(cx, cm, ex, em): x_0 = cx·x + cm·m and eps = ex·x + em·m."""
    model = sampler.model
    if model.parameterization == "v":
        steps = slice(None) if original else sampler.ddim_timesteps
        signal = _host(model.sqrt_alphas_cumprod)[steps].double()
        noise = _host(model.sqrt_one_minus_alphas_cumprod)[steps].double()
        return signal, -noise, noise, signal
    a, noise = (
        (model.alphas_cumprod, model.sqrt_one_minus_alphas_cumprod)
        if original
        else (sampler.ddim_alphas, sampler.ddim_sqrt_one_minus_alphas)
    )
    signal, noise = each(torch.sqrt, _narrow(a), batch).double(), _narrow(noise).double()
    return 1 / signal, -noise / signal, 0.0, 1.0


def _destination(sampler: Any, original: bool, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """√ᾱ_prev, √(1 − ᾱ_prev − σ²) and σ; the original takes roots of `[batch, 1, 1, 1]`."""
    name, model = "ddim_sigmas_for_original_num_steps", sampler.model
    if original:
        p, sigma = model.alphas_cumprod_prev, getattr(model, name, getattr(sampler, name))
    else:
        p, sigma = sampler.ddim_alphas_prev, sampler.ddim_sigmas
    p, sigma = _narrow(p), _narrow(sigma)
    signal, direction = (each(torch.sqrt, v, batch) for v in (p, 1 - p - sigma**2))
    return signal.double(), direction.double(), sigma.double()


def _narrow(values: Any) -> Tensor:
    """A buffer in torch's default dtype, to which the original's step rounds it."""
    return _host(values).to(torch.get_default_dtype())


def _host(values: Any) -> Tensor:
    """A buffer, which is a tensor or an array, on the CPU."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    return tensor.detach().cpu()
