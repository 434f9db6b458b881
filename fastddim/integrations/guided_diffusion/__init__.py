"""Drop-ins for the DDIM methods of openai/guided-diffusion and openai/improved-diffusion.

```python
import fastddim.integrations.guided_diffusion as fast
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
fast.install(GaussianDiffusion)  # SpacedDiffusion is a subclass of it
x = diffusion.ddim_sample_loop(model, (2, 3, 16, 16), eta=0.5)
y = diffusion.ddim_sample_loop(model, (2, 3, 16, 16), clip_denoised=False)
```

Or assign one by one: `GaussianDiffusion.ddim_sample = fast.ddim_sample`. Samples are those of the
original to rounding: noise is drawn with `torch.randn_like` at every step, even at eta=0. The
original's deviations from the paper are kept:

- epsilon is always re-derived from x_0 after the clip;
- `cond_fn` (arXiv 2105.05233, algorithm 2) changes x_0 after the clip, and x_0 is not clipped
  again;
- the last index of `ddim_reverse_sample` goes to ᾱ = 0;
- an η for which 1 − ᾱ_prev − σ² < 0 gives NaN.

The methods evaluate the model themselves. They take a step in one pass, or in two if a user's
function comes between. If a subclass or an object overrides `p_mean_variance`, `condition_score` or
a method that they call, these two are called, and so they are for the port in Tortoise when it is
`conditioning_free`; the step from their x_0 is then one pass. `ddim_sample` copies nothing to the
device: the first call computes the coefficients from `alphas_cumprod`, and puts them there with the
timesteps of SpacedDiffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from tqdm.auto import tqdm

from fastddim.integrations._hooks import Hooks
from fastddim.integrations._indices import check_indices
from fastddim.integrations._shared import give_methods
from fastddim.integrations._tables import CacheOf, step_table
from fastddim.integrations.guided_diffusion._rows import (
    concluding_row,
    conditioning_row,
    predicting_row,
    row_down,
    row_up,
)
from fastddim.kept import keep
from fastddim.plan import Row
from fastddim.steptable import StepTable, TracedTable
from fastddim.tracing import HELD, TAKES_OBJECTS, constant
from fastddim.transfer import upload

Output = dict[str, Tensor]
"""The tensors of a step by name, as the original returns them."""

_HOOKS = Hooks(
    "p_mean_variance",
    "condition_score",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
    of=("GaussianDiffusion", "SpacedDiffusion"),
)

_tables = CacheOf(16)

# One map for each device.
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
    """Take one step down with DDIM (arXiv 2010.02502, eq. 12 and 16), differentiable.

    Args:
        self: a GaussianDiffusion or SpacedDiffusion, of any mean type.
        model: `model(x, t, **model_kwargs)` with t as the diffusion scales and maps it. Of 2C
            channels (learned variance) the first half is used.
        x: state `[B, C, …]`; float16 and bfloat16 become float32, as in the original.
        t: int64 or int32 `[B]` on the device of x, indices into the timesteps of `self`.
        clip_denoised: whether x_0 is clipped to [−1, 1].
        denoised_fn: changes the predicted x_0 before the clip.
        cond_fn: `cond_fn(x, t, **model_kwargs)` returns the gradient of log p(y | x) at x.
        eta: η of eq. 16.

    Returns:
        `sample` and `pred_xstart`, like x.

    Raises:
        IndexError: t has another dtype.
    """
    check_indices("t", t)
    if _has_hooks(self):
        asked = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn}
        out = self.p_mean_variance(model, x, t, **asked, model_kwargs=model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x_0 = out["pred_xstart"]
        state, noise = _state(self._predict_eps_from_xstart(x, t, x_0)), torch.randn_like(x)
        concluding = _table(self, state, concluding_row, eta)
        sample, _ = concluding.take(state, x_0, _row_of(t), noise=noise)
        return {"sample": sample, "pred_xstart": x_0}
    kwargs = {} if model_kwargs is None else model_kwargs
    state, output, kind, row = _predict(self, model, x, t, denoised_fn, kwargs)
    clip = 1.0 if clip_denoised else None
    if cond_fn is not None:
        gradient = _evaluate(self, cond_fn, x, t, kwargs)
        conditioned = _table(self, state, conditioning_row, kind, clip)
        output, _ = conditioned.take(state, output, row, noise=gradient, return_x0=False)
        kind, clip = "START_X", None
    noise = torch.randn_like(x)
    table = _table(self, state, row_down, kind, clip, eta)
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
    """Take one step up with DDIM's ODE (arXiv 2010.02502, section 4.3), differentiable.

    Takes, returns and raises the same as `ddim_sample`. The model is evaluated where the step
    starts, at x and t.

    Raises:
        AssertionError: eta is not 0.
    """
    assert eta == 0.0, f"eta: expected 0 for the way back, got {eta}"
    check_indices("t", t)
    if _has_hooks(self):
        asked = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn}
        out = self.p_mean_variance(model, x, t, **asked, model_kwargs=model_kwargs)
        x_0, state = out["pred_xstart"], _state(x)
        sample, _ = _table(self, state, row_up, "START_X", None).take(state, x_0, _row_of(t))
        return {"sample": sample, "pred_xstart": x_0}
    kwargs = {} if model_kwargs is None else model_kwargs
    state, output, kind, row = _predict(self, model, x, t, denoised_fn, kwargs)
    table = _table(self, state, row_up, kind, 1.0 if clip_denoised else None)
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
    """Return the last `sample` of `ddim_sample_loop_progressive`, with the same arguments."""
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
    """Take `ddim_sample` down all timesteps of `self`, without gradients.

    Args:
        model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta: as in `ddim_sample`.
        shape: `[B, C, …]`.
        noise: x_T; by default drawn with `torch.randn`.
        device: device of the samples; by default that of the model's first parameter.
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


def _has_hooks(diffusion: Any) -> bool:
    """Tell whether x_0 comes from the object's own methods; a graph keeps the first answer."""
    if getattr(diffusion, "conditioning_free", False):
        return True
    if TAKES_OBJECTS and is_dynamo_compiling():
        return bool(_overridden_in_graph(diffusion))
    return _HOOKS.overridden(diffusion) is not None


@constant
def _overridden_in_graph(diffusion: Any) -> str:
    return _HOOKS.overridden(diffusion) or ""


def _state(x: Tensor) -> Tensor:
    if x.dtype is torch.float32:
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _row_of(t: Tensor) -> Tensor:
    return t.long().contiguous()


def _predict(
    diffusion: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    denoised_fn: Callable[[Tensor], Tensor] | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, Tensor, str, Tensor]:
    """(state, model output, name of the mean type of the output, row of each sample)."""
    output = _evaluate(diffusion, model, x, t, kwargs)
    kind = diffusion.model_mean_type.name
    state, row = _state(x), _row_of(t)
    if denoised_fn is None:
        return state, output, kind, row
    table = _table(diffusion, state, predicting_row, kind)
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
    call. This function reads a copy that is already there.
    """
    t = diffusion._scale_timesteps(t)
    if hasattr(diffusion, "_wrap_model"):
        wrapped = diffusion._wrap_model(function)
        if type(wrapped).__name__ != "_WrappedModel":
            output: Tensor = wrapped(x, t, **kwargs)
            return output
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
