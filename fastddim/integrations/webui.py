"""A drop-in for the DDIM sampler of AUTOMATIC1111's stable-diffusion-webui.

```python
import torch, fastddim.integrations.webui as webui
timesteps = torch.arange(1, 1000, 50)  # increasing
x = torch.randn(2, 4, 64, 64)
image = webui.ddim(model, x, timesteps, extra_args={}, disable=True, eta=0.5)
```

In the webui, assign this function over `ddim` in `modules.sd_samplers_timesteps_impl`. Do so before
`modules.sd_samplers_timesteps` is imported, since that module copies `ddim` into its list of
samplers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import tqdm
from torch import Tensor

from fastddim import elementary
from fastddim.integrations._indices import check_indices
from fastddim.integrations._shared import each
from fastddim.integrations._tables import step_table
from fastddim.plan import Row, Scales, Update, row_of


@torch.no_grad()
def ddim(
    model: Any,
    x: Tensor,
    timesteps: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Sample with DDIM down the timesteps, from the last to the second (arXiv 2010.02502, eq. 12
    and 16).

    The deviations of the original are kept: the last step ends at ᾱ of `timesteps[0]`, not at 1.
    Noise is drawn at every step, even at eta=0, from the module in which the webui has put its own
    generators (`k_diffusion.sampling.torch`, if that is imported).

    Args:
        model: `model(x, t, **extra_args)` predicts epsilon; t is `[B]` in the dtype of x_T. ᾱ is
            read from its `inner_model.inner_model.alphas_cumprod`.
        x: x_T `[B, …]`, of a floating dtype.
        timesteps: int64 or int32 `[S + 1]`, increasing.
        callback: called after each step with a dict of `x`, `i`, `denoised` (the predicted x_0) and
            `sigma` and `sigma_hat`, both 0.
        disable: hide the progress bar.

    Returns:
        The state at `timesteps[0]`, in the dtype to which x and epsilon promote. An η for which
        1 − ᾱ_prev − σ² < 0 gives NaN.

    Raises:
        IndexError, TypeError: `timesteps` is not a tensor of integers.
    """
    check_indices("timesteps", timesteps)
    alphas = model.inner_model.inner_model.alphas_cumprod[timesteps].cpu()
    visited = timesteps.tolist()[:0:-1]
    table = step_table(_row(alphas, eta, x))
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones(x.shape[0])
    for i, timestep in enumerate(tqdm.tqdm(visited, disable=disable)):
        epsilon = model(x, timestep * s_in, **extra_args)
        state = x.to(torch.promote_types(x.dtype, epsilon.dtype))
        x, x_0 = table(state, epsilon, i, noise=_randn_like(x))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": 0, "sigma_hat": 0, "denoised": x_0})
    return x


def _row(alphas: Tensor, eta: float, x: Tensor) -> Row:
    """The steps by the operations of the original: σ in float64, √(1 − ᾱ) of all steps at once, and
    the other roots of one value for each sample, in the dtype of the state.
    """
    a, p = alphas[1:].flip(0), alphas[:-1].flip(0).double()
    # The original divides NumPy arrays by tensors, which Tensor computes with the reciprocal.
    sigma = eta * elementary.sqrt((1 - a).reciprocal() * (1 - p) * (1 - a / p))
    deviation = (1 - alphas).sqrt()[1:].flip(0)
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, p, sigma, deviation = (v.to(dtype) for v in (a, p, sigma, deviation))
    signal, after, direction = (each(torch.sqrt, v, len(x)) for v in (a, p, 1 - p - sigma**2))
    roots = (signal, deviation, after, direction, sigma)
    return row_of(Scales(*(root.double() for root in roots)), Update())


def _randn_like(x: Tensor) -> Tensor:
    source = getattr(sys.modules.get("k_diffusion.sampling"), "torch", torch)
    noise: Tensor = source.randn_like(x)
    return noise
