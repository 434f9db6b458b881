"""Drop-ins for `ddim_sample` of lucidrains' denoising-diffusion-pytorch.

```python
import fastddim.integrations.denoising_diffusion_pytorch as fast
from denoising_diffusion_pytorch import GaussianDiffusion
fast.install(GaussianDiffusion)  # or any other class with a ddim_sample
diffusion = GaussianDiffusion(model, image_size=16, timesteps=100, sampling_timesteps=5)
images = diffusion.sample(batch_size=2)
```

Or assign the one for your class: `GaussianDiffusion.ddim_sample = fast.ddim_sample`.

| Module of the class | Drop-in |
| --- | --- |
| `denoising_diffusion_pytorch`, `repaint`, `learned_gaussian_diffusion` | `ddim_sample` |
| `denoising_diffusion_pytorch_1d` | `ddim_sample_1d` |
| `guided_diffusion` | `guided_ddim_sample` |
| `classifier_free_guidance` | `classifier_free_ddim_sample` |

Other classes have no DDIM. A drop-in refuses these, and the classes of other drop-ins. Coefficients
come from the buffers of the object, noise is drawn with the same calls, and images are those of the
original to rounding. The deviations from the paper are kept: x_0 is always clipped, except with
`clip_denoised=False`; an η for which 1 − ᾱ_prev − σ² < 0 gives NaN.

The drop-ins evaluate the model themselves, unless `model_predictions` or a method that it calls is
overridden: then a step begins with the result of `model_predictions`.
"""

from __future__ import annotations

import functools
import math
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddim.integrations._hooks import Hooks
from fastddim.integrations._shared import each
from fastddim.integrations._tables import step_table
from fastddim.plan import Row

_Method = TypeVar("_Method", bound=Callable[..., Any])

_PACKAGE = "denoising_diffusion_pytorch"

_HOOKS = Hooks(
    "model_predictions",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
    of=("GaussianDiffusion", "GaussianDiffusion1D"),
)

# The drop-ins, by the module of the class that each is for.
_drop_ins: dict[str, Callable[..., Any]] = {}


def install(diffusion: Any) -> None:
    """Give a class, or one object, the drop-in for its `ddim_sample`.

    Raises:
        TypeError: there is no drop-in for it.
    """
    cls = diffusion if isinstance(diffusion, type) else type(diffusion)
    method = _drop_in(cls)
    if method is None:
        raise TypeError(
            f"diffusion: expected a class of {_PACKAGE} with a ddim_sample, got {cls.__name__}"
        )
    diffusion.ddim_sample = method if diffusion is cls else types.MethodType(method, diffusion)


def _drop_in(cls: type) -> Callable[..., Any] | None:
    """The drop-in for a class, found by the modules of the package that define it and its bases."""
    modules = (base.__module__.rpartition(".") for base in cls.__mro__)
    found = (_drop_ins.get(name) for package, _, name in modules if package == _PACKAGE)
    return next((method for method in found if method is not None), None)


