"""Drop-ins for `functions/denoising.py` of ermongroup/ddim, the code of the paper.

```python
import torch, fastddim.integrations.ermongroup as denoising
betas = torch.linspace(1e-4, 0.02, 1000)
model = lambda x, t: 0.1 * x  # or any of yours
x, seq = torch.randn(2, 3, 32, 32), range(0, 1000, 100)
xs, x0_preds = denoising.generalized_steps(x, seq, model, betas, eta=0.5)
```

In its repository, `functions.denoising.generalized_steps = denoising.generalized_steps` is the
whole change. Samples are those of the original to rounding: noise is drawn with `torch.randn_like`
at every step, even if it is multiplied by 0.

The deviations of the original from the paper are kept: `ddpm_steps` clips x_0, takes the larger
variance β, and adds no noise at t = 0 rather than at the last step; a `seq` that repeats a timestep
visits it twice. The state has the dtype to which x and `b` promote. Unlike the original, the loops
run on x's device, which need not be called "cuda", and take any number of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastddim.integrations._shared import each
from fastddim.integrations._tables import step_table
from fastddim.plan import Row

Model = Callable[[Tensor, Tensor], Tensor]
"""A network `model(x, t)`."""
Steps = tuple[list[Tensor], list[Tensor]]
"""The states and the predicted x_0 of each step, on the CPU."""


def generalized_steps(
    x: Tensor, seq: Iterable[float], model: Model, b: Tensor, **kwargs: Any
) -> Steps:
    """Sample with DDIM down the timesteps `seq` (arXiv 2010.02502, eq. 12 and 16).

    Args:
        x: x_T `[B, …]`, of a floating dtype.
        seq: timesteps, increasing; ᾱ is that of their integral part.
        model: `model(x, t)` predicts epsilon; t is float32 `[B]`.
        b: β of every timestep, `[T]`.
        **kwargs: `eta`, 0 by default; others are ignored, as in the original.

    Returns:
        (xs, x0_preds): the states, of which the first is x itself, and the predicted x_0 of every
        step, on the CPU. An η for which 1 − ᾱ_prev − σ² < 0 gives NaN.

    Raises:
        TypeError: `seq` holds something other than numbers.
    """
    timesteps, a, p = _visited(seq, b)
    sigma = kwargs.get("eta", 0) * _root((1 - a / p) * (1 - p) / (1 - a), x)
    signal, deviation = _wide(_root(a, x), _root(1 - a, x))
    k0, km, pn = _wide(_root(p, x), _root(1 - p - sigma**2, x), sigma)
    row = Row(cx=1 / signal, cm=-deviation / signal, r=math.inf, k0=k0, kx=0.0, km=km, pn=pn, g=1.0)
    return _run(row, timesteps, x, model, b.dtype, lambda _: torch.randn_like(x))


def ddpm_steps(x: Tensor, seq: Iterable[float], model: Model, b: Tensor, **kwargs: Any) -> Steps:
    """Sample with DDPM down the timesteps `seq`, with variance 1 − ᾱ_t/ᾱ_prev (σ-hat of arXiv
    2010.02502, appendix D.3) and x_0 clipped to [−1, 1].

    Takes and returns the same as `generalized_steps`, but ignores all `kwargs`.
    """
    timesteps, a, p = _visited(seq, b)
    beta = 1 - a / p
    cx, cm = _wide(_root(1 / a, x), -_root(1 / a - 1, x))
    k0, kx = _wide(_root(p, x) * beta / (1 - a), _root(1 - beta, x) * (1 - p) / (1 - a))
    deviation = each(lambda v: torch.exp(0.5 * torch.log(v)), beta, len(x))
    (pn,) = _wide(deviation * (torch.tensor(timesteps, device="cpu") != 0))
    row = Row(cx=cx, cm=cm, r=1.0, k0=k0, kx=kx, km=0.0, pn=pn, g=1.0)
    return _run(row, timesteps, x, model, b.dtype, torch.randn_like)


def _visited(seq: Iterable[float], b: Tensor) -> tuple[list[float], Tensor, Tensor]:
    """The timesteps in the order visited, ᾱ of each, and ᾱ after each.

    ᾱ, like coefficients that cancel, is rounded as in the original: to the dtype of b.
    """
    timesteps = [_number(t) for t in seq][::-1]
    alphas = (1 - b.detach().cpu()).cumprod(0)[[int(t) for t in timesteps]]
    return timesteps, alphas, torch.cat([alphas, alphas.new_ones(1)])[1:]


def _number(t: Any) -> float:
    if isinstance(t, str) or (isinstance(t, Tensor) and t.numel() != 1):
        raise TypeError(f"seq: expected numbers, got {t!r}")
    return float(t)


def _root(values: Tensor, x: Tensor) -> Tensor:
    """√, taken of one value for each sample as in the original."""
    return each(torch.sqrt, values, len(x))


def _wide(*coefficients: Tensor) -> tuple[Tensor, ...]:
    return tuple(c.double() for c in coefficients)


@torch.no_grad()
def _run(
    row: Row,
    timesteps: list[float],
    x: Tensor,
    model: Model,
    dtype: torch.dtype,
    draw: Callable[[Tensor], Tensor],
) -> Steps:
    table = step_table(row)
    xs, x0_preds = [x], []
    for i, timestep in enumerate(timesteps):
        t = torch.full((x.shape[0],), timestep, device=x.device)
        epsilon = model(x, t)
        state = x.to(torch.promote_types(x.dtype, dtype))
        x, x_0 = table(state, epsilon, i, noise=draw(x))
        x0_preds.append(x_0.cpu())
        xs.append(x.cpu())
    return xs, x0_preds
