"""Drop-ins for the DDIM methods of openai/guided-diffusion and openai/improved-diffusion.

```python
import fastddim.integrations.guided_diffusion as fast
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
fast.install(GaussianDiffusion)  # SpacedDiffusion is a subclass of it
x = diffusion.ddim_sample_loop(model, (2, 3, 16, 16), eta=0.5)
y = diffusion.ddim_sample_loop(model, (2, 3, 16, 16), clip_denoised=False)
```

Or assign one by one: `GaussianDiffusion.ddim_sample = fast.ddim_sample`. Samples are those of the
original to rounding: noise is drawn with `torch.randn_like` at every step, also at eta=0. Its
deviations from the paper are kept:

- epsilon is always re-derived from x_0 after the clip;
- `cond_fn` (arXiv 2105.05233, algorithm 2) changes x_0 after the clip, and it is not clipped again;
- the last index of `ddim_reverse_sample` goes to ᾱ = 0;
- an η for which 1 − ᾱ_prev − σ² < 0 gives NaN.

The methods evaluate the model themselves. They take a step in one pass, or in two where a user's
function comes between. A `p_mean_variance` or `condition_score` that a subclass overrides is not
called, and `conditioning_free` of the port in Tortoise is refused. `ddim_sample` copies nothing to
the device: coefficients and the timesteps of SpacedDiffusion are there from the first call on,
which computed them from `alphas_cumprod`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from tqdm.auto import tqdm

from fastddim.integrations._shared import give_methods
from fastddim.integrations._tables import CacheOf, step_table
from fastddim.kept import keep
from fastddim.plan import Row
from fastddim.steptable import StepTable, TracedTable
from fastddim.tracing import HELD, TAKES_OBJECTS, constant
from fastddim.transfer import upload

Output = dict[str, Tensor]

_tables = CacheOf(16)

# One for each device.
_timestep_maps = CacheOf(16)


def install(diffusion: Any) -> None:
    """Give a class, or one object, the four methods of this module."""
    methods = (ddim_sample, ddim_reverse_sample, ddim_sample_loop, ddim_sample_loop_progressive)
    give_methods(diffusion, methods)


def ddim_sample(
    self: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    eta: float = 0.0,
) -> Output:
    """One step down with DDIM (arXiv 2010.02502, eq. 12 and 16), differentiable.

    Args:
        self: a GaussianDiffusion or SpacedDiffusion, of any mean type.
        model: `model(x, t, **model_kwargs)` with t as the diffusion scales and maps it. Of 2C
            channels (learned variance) the first half is used.
        x: state `[B, C, …]`; float16 and bfloat16 become float32, as in the original.
        t: integers `[B]` on the device of x, indices into the timesteps of `self`.
        clip_denoised: whether x_0 is clipped to [−1, 1].
        denoised_fn: changes the predicted x_0 before the clip.
        cond_fn: `cond_fn(x, t, **model_kwargs)` returns the gradient of log p(y | x) at x.
        eta: η of eq. 16.

    Returns:
        `sample` and `pred_xstart`, like x.

    Raises:
        NotImplementedError: the diffusion is `conditioning_free`.
    """
    kwargs = {} if model_kwargs is None else model_kwargs
    state, output, kind, row = _predict(self, model, x, t, denoised_fn, kwargs)
    clip = 1.0 if clip_denoised else None
    if cond_fn is not None:
        gradient = _evaluate(self, cond_fn, x, t, kwargs)
        conditioned = _table(self, state, _conditioning_row, kind, clip)
        output, _ = conditioned.take(state, output, row, noise=gradient, return_x0=False)
        kind, clip = "START_X", None
    noise = torch.randn_like(x)
    table = _table(self, state, _row_down, kind, clip, eta)
    sample, x_0 = table.take(state, output, row, noise=noise)
    return {"sample": sample, "pred_xstart": x_0}


def ddim_reverse_sample(
    self: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    eta: float = 0.0,
) -> Output:
    """One step up with DDIM's ODE (arXiv 2010.02502, section 4.3), differentiable.

    Takes, returns and raises the same as `ddim_sample`. The model is evaluated where the step
    starts, at x and t.

    Raises:
        AssertionError: eta is not 0.
    """
    assert eta == 0.0, f"eta: expected 0 for the way back, got {eta}"
    kwargs = {} if model_kwargs is None else model_kwargs
    state, output, kind, row = _predict(self, model, x, t, denoised_fn, kwargs)
    table = _table(self, state, _row_up, kind, 1.0 if clip_denoised else None)
    sample, x_0 = table.take(state, output, row)
    return {"sample": sample, "pred_xstart": x_0}


def ddim_sample_loop(
    self: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
) -> Tensor:
    """The last `sample` of `ddim_sample_loop_progressive`, which takes the same arguments."""
    final: Output = {}
    for final in self.ddim_sample_loop_progressive(  # noqa: B007
        model,
        shape,
        noise=noise,
        clip_denoised=clip_denoised,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs=model_kwargs,
        device=device,
        progress=progress,
        eta=eta,
    ):
        pass
    return final["sample"]


def ddim_sample_loop_progressive(
    self: Any,
    model: Any,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
) -> Iterator[Output]:
    """`ddim_sample` down all timesteps of `self`, without gradients.

    Args:
        model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta: as in `ddim_sample`.
        shape: `[B, C, …]`.
        noise: x_T, else drawn with `torch.randn`.
        device: of the samples, by default that of the model's first parameter.
        progress: whether to show a progress bar.

    Yields:
        The result of `ddim_sample` at every step.
    """
    if device is None:
        device = next(model.parameters()).device
    x = torch.randn(*shape, device=device) if noise is None else noise
    for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
        t = torch.full((shape[0],), i, device=device, dtype=torch.long)
        with torch.no_grad():
            out: Output = self.ddim_sample(
                model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
                eta=eta,
            )
        yield out
        x = out["sample"]


def _predict(
    diffusion: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    denoised_fn: Callable[[Tensor], Tensor] | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, Tensor, str, Tensor]:
    """(state, model output, name of the mean type that it is of, row of each sample)."""
    if getattr(diffusion, "conditioning_free", False):
        raise NotImplementedError("conditioning_free: expected False, got True")
    output = _evaluate(diffusion, model, x, t, kwargs)
    kind = diffusion.model_mean_type.name
    state, row = x.to(torch.promote_types(x.dtype, torch.float32)), t.long().contiguous()
    if denoised_fn is None:
        return state, output, kind, row
    table = _table(diffusion, state, _predicting_row, kind)
    predicted, _ = table.take(state, output, row, return_x0=False)
    return state, denoised_fn(predicted), "START_X", row


def _evaluate(
    diffusion: Any,
    function: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Evaluate a model or a `cond_fn`.

    SpacedDiffusion wraps both in a callable that copies its map of timesteps to the device at each
    call; this reads a copy that is there.
    """
    t = diffusion._scale_timesteps(t)
    if hasattr(diffusion, "_wrap_model"):
        wrapped = diffusion._wrap_model(function)
        t = _timestep_map(diffusion, t.device)[t]
        if wrapped.rescale_timesteps:
            t = t.float() * (1000.0 / wrapped.original_num_steps)
        function = wrapped.model
    return function(x, t, **kwargs)