def _of(*modules: str) -> Callable[[_Method], _Method]:
    """Make a method the drop-in for the classes of some modules; it then refuses other classes."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            right = _drop_in(type(self))
            of_package = any(base.__module__.startswith(_PACKAGE) for base in type(self).__mro__)
            if right is not checked and (right is not None or of_package):
                instead = "which has no ddim_sample" if right is None else f"for {right.__name__}"
                raise TypeError(
                    f"self: expected an object for {method.__name__}, got a "
                    f"{type(self).__name__}, {instead}"
                )
            return method(self, *args, **kwargs)

        _drop_ins.update(dict.fromkeys(modules, checked))
        return cast(_Method, checked)

    return decorate


@_of("denoising_diffusion_pytorch", "repaint")
@torch.inference_mode()
def ddim_sample(self: Any, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
    """Draw samples with DDIM (arXiv 2010.02502, eq. 12) in `sampling_timesteps` steps.

    Supports every objective, with or without self-conditioning. x_0 is clipped to [−1, 1] and
    epsilon re-derived from it; the last step returns x_0.

    Args:
        self: `denoising_diffusion_pytorch.GaussianDiffusion`, or `LearnedGaussianDiffusion`.
        shape: `[B, C, H, W]`.
        return_all_timesteps: whether to return the states of all steps.

    Returns:
        Unnormalized samples like `shape`, or states `[B, S + 1, C, H, W]`.

    Raises:
        TypeError: `self` is of another class.
    """
    hooked = functools.partial(self.model_predictions, clip_x_start=True, rederive_pred_noise=True)
    states = _states(self, shape, self.model, hooked, clip=1.0, rederive=True)
    samples = _stacked(states) if return_all_timesteps else _last(states)[0]
    return self.unnormalize(samples)  # type: ignore[no-any-return]


@_of("denoising_diffusion_pytorch_1d")
@torch.no_grad()
def ddim_sample_1d(
    self: Any,
    shape: Sequence[int],
    clip_denoised: bool = True,
    model_forward_kwargs: Mapping[str, Any] | None = None,
    return_noise: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw sequences with DDIM.

    As in `ddim_sample`, except that epsilon is not re-derived from the clipped x_0 if the model
    predicts epsilon.

    Args:
        self: `denoising_diffusion_pytorch.GaussianDiffusion1D`.
        shape: `[B, C, N]`, or `[B, N, C]`.
        clip_denoised: whether x_0 is clipped to [−1, 1].
        model_forward_kwargs: passed to the model.
        return_noise: whether to return noise too: that of the last step that adds any, as in the
            original, or x_T if no step does.

    Returns:
        Unnormalized samples like `shape`, or (samples, noise).

    Raises:
        TypeError: `self` is of another class.
    """
    kwargs = {} if model_forward_kwargs is None else model_forward_kwargs

    def evaluate(img: Tensor, t: Tensor, x_start: Tensor | None) -> Tensor:
        condition = {} if x_start is None else {"x_self_cond": x_start}
        output: Tensor = self.model(img, t, **{**kwargs, **condition})
        return output

    hooked = functools.partial(
        self.model_predictions, clip_x_start=clip_denoised, model_forward_kwargs=kwargs
    )
    clip, rederive = 1.0 if clip_denoised else math.inf, self.objective != "pred_noise"
    img, noise = _last(_states(self, shape, evaluate, hooked, clip=clip, rederive=rederive))
    samples: Tensor = self.unnormalize(img)
    return (samples, noise) if return_noise else samples


@_of("guided_diffusion")
@torch.no_grad()
def guided_ddim_sample(
    self: Any,
    shape: Sequence[int],
    return_all_timesteps: bool = False,
    cond_fn: Any = None,
    guidance_kwargs: Any = None,
) -> Tensor:
    """Draw samples with DDIM; `cond_fn` and `guidance_kwargs` are ignored, as in the original.

    As in `ddim_sample`, except that epsilon is not re-derived from the clipped x_0 if the model
    predicts epsilon.

    Args:
        self: `denoising_diffusion_pytorch.guided_diffusion.GaussianDiffusion`.
        shape: `[B, C, H, W]`.
        return_all_timesteps: whether to return the states that the model got, with x_T twice.

    Returns:
        Unnormalized samples like `shape`, or states `[B, S + 1, C, H, W]`.

    Raises:
        TypeError: `self` is of another class.
    """
    hooked = functools.partial(self.model_predictions, clip_x_start=True)
    rederive = self.objective != "pred_noise"
    states = _states(self, shape, self.model, hooked, clip=1.0, rederive=rederive)
    if not return_all_timesteps:
        return self.unnormalize(_last(states)[0])  # type: ignore[no-any-return]
    imgs = _stacked(states)
    return self.unnormalize(torch.cat([imgs[:, :1], imgs[:, :-1]], dim=1))  # type: ignore[no-any-return]


