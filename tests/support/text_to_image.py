"""The pipeline of diffusers around the parts that examples/text_to_image.py samples without one."""

from __future__ import annotations

from typing import Any


def pipeline_of(parts: Any) -> Any:
    """A `StableDiffusionPipeline` of the example's `Parts`, without a progress bar."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=None,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
