"""Drop-ins for the methods of `DDIMSampler` of latent-diffusion and Stable Diffusion.

```python
import fastddim.integrations.latent_diffusion as fast
from ldm.models.diffusion.ddim import DDIMSampler
fast.install(DDIMSampler)
sampler = DDIMSampler(model)
samples, _ = sampler.sample(S=10, batch_size=2, shape=(4, 8, 8), eta=0.5, verbose=False)
```

Or assign one by one: `DDIMSampler.p_sample_ddim = fast.p_sample_ddim`. Samples are those of the
original to rounding, since coefficients come from the buffers that `make_schedule` registered and
noise is drawn with the same calls. The original's deviations from the paper are kept:

- the last step ends at ᾱ of timestep 0, not at 1;
- noise is drawn at every step, even at eta=0;
- a model that is not of "v" parameterization is assumed to predict epsilon;
- `encode` gives the model the index of a step as its timestep;
- `ddim_sampling(timesteps=n)` takes n − 1 of the steps;
- an η for which 1 − ᾱ_prev − σ² < 0 gives NaN.

Guidance is part of the step, from the model output for both conditions. With "v", a step reads √ᾱ
of the timestep that `make_schedule` chose for `index`, whatever `t` is. The model's own
`predict_start_from_z_and_v` and `predict_eps_from_z_and_v` are called if they are overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastddim.integrations._hooks import Hooks
from fastddim.integrations._indices import check_indices, one_index
from fastddim.integrations._shared import give_methods
from fastddim.integrations._tables import CacheOf, step_table
from fastddim.integrations.latent_diffusion._calls import evaluate, noise_like
from fastddim.integrations.latent_diffusion._rows import (
    concluding_row,
    encoding_row,
    epsilon_row,
    guiding_row,
    noising_row,
    predicting_row,
    stepping_row,
)
from fastddim.kept import keep
from fastddim.plan import Row
from fastddim.steptable import StepTable

_Callback = Callable[[int], Any]
_ImageCallback = Callable[[Tensor, int], Any]

_HOOKS = Hooks("predict_start_from_z_and_v", "predict_eps_from_z_and_v", of=("DDPM",))

# Enough tables for a guidance scale and a temperature that change from step to step.
_tables = CacheOf(64)


def install(sampler: Any) -> None:
    """Give a class, or one object, the five methods of this module."""
    give_methods(sampler, (p_sample_ddim, ddim_sampling, encode, decode, stochastic_encode))


@torch.no_grad()
def p_sample_ddim(
    self: Any,
    x: Tensor,
    c: Any,
    t: Tensor,
    index: int,
    repeat_noise: bool = False,
    use_original_steps: bool = False,
    quantize_denoised: bool = False,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    score_corrector: Any = None,
    corrector_kwargs: Any = None,
    unconditional_guidance_scale: float = 1.0,
    unconditional_conditioning: Any = None,
    dynamic_threshold: Any = None,
) -> tuple[Tensor, Tensor]:
    """Take one step down with DDIM (arXiv 2010.02502, eq. 12 and 16).

    Args:
        self: a `DDIMSampler` after `make_schedule`.
        x: latents `[B, …]`; float16 and bfloat16 become float32, as in the original.
        c: condition: a tensor, or a dict or list of tensors (or of lists of them).
        t: int64 `[B]`, timestep that the model gets.
        index: index of the step, 0 for the last: an integer, or a tensor with one.
        repeat_noise: whether all samples get the same noise.
        use_original_steps: whether to take the steps of all timesteps, rather than those of
            `make_schedule`. Their σ is the model's `ddim_sigmas_for_original_num_steps`, or the
            sampler's if the model has none (the original fails then).
        quantize_denoised: whether x_0 passes through the first stage's quantizer. Epsilon does not.
        temperature, noise_dropout: factor of the noise, and the share of it that is dropped.
        score_corrector, corrector_kwargs: `score_corrector.modify_score(model, e_t, x, t, c,
            **corrector_kwargs)` changes epsilon.
        unconditional_guidance_scale: g of classifier-free guidance (arXiv 2207.12598). At 1 the
            model is evaluated only on the condition.
        unconditional_conditioning: like c.

    Returns:
        (x_prev, x_0), like x.

    Raises:
        NotImplementedError: `dynamic_threshold` is not None, as in the original.
        AssertionError: `score_corrector` is given with "v" parameterization.
        IndexError, TypeError, ValueError: `index` is something else.
    """
    at = index if type(index) is int else one_index("index", index)
    at = int(index) if at is None else at
    if dynamic_threshold is not None:
        raise NotImplementedError("dynamic_threshold: expected None")
    scale = float(unconditional_guidance_scale)
    guided = unconditional_conditioning is not None and scale != 1.0
    output = evaluate(self.model, x, c, t, unconditional_conditioning if guided else None)
    default = torch.get_default_dtype()
    state = x if x.dtype is default else x.to(torch.promote_types(x.dtype, default))
    original = use_original_steps
    halves = quantize_denoised or _has_hooks(self.model)
    if guided and (halves or score_corrector is not None):
        output, scale = _guide(self, output, scale, original), 1.0
    if score_corrector is not None:
        assert self.model.parameterization == "eps", "score_corrector: expected a model of epsilon"
        output = score_corrector.modify_score(self.model, output, x, t, c, **corrector_kwargs)
    if halves:
        epsilon, x_0 = _epsilon_and_x_0(self, x, t, state, output, at, original)
        if quantize_denoised:
            x_0 = self.model.first_stage_model.quantize(x_0)[0]
        state, output = epsilon.to(state.dtype), x_0
        table = _table(self, concluding_row, original, len(x), temperature)
    else:
        table = _table(self, stepping_row, original, len(x), temperature, scale=scale)
    noise = noise_like(x, repeat_noise)
    if noise_dropout > 0.0:
        noise = torch.nn.functional.dropout(noise, p=noise_dropout)
    x_prev, x_0 = table(state, output, at, noise=noise)
    return x_prev, x_0


@torch.no_grad()
def ddim_sampling(
    self: Any,
    cond: Any,
    shape: Sequence[int],
    x_T: Tensor | None = None,
    ddim_use_original_steps: bool = False,
    callback: _Callback | None = None,
    timesteps: int | None = None,
    quantize_denoised: bool = False,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    img_callback: _ImageCallback | None = None,
    log_every_t: int = 100,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    score_corrector: Any = None,
    corrector_kwargs: Any = None,
    unconditional_guidance_scale: float = 1.0,
    unconditional_conditioning: Any = None,
    dynamic_threshold: Any = None,
    ucg_schedule: Sequence[float] | None = None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Draw samples with DDIM, down the timesteps of `make_schedule`.

    Args:
        cond: the condition, c of `p_sample_ddim`.
        shape: `[B, C, H, W]`.
        x_T: latents of that shape; by default drawn with `torch.randn`.
        ddim_use_original_steps: whether to visit all timesteps instead, or the first `timesteps`.
        callback, img_callback: called after each step i as `callback(i)`, `img_callback(x_0, i)`.
        mask, x0: where the mask is 1, the state before each step is replaced by x0 with fresh noise
            from the model's `q_sample`.
        log_every_t: number of steps from one that is kept to the next.
        ucg_schedule: a guidance scale for each step.

    The other arguments are those of `p_sample_ddim`.

    Returns:
        (samples, {"x_inter": states, "pred_x0": predictions}), both lists with x_T first.
    """
    device = self.model.betas.device
    img = torch.randn(shape, device=device) if x_T is None else x_T
    visited = _visited(self, timesteps, ddim_use_original_steps)
    if ucg_schedule is not None:
        assert len(ucg_schedule) == len(visited), (
            f"ucg_schedule: expected one scale a step, {len(visited)}, got {len(ucg_schedule)}"
        )
    intermediates = {"x_inter": [img], "pred_x0": [img]}
    for i, step in enumerate(tqdm(visited, desc="DDIM Sampler")):
        index = len(visited) - i - 1
        ts = torch.full((shape[0],), step, device=device, dtype=torch.long)
        if mask is not None:
            img = self.model.q_sample(x0, ts) * mask + (1.0 - mask) * img
        if ucg_schedule is not None:
            unconditional_guidance_scale = ucg_schedule[i]
        img, pred_x0 = self.p_sample_ddim(
            img,
            cond,
            ts,
            index=index,
            use_original_steps=ddim_use_original_steps,
            quantize_denoised=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
        )
        if callback:
            callback(i)
        if img_callback:
            img_callback(pred_x0, i)
        if index % log_every_t == 0 or index == len(visited) - 1:
            intermediates["x_inter"].append(img)
            intermediates["pred_x0"].append(pred_x0)
    return img, intermediates