@_of("classifier_free_guidance")
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

    As in `ddim_sample`, except that epsilon is not re-derived from the clipped x_0 if the model
    predicts epsilon. Guidance is the model's own `forward_with_cond_scale`; with
    `use_cfg_plus_plus` (arXiv 2406.08070) epsilon comes from its unconditional output. At
    cond_scale=1 that method returns only one output instead of a pair. As in the original, this
    fails, except that a batch of two is mistaken for the pair.

    Args:
        self: `denoising_diffusion_pytorch.classifier_free_guidance.GaussianDiffusion`.
        classes: int64 `[B]`.
        shape: `[B, C, H, W]`.
        cond_scale, rescaled_phi: guidance scale, and the share of the result that is rescaled.
        clip_denoised: whether x_0 is clipped to [−1, 1].

    Returns:
        Samples like `shape`, in [0, 1] if x_0 is in [−1, 1].

    Raises:
        TypeError: `self` is of another class.
    """
    guidance = {"cond_scale": cond_scale, "rescaled_phi": rescaled_phi}
    if _HOOKS.overridden(self) is not None:

        def hooked(img: Tensor, t: Tensor, _: None) -> Any:
            return self.model_predictions(img, t, classes, **guidance, clip_x_start=clip_denoised)

        return (_last(_states(self, shape, self.model, hooked))[0] + 1) * 0.5
    steps = _Steps.of(self)
    clip = 1.0 if clip_denoised else math.inf
    row = _row(self, steps, clip, rederive=self.objective != "pred_noise")
    if self.use_cfg_plus_plus:
        # Two steps: the first gives the term of epsilon, which the second adds to the term of x_0.
        direction = step_table(row._replace(k0=row.k0 - steps.signal))
        row = row._replace(k0=steps.signal, kx=0.0, km=0.0, pn=1.0)
    table = step_table(row)
    img = torch.randn(shape, device=self.betas.device)
    for i, t in _progress(steps, img):
        model_output, unconditional = self.model.forward_with_cond_scale(
            img, t, classes, **guidance
        )
        noise = torch.randn_like(img) if i < steps.last else None
        img = img.to(steps.state_dtype(img))
        if self.use_cfg_plus_plus and noise is not None:
            noise, _ = direction(img, unconditional.expand_as(img), i, noise=noise, return_x0=False)
        img, _ = table(img, model_output.expand_as(img), i, noise=noise, return_x0=False)
    return (img + 1) * 0.5


def _states(
    diffusion: Any,
    shape: Sequence[int],
    evaluate: Callable[..., Tensor],
    hooked: Callable[..., Any],
    *,
    clip: float = math.inf,
    rederive: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give x_T and the state after each step, each with the noise that was drawn last.

    Args:
        evaluate: `evaluate(x, t, x_0)` returns the model's output.
        hooked: `hooked(x, t, x_0)` returns epsilon and x_0, if the object's own methods compute
            them.
        clip, rederive: as in `_row`.
    """
    steps, calls = _Steps.of(diffusion), _HOOKS.overridden(diffusion) is not None
    row = _concluding_row(steps) if calls else _row(diffusion, steps, clip, rederive=rederive)
    table, conditioned = step_table(row), getattr(diffusion, "self_condition", False)
    img = drawn = torch.randn(shape, device=diffusion.betas.device)
    yield img, drawn
    x_start = None
    for i, t in _progress(steps, img):
        if calls:
            state, output, *_ = hooked(img, t, x_start)
        else:
            state, output = img, evaluate(img, t, x_start)
        noise = torch.randn_like(img) if i < steps.last else None
        state = state.to(steps.state_dtype(img))
        img, x_0 = table(state, output, i, noise=noise, return_x0=conditioned)
        if conditioned:
            x_start = output if calls else x_0
        drawn = drawn if noise is None else noise
        yield img, drawn


def _last(states: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return deque(states, maxlen=1).pop()


def _stacked(states: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([img for img, _ in states], dim=1)


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

    After the last step ᾱ is 1, so that step returns x_0.
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


def _concluding_row(steps: _Steps) -> Row:
    """The steps that take epsilon as the state and x_0 as the model output."""
    return Row(
        cx=0.0,
        cm=1.0,
        r=math.inf,
        k0=steps.signal,
        kx=steps.direction,
        km=0.0,
        pn=steps.sigma,
        g=1.0,
    )


def _progress(steps: _Steps, img: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The index of each step, and its timestep as a tensor for the model."""
    for i, timestep in enumerate(tqdm(steps.timesteps, desc="sampling loop time step")):
        yield i, torch.full((img.shape[0],), timestep, device=img.device, dtype=torch.long)
