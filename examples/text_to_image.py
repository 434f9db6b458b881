"""Text to image with the parts of Stable Diffusion, outside a pipeline.

A text encoder turns token ids into embeddings. `fastddim.sample` takes them as conditions, with
those of the empty prompt for guidance, and the VAE decodes the latents. The parts are random and
small here, so nothing has to be downloaded, and the picture is noise. To get a real picture, take
the ids from `pipe.tokenizer` and use

    pipe = StableDiffusionPipeline.from_pretrained(...)
    parts = Parts(pipe.unet, pipe.vae, pipe.text_encoder, pipe.scheduler)

If the scheduler's `set_alpha_to_one` is True, the result is that of the pipeline with the same
latents, to rounding. If it is False, as in Stable Diffusion, the pipeline ends at the ᾱ of
timestep 0, and `sample` ends at 1, the clean image.

Needs diffusers and transformers (`pip install fastddim[diffusers] transformers`).

python examples/text_to_image.py --out runs/text_to_image.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import fastddim

STEPS = 20
GUIDANCE = 7.5
# Ids as a tokenizer gives them, padded with the id for the end of the text.
START, END, LENGTH = 98, 99, 16
PROMPT = (23, 5, 61, 42)


@dataclass(frozen=True)
class Parts:
    """The parts of a Stable Diffusion pipeline, whose classes tell type checkers little."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any


def random_parts(device: str = "cpu") -> Parts:
    """The architecture of Stable Diffusion, small, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
    )
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
        bos_token_id=START,
        eos_token_id=END,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    unet, vae, text_encoder = (
        module.to(device).eval() for module in (unet, vae, CLIPTextModel(config))
    )
    return Parts(unet, vae, text_encoder, scheduler)


def embed(parts: Parts, tokens: Sequence[int]) -> Tensor:
    """The text encoder's embeddings `[1, LENGTH, width]` of one prompt."""
    ids = [START, *tokens, *[END] * (LENGTH - 1 - len(tokens))]
    with torch.no_grad():
        embeddings: Tensor = parts.text_encoder(torch.tensor([ids], device=parts.unet.device))[0]
    return embeddings


def draw(parts: Parts, prompt: Tensor, empty: Tensor, x_T: Tensor) -> Tensor:
    """Draw images `[B, 3, H, W]` from latents `x_T`, with one prompt for all B."""
    config = parts.scheduler.config
    latents = fastddim.sample(
        parts.unet,
        STEPS,
        x_T=x_T,
        schedule=fastddim.Schedule.from_diffusers(parts.scheduler),
        prediction=config.prediction_type,
        spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        model_kwargs={"encoder_hidden_states": prompt.expand(len(x_T), -1, -1)},
        uncond_kwargs={"encoder_hidden_states": empty},
        guidance_scale=GUIDANCE,
    )
    with torch.no_grad():
        images: Tensor = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    return images


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/text_to_image.png"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    parts = random_parts(args.device)
    size = parts.unet.config.sample_size
    shape = (2, parts.unet.config.in_channels, size, size)
    # These latents are the same on every device, since they are a function of the seed.
    x_T = fastddim.philox.initial_latents(shape, seed=0, device=args.device)
    images = draw(parts, embed(parts, PROMPT), embed(parts, ()), x_T)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fastddim.images.save_png(args.out, images)
    print(args.out)


if __name__ == "__main__":
    main()