@torch.no_grad()
def encode(
    self: Any,
    x0: Tensor,
    c: Any,
    t_enc: int,
    use_original_steps: bool = False,
    return_intermediates: int | None = None,
    unconditional_guidance_scale: float = 1.0,
    unconditional_conditioning: Any = None,
    callback: _Callback | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Take latents `t_enc` steps up with DDIM's ODE (arXiv 2010.02502, eq. 13).

    Args:
        x0: latents `[B, …]`.
        c, unconditional_guidance_scale, unconditional_conditioning: as in `p_sample_ddim`.
        return_intermediates: approximate number of earlier states to return as well.
        callback: called after each step i as `callback(i)`.

    Returns:
        (encoded, dict): like x0, and the same as `x_encoded`, `intermediate_steps` and, if
        requested, `intermediates`.

    Raises:
        AssertionError: there are fewer steps than `t_enc`, or the scale is not 1 and there is no
            `unconditional_conditioning`.
    """
    count = self.ddpm_num_timesteps if use_original_steps else self.ddim_timesteps.shape[0]
    assert t_enc <= count, f"t_enc: expected at most {count} steps, got {t_enc}"
    scale = float(unconditional_guidance_scale)
    assert scale == 1.0 or unconditional_conditioning is not None, (
        "unconditional_conditioning: expected a tensor with guidance, got None"
    )
    guided_by = None if scale == 1.0 else unconditional_conditioning
    table = _table(self, encoding_row, use_original_steps, scale=scale)
    x_next, intermediates, steps = x0, [], []
    for i in tqdm(range(t_enc), desc="Encoding Image"):
        t = torch.full((x0.shape[0],), i, device=self.model.device, dtype=torch.long)
        output = evaluate(self.model, x_next, c, t, guided_by)
        x_next, _ = table(x_next, output, i, return_x0=False)
        if return_intermediates and (
            i >= t_enc - 2 or (i % (t_enc // return_intermediates) == 0 and i < t_enc - 1)
        ):
            intermediates.append(x_next)
            steps.append(i)
        if callback:
            callback(i)
    out: dict[str, Any] = {"x_encoded": x_next, "intermediate_steps": steps}
    if return_intermediates:
        out["intermediates"] = intermediates
    return x_next, out


@torch.no_grad()
def decode(
    self: Any,
    x_latent: Tensor,
    cond: Any,
    t_start: int,
    unconditional_guidance_scale: float = 1.0,
    unconditional_conditioning: Any = None,
    use_original_steps: bool = False,
    callback: _Callback | None = None,
    img_callback: _ImageCallback | None = None,
) -> Tensor:
    """Take latents `[B, …]` down the last `t_start` steps with `p_sample_ddim`.

    `callback` and `img_callback` are called after each step i as `callback(i)` and
    `img_callback(x_prev, i)`; the other arguments are those of `p_sample_ddim`.
    """
    steps = range(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps.tolist()
    visited = steps[:t_start][::-1]
    for i, step in enumerate(tqdm(visited, desc="Decoding image")):
        ts = torch.full((x_latent.shape[0],), step, device=x_latent.device, dtype=torch.long)
        x_latent, _ = self.p_sample_ddim(
            x_latent,
            cond,
            ts,
            index=len(visited) - i - 1,
            use_original_steps=use_original_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )
        if callback:
            callback(i)
        if img_callback:
            img_callback(x_latent, i)
    return x_latent


@torch.no_grad()
def stochastic_encode(
    self: Any,
    x0: Tensor,
    t: Tensor,
    use_original_steps: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """Add noise to latents: √ᾱ·x0 + √(1 − ᾱ)·noise.

    Args:
        x0: `[B, …]`; float16 and bfloat16 become float32, as in the original.
        t: int64 `[B]`, indices into the steps of `make_schedule` or, with `use_original_steps`,
            timesteps.
        noise: like x0; by default drawn with `torch.randn_like`.

    Raises:
        IndexError, TypeError: t is not a tensor of integers.
    """
    check_indices("t", t)
    noise = torch.randn_like(x0) if noise is None else noise
    state = x0.to(torch.promote_types(x0.dtype, self.sqrt_alphas_cumprod.dtype))
    table = _table(self, noising_row, use_original_steps)
    noisy, _ = table(state, noise, t.long().contiguous(), return_x0=False)
    return noisy


def _has_hooks(model: Any) -> bool:
    """Tell whether epsilon and x_0 come from the model's own methods."""
    return model.parameterization == "v" and _HOOKS.overridden(model) is not None


def _epsilon_and_x_0(
    sampler: Any, x: Tensor, t: Tensor, state: Tensor, output: Tensor, index: int, original: bool
) -> tuple[Tensor, Tensor]:
    """Epsilon and x_0, for functions that come between the two halves of a step."""
    model = sampler.model
    if _has_hooks(model):
        epsilon = model.predict_eps_from_z_and_v(x, t, output)
        return epsilon, model.predict_start_from_z_and_v(x, t, output)
    table = _table(sampler, predicting_row, original, len(x))
    x_0, _ = table(state, output, index, return_x0=False)
    if model.parameterization != "v":
        return output, x_0
    table = _table(sampler, epsilon_row, original, len(x))
    return table(state, output, index, return_x0=False)[0], x_0


def _guide(sampler: Any, output: Tensor, scale: float, original: bool) -> Tensor:
    """The guided output alone, for a function that comes before the step."""
    unconditional, conditional = output.chunk(2)
    table = _table(sampler, guiding_row, original, scale)
    guided, _ = table(unconditional, conditional, 0, return_x0=False)
    return guided


def _visited(sampler: Any, timesteps: int | None, original: bool) -> list[int]:
    """Timesteps in the order visited."""
    if original:
        return list(range(sampler.ddpm_num_timesteps if timesteps is None else timesteps))[::-1]
    visited: list[int] = sampler.ddim_timesteps.tolist()
    if timesteps is not None:
        visited = visited[: int(min(timesteps / len(visited), 1) * len(visited)) - 1]
    return visited[::-1]


def _table(
    sampler: Any, make_row: Callable[..., Row], original: bool, *arguments: Any, scale: float = 1.0
) -> StepTable:
    """The rows `make_row(sampler, original, *arguments)`, one a step, under guidance by `scale`."""
    model = sampler.model
    kept = _tables[sampler]
    sources = (sampler.ddim_sigmas, sampler.ddim_alphas, model.alphas_cumprod)
    dtype = torch.get_default_dtype()  # the dtype to which the rows are rounded
    key = (make_row, original, *arguments, scale, model.parameterization, dtype, *map(id, sources))
    table: StepTable | None = kept.get(key)
    if table is None:
        table = keep(
            kept,
            key,
            lambda: step_table(make_row(sampler, original, *arguments)._replace(g=scale)),
            sources=sources,
        )
    return table