def _timestep_map(diffusion: Any, device: torch.device) -> Tensor:
    """The timesteps of SpacedDiffusion on a device."""
    if TAKES_OBJECTS and is_dynamo_compiling():
        timesteps: Tensor = getattr(HELD, _map_in_graph(diffusion, device, diffusion.timestep_map))
        return timesteps
    return _kept_map(diffusion, device)


@constant
def _map_in_graph(diffusion: Any, device: torch.device, _watched: Sequence[int]) -> str:
    return HELD.name_of(_kept_map(diffusion, device), owner=diffusion)


def _kept_map(diffusion: Any, device: torch.device) -> Tensor:
    kept, alphas = _timestep_maps[diffusion], diffusion.alphas_cumprod
    key = (device, id(alphas))
    timesteps: Tensor | None = kept.get(key)
    if timesteps is None:
        timesteps = keep(
            kept,
            key,
            lambda: upload(torch.tensor(diffusion.timestep_map, device="cpu"), device),
            device=device,
            sources=(alphas,),
        )
    return timesteps


def _table(
    diffusion: Any, state: Tensor, make_row: Callable[..., Row], *arguments: Any
) -> StepTable | TracedTable:
    """The rows `make_row(diffusion, *arguments)`, one a timestep, for states like one."""
    if not (TAKES_OBJECTS and is_dynamo_compiling()):
        return _kept_table(diffusion, make_row, *arguments)
    kind = state.dtype, state.device
    name = _name_in_graph(diffusion, *kind, make_row, *arguments)
    return TracedTable(getattr(HELD, name), StepTable.position, None)


