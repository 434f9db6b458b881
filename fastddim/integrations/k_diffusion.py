"""DDIM in the form of k-diffusion's samplers.

```python
import torch, fastddim.integrations.k_diffusion as fast
model = lambda x, sigma: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)  # or any denoiser of yours
sigmas = torch.cat([torch.linspace(10, 0.1, 20), torch.zeros(1)])
x = torch.randn(2, 3, 32, 32) * sigmas[0]
image = fast.sample_ddim(model, x, sigmas, disable=True, eta=0.5)
```

k-diffusion itself has no sampler of that name. In its variables x̄ = x/√ᾱ and σ = √((1 − ᾱ)/ᾱ),
DDIM at η = 0 is its `sample_euler` (arXiv 2010.02502, eq. 13). At other η, DDIM is its
`sample_euler_ancestral` with the same η, whose `sigma_up` is σ(η) of eq. 16. `sample_ddim` takes
the arguments of `sample_euler_ancestral` in the same order, gives its numbers to rounding, and can
be assigned over it. Only the default of eta differs: it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddim.integrations._shared import each
from fastddim.integrations._tables import step_table
from fastddim.plan import Row
from fastddim.steptable import StepTable


@torch.no_grad()
def sample_ddim(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sample with DDIM down the noise levels `sigmas`.

    Args:
        model: `model(x, sigma, **extra_args)` returns x_0; sigma is `[B]` in the dtype of x_T.
        x: x_T `[B, …]` at the first level, signal plus `sigmas[0]` times noise.
        sigmas: `[S + 1]`, decreasing, the last usually 0: a tensor, or a sequence of numbers.
        callback: called after each evaluation with a dict of `x` (before the step), `i`, `sigma`,
            `sigma_hat` (the same) and `denoised` (what the model returned).
        disable: hide the progress bar.
        eta: η of arXiv 2010.02502, eq. 16.
        s_noise: factor of the noise.
        noise_sampler: `noise_sampler(sigma, sigma_next)` returns noise like x; by default
            `torch.randn_like(x)`. It is called at every step that does not end at 0, even at eta=0,
            as in `sample_euler_ancestral`.

    Returns:
        The state at the last level, in the dtype to which x and `sigmas` promote.
    """
    if not isinstance(sigmas, Tensor):
        sigmas = torch.as_tensor(sigmas, dtype=x.dtype, device=x.device)
    levels = sigmas.tolist()
    table = _table(sigmas, eta, s_noise)
    dtype = torch.promote_types(x.dtype, sigmas.dtype)
    extra_args = {} if extra_args is None else extra_args
    first = x
    for i in tqdm(range(len(levels) - 1), disable=disable):
        denoised = model(x, first.new_full((x.shape[0],), levels[i]), **extra_args)
        if callback is not None:
            sigma = sigmas[i]
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        noise = None
        if levels[i + 1] > 0:
            noise = (
                torch.randn_like(first)
                if noise_sampler is None
                else noise_sampler(sigmas[i], sigmas[i + 1])
            )
        x, _ = table(x.to(dtype), denoised, i, noise=noise, return_x0=False)
    return x


def _table(sigmas: Tensor, eta: float, s_noise: float) -> StepTable:
    """The table of one row a step; terms that cancel are rounded to the dtype of `sigmas`."""
    levels = sigmas.detach().cpu()
    sigma, after = levels[:-1], levels[1:]
    down, up = after, torch.zeros_like(after)
    if eta:
        up = eta * each(torch.sqrt, after**2 * (sigma**2 - after**2) / sigma**2)
        # At these steps η asks for more noise than possible, or for noise on the way up.
        up = torch.where(up < after, up, after)
        down = each(torch.sqrt, after**2 - up**2)
    moved = (down - sigma).double() / sigma.double()
    row = Row(
        cx=0.0,
        cm=1.0,
        r=math.inf,
        k0=-moved,
        kx=1 + moved,
        km=0.0,
        pn=up.double() * s_noise,
        g=1.0,
    )
    return step_table(row)
