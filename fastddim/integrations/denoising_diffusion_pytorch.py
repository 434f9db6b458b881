"""Drop-ins for `ddim_sample` of lucidrains' denoising-diffusion-pytorch.

```python
import fastddim.integrations.denoising_diffusion_pytorch as fast
from denoising_diffusion_pytorch import GaussianDiffusion
GaussianDiffusion.ddim_sample = fast.ddim_sample
diffusion = GaussianDiffusion(model, image_size=16, timesteps=100, sampling_timesteps=5)
images = diffusion.sample(batch_size=2)
```

For the class in `denoising_diffusion_pytorch.classifier_free_guidance`, take
`classifier_free_ddim_sample` instead. Coefficients are those of the buffers that the object holds,
noise is drawn with the same calls, and images are those of the original to rounding. So are the
deviations from the paper: x_0 is always clipped, except by
`classifier_free_ddim_sample(clip_denoised=False)`; an η for which 1 − ᾱ_prev − σ² < 0 gives NaN.

Both evaluate the model themselves: a `model_predictions` that a subclass overrides is not called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddim.integrations._shared import each
from fastddim.integrations._tables import step_table
from fastddim.plan import Row


@torch.inference_mode()
def ddim_sample(self: Any, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
    """Draw samples with DDIM (arXiv 2010.02502, eq. 12), `sampling_timesteps` of them.

    Every objective, with or without self-conditioning. x_0 is clipped to [−1, 1] and epsilon
    re-derived from it; the last step returns x_0.

    Args:
        self: `denoising_diffusion_pytorch.GaussianDiffusion`.
        shape: `[B, C, H, W]`.
        return_all_timesteps: whether to return the states of all steps.

    Returns:
        Unnormalized samples like `shape`, or states `[B, S + 1, C, H, W]`.
    """
    steps = _Steps.of(self)
    table = step_table(_row(self, steps, 1.0, rederive=True))
    img = torch.randn(shape, device=self.device)
    imgs, x_start = [img], None
    for i, t in _progress(steps, img):
        model_output = self.model(img, t, x_start)
        noise = torch.randn_like(img) if i < steps.last else None
        state = img.to(steps.state_dtype(img))
        img, x_start = table(state, model_output, i, noise=noise, return_x0=self.self_condition)
        if return_all_timesteps:
            imgs.append(img)
    samples: Tensor = self.unnormalize(torch.stack(imgs, dim=1) if return_all_timesteps else img)
    return samples


@torch.no_grad()
def classifier_free_ddim_sample(
    self: Any,
    classes: Tensor,
    shape: Sequence[int],
    cond_scale: float = 6.0,
    rescaled_phi: float = 0.7,
    clip_denoised: bool = True,
) -> Tensor:
    """Draw samples of classes with DDIM and classifier-free guidance (arXiv 2207.12598).

    As in `ddim_sample`, except that epsilon is not re-derived from the clipped x_0 where the model
    predicts it. Guidance is the model's own `forward_with_cond_scale`; with `use_cfg_plus_plus`
    (arXiv 2406.08070) epsilon comes from its unconditional output. At cond_scale=1 that method
    returns no such pair and the original fails, but takes a batch of two for one: so here.

    Args:
        self: `denoising_diffusion_pytorch.classifier_free_guidance.GaussianDiffusion`.
        classes: int64 `[B]`.
        shape: `[B, C, H, W]`.
        cond_scale, rescaled_phi: guidance scale, and how much of the result is rescaled.
        clip_denoised: whether x_0 is clipped to [−1, 1].

    Returns:
        Samples like `shape`, in [0, 1] where x_0 is in [−1, 1].
    """
    steps = _Steps.of(self)
    clip = 1.0 if clip_denoised else math.inf
    row = _row(self, steps, clip, rederive=self.objective != "pred_noise")
    if self.use_cfg_plus_plus:
        # Two steps: the first gives the part from epsilon, which the second adds to that from x_0.
        direction = step_table(row._replace(k0=row.k0 - steps.signal))
        row = row._replace(k0=steps.signal, kx=0.0, km=0.0, pn=1.0)
    table = step_table(row)
    img = torch.randn(shape, device=self.device)
    for i, t in _progress(steps, img):
        model_output, unconditional = self.model.forward_with_cond_scale(
            img, t, classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi
        )
        noise = torch.randn_like(img) if i < steps.last else None
        img = img.to(steps.state_dtype(img))
        if self.use_cfg_plus_plus and noise is not None:
            noise, _ = direction(img, unconditional.expand_as(img), i, noise=noise, return_x0=False)
        img, _ = table(img, model_output.expand_as(img), i, noise=noise, return_x0=False)
    return (img + 1) * 0.5


class _Steps(NamedTuple):
    """The timesteps of a run in the order visited, and the coefficients that need no model."""

    timesteps: list[int]
    dtype: torch.dtype  # of the buffers
    signal: Tensor  # √ᾱ after each step
    direction: Tensor  # √(1 − ᾱ_prev − σ²)
    sigma: Tensor

    @classmethod
    def of(cls, diffusion: Any) -> _Steps:
        ends = torch.linspace(
            -1, diffusion.num_timesteps - 1, diffusion.sampling_timesteps + 1, device="cpu"
        )
        *timesteps, _ = ends.int().tolist()[::-1]
        # Terms that cancel are rounded to the dtype of the buffers, as in the original.
        a = diffusion.alphas_cumprod.cpu()[timesteps]
        p = torch.cat([a[1:], a.new_ones(1)])
        variance = (1 - a / p) * (1 - p) / (1 - a)
        sigma = diffusion.ddim_sampling_eta * each(torch.sqrt, variance)
        signal, direction = each(torch.sqrt, p), each(torch.sqrt, 1 - p - sigma**2)
        return cls(timesteps, a.dtype, signal.double(), direction.double(), sigma.double())

    @property
    def last(self) -> int:
        return len(self.timesteps) - 1

    def state_dtype(self, img: Tensor) -> torch.dtype:
        return torch.promote_types(img.dtype, self.dtype)


def _row(diffusion: Any, steps: _Steps, clip: float, *, rederive: bool) -> Row:
    """The steps, with epsilon re-derived from x_0, or else that of the model.

    After the last ᾱ is 1, so that it returns x_0.
    """

    def buffer(name: str) -> Tensor:
        values: Tensor = getattr(diffusion, name).cpu().double()
        return values[steps.timesteps]

    x_scale, eps_scale = buffer("sqrt_recip_alphas_cumprod"), buffer("sqrt_recipm1_alphas_cumprod")
    cx, cm = {
        "pred_noise": (x_scale, -eps_scale),
        "pred_x0": (torch.zeros_like(x_scale), torch.ones_like(x_scale)),
        "pred_v": (buffer("sqrt_alphas_cumprod"), -buffer("sqrt_one_minus_alphas_cumprod")),
    }[diffusion.objective]
    e0, ex, em = (-1 / eps_scale, x_scale / eps_scale, 0.0) if rederive else (0.0, 0.0, 1.0)
    return Row(
        cx=cx,
        cm=cm,
        r=clip,
        k0=steps.signal + steps.direction * e0,
        kx=steps.direction * ex,
        km=steps.direction * em,
        pn=steps.sigma,
        g=1.0,
    )


def _progress(steps: _Steps, img: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The index of each step, and its timestep as the model is given it."""
    for i, timestep in enumerate(tqdm(steps.timesteps, desc="sampling loop time step")):
        yield i, torch.full((img.shape[0],), timestep, device=img.device, dtype=torch.long)