@constant
def _name_in_graph(
    diffusion: Any, dtype: torch.dtype, device: torch.device, *arguments: Any
) -> str:
    return _kept_table(diffusion, *arguments).name_in_graph(dtype, device)


def _kept_table(diffusion: Any, make_row: Callable[..., Row], *arguments: Any) -> StepTable:
    kept, alphas = _tables[diffusion], diffusion.alphas_cumprod
    key = (make_row, *arguments, id(alphas))
    table: StepTable | None = kept.get(key)
    if table is None:
        table = keep(
            kept, key, lambda: step_table(make_row(diffusion, *arguments)), sources=(alphas,)
        )
    return table


def _row_down(diffusion: Any, kind: str, clip: float | None, eta: float) -> Row:
    # Roots are taken of vectors, since the original has a coefficient for each element of x.
    a, p = _narrow(diffusion.alphas_cumprod), _narrow(diffusion.alphas_cumprod_prev)
    sigma = eta * ((1 - p) / (1 - a)) ** 0.5 * (1 - a / p) ** 0.5
    return _row(diffusion, p, sigma, kind, clip)


def _row_up(diffusion: Any, kind: str, clip: float | None) -> Row:
    p = _narrow(diffusion.alphas_cumprod_next)
    return _row(diffusion, p, torch.zeros_like(p), kind, clip)


def _row(diffusion: Any, p: Tensor, sigma: Tensor, kind: str, clip: float | None) -> Row:
    """A step to ᾱ = p, with eps = (x/√ᾱ − x_0)/√(1/ᾱ − 1)."""
    x_scale, eps_scale = _scales(diffusion)
    direction = ((1 - p - sigma**2) ** 0.5).double() / eps_scale
    cx, cm = _prediction(diffusion, kind)
    return Row(
        cx=cx,
        cm=cm,
        r=math.inf if clip is None else clip,
        k0=(p**0.5).double() - direction,
        kx=direction * x_scale,
        km=0.0,
        pn=sigma.double(),
        g=1.0,
    )


def _predicting_row(diffusion: Any, kind: str) -> Row:
    """x_0 as the new state."""
    cx, cm = _prediction(diffusion, kind)
    return Row(cx=cx, cm=cm, r=math.inf, k0=1.0, kx=0.0, km=0.0, pn=0.0, g=1.0)


def _conditioning_row(diffusion: Any, kind: str, clip: float | None) -> Row:
    """x_0 moved along a gradient that comes as the noise: eps less √(1 − ᾱ) times the gradient is
    x_0 plus √(1/ᾱ − 1)·√(1 − ᾱ) times it.
    """
    deviation = ((1 - _narrow(diffusion.alphas_cumprod)) ** 0.5).double()
    _, eps_scale = _scales(diffusion)
    return _predicting_row(diffusion, kind)._replace(
        r=math.inf if clip is None else clip, pn=eps_scale * deviation
    )


def _prediction(diffusion: Any, kind: str) -> tuple[Tensor, Tensor]:
    """(cx, cm): x_0 = cx·x + cm·m."""
    x_scale, eps_scale = _scales(diffusion)
    if kind == "EPSILON":
        return x_scale, -eps_scale
    if kind == "START_X":
        return torch.zeros_like(x_scale), torch.ones_like(x_scale)
    # The mean of q(x_{t−1} | x_t, x_0) (arXiv 2006.11239, eq. 7), solved for x_0.
    of_x_0, of_x = diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2
    return -_narrow(of_x / of_x_0).double(), _narrow(1 / of_x_0).double()


def _scales(diffusion: Any) -> tuple[Tensor, Tensor]:
    """1/√ᾱ and √(1/ᾱ − 1)."""
    x_scale = _narrow(diffusion.sqrt_recip_alphas_cumprod).double()
    return x_scale, _narrow(diffusion.sqrt_recipm1_alphas_cumprod).double()


def _narrow(values: Any) -> Tensor:
    """Float32, to which the original rounds each of its float64 arrays before it reads them."""
    return torch.as_tensor(values, device="cpu").float()
