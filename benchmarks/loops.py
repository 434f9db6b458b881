"""Models of very different cost, and the common loops around them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastddim

sys.path.append(str(Path(__file__).resolve().parent.parent))

Loop = Callable[[], Tensor]

# The seed of the noise of a loop's steps.
SEED = 3

# A share of the largest value: fifty to a thousand steps round this differently.
AGREEMENT = 2e-3


def diffusers() -> Any:
    """Import diffusers when it is needed, which is only by some models and loops."""
    return importlib.import_module("diffusers")


class Policy(nn.Module):
    """A policy head of three layers on 112 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(112, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 112)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return output * (t[:, None] * 1e-3 + 1)


class Unet(nn.Module):
    """A U-Net of diffusers with a million parameters, untrained."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusers().UNet2DModel(
            sample_size=32,
            layers_per_block=1,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.unet(x, t, return_dict=False)[0]
        return output


def null_model(x: Tensor, t: Tensor) -> Tensor:
    return x


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "null model": (lambda: null_model, (1, 4, 64, 64)),
    "policy head": (Policy, (1, 112)),
    "digits U-Net": (lambda: fastddim.models.load("digits"), (16, 1, 8, 8)),
    "fashion U-Net": (lambda: fastddim.models.load("fashion"), (4, 1, 28, 28)),
    "diffusers U-Net": (Unet, (4, 3, 32, 32)),
}
"""The models by name: a function that makes each, and the shape of its state."""


def make(name: str, device: str = "cpu") -> tuple[Any, tuple[int, ...]]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build()
    return (model.to(device).eval() if isinstance(model, nn.Module) else model), shape


def diffusers_loop(model: Any, x_T: Tensor, steps: int, eta: float) -> Loop:
    """The loop of diffusers' pipelines with `DDIMScheduler`."""
    scheduler = diffusers().DDIMScheduler(clip_sample=False)
    return _scheduler_loop(model, x_T, scheduler, steps, eta=eta)


def ddpm_loop(model: Any, x_T: Tensor, steps: int = 1000) -> Loop:
    """The loop of DDPM's steps with `diffusers.DDPMScheduler`, whose step takes no η."""
    return _scheduler_loop(model, x_T, diffusers().DDPMScheduler(clip_sample=False), steps)


def _scheduler_loop(model: Any, x_T: Tensor, scheduler: Any, steps: int, **options: Any) -> Loop:
    scheduler.set_timesteps(steps, device=x_T.device)
    generator = torch.Generator(x_T.device)

    def loop() -> Tensor:
        generator.manual_seed(SEED)
        x = x_T
        for t in scheduler.timesteps:
            output = model(x, t.expand(len(x)))
            x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
        return x

    return loop


def official_loop(model: Any, x_T: Tensor, steps: int, eta: float) -> Loop:
    """`generalized_steps` of ermongroup/ddim."""
    written_out = importlib.import_module("tests.support.dropins.ermongroup")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()
    timesteps = range(0, 1000, 1000 // steps)

    # The loop has timesteps in float32, which the bundled models cannot use as indices.
    def with_integers(x: Tensor, t: Tensor) -> Any:
        return model(x, t.long())

    def loop() -> Tensor:
        torch.manual_seed(SEED)
        states, _ = written_out.peer_generalized(x_T, timesteps, with_integers, betas, eta=eta)
        last: Tensor = states[-1]
        return last

    return loop


def compiled_loop(model: Any, x_T: Tensor, steps: int, eta: float, **options: Any) -> Loop:
    """The model and equation 12 in one function under `torch.compile`, which takes the options.

    With `mode="reduce-overhead"` a step is a CUDA graph, whose output the next one overwrites.
    """
    device = x_T.device
    alphas = fastddim.Schedule.linear().alphas_cumprod.float()
    timesteps = torch.arange(0, 1000, 1000 // steps).flip(0)
    pairs = torch.stack([alphas[timesteps], torch.cat([alphas[timesteps[1:]], torch.ones(1)])], 1)
    timesteps, pairs = timesteps.to(device), pairs.to(device)
    generator = torch.Generator(device)
    graphs = options.get("mode") == "reduce-overhead"

    @torch.compile(dynamic=False, **options)
    def body(x: Tensor, t: Tensor, pair: Tensor, z: Tensor | None) -> Tensor:
        a, p = pair[0], pair[1]
        epsilon = model(x, t)
        x_0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        sigma = eta * ((1 - p) / (1 - a) * (1 - a / p)).sqrt()
        x = p.sqrt() * x_0 + (1 - p - sigma**2).sqrt() * epsilon
        return x if z is None else x + sigma * z

    def loop() -> Tensor:
        generator.manual_seed(SEED)
        x = x_T
        for t, pair in zip(timesteps, pairs, strict=True):
            z = torch.randn(x.shape, generator=generator, device=device) if eta else None
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            x = body(x, t.expand(len(x)), pair, z)
            x = x.clone() if graphs else x
        return x

    return loop


def assert_agree(got: Tensor, expected: Tensor, name: str) -> None:
    """Check that two loops gave the same, within `AGREEMENT`."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        got, expected, rtol=0, atol=AGREEMENT * scale, msg=lambda details: f"{name}: {details}"
    )


def step_noise(shape: tuple[int, ...], steps: int) -> Tensor:
    """The noise `[S, B, …]` that the loops of this module draw from torch's generator."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(steps)])
