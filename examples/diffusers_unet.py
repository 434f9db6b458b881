"""A U-Net of diffusers, unchanged, gives the same images as in diffusers' own loop.

The network is random, so the images are noise; the example shows that they agree.

python examples/diffusers_unet.py
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

import fastddim

STEPS = 20


def diffusers_loop(unet: UNet2DModel, scheduler: DDIMScheduler, x: Tensor) -> Tensor:
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)

    x_T = fastddim.philox.initial_latents((4, 3, 16, 16), seed=0)
    schedule = fastddim.Schedule.from_diffusers(scheduler)
    ours = fastddim.sample(unet, STEPS, spacing="leading", schedule=schedule, x_T=x_T)
    theirs = diffusers_loop(unet, scheduler, x_T)
    error = (ours - theirs).abs().max() / theirs.abs().max()
    print(f"largest difference, relative to the largest value: {error:.1e}")


if __name__ == "__main__":
    main()
