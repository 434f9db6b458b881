"""Initial latents for pipelines, the same on every device."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastddim import philox

# Arguments of pipelines whose latents are not images.
_OTHER_LATENTS = ("num_frames", "video_length", "audio_length_in_s", "audio_end_in_s")


def initial_latents(
    pipe: Any,
    seed: int | Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Make initial latents for a pipeline of images, which depend on the seed alone: those that
    `fastddim.sample` starts from with the same seed.

    Pass them to a pipeline as `latents=`. No bit of them depends on the device, nor on the batch if
    each sample has a seed. Pipelines without that argument, such as `DDIMPipeline` and
    `DiTPipeline`, draw their latents from a `torch.Generator`: one on the CPU gives the same
    latents on every device.

    Args:
        pipe: a pipeline with a `unet` or a `transformer`, and with a `vae` if it works on latents.
        seed: as in `fastddim.sample`: an int in [0, 2⁶⁴), or one for each sample; None draws one.
        batch_size: number of samples, which is the number of prompts times the images of each; by
            default 1, or the number of seeds.
        height, width: size of the images in pixels; by default that of the model.

    Returns:
        `[B, C, H, W]` ~ N(0, I), on the device and in the dtype of the pipeline.

    Raises:
        TypeError: the pipeline has neither a `unet` nor a `transformer`.
        ValueError: its latents are not images, or the seed, the height or the width does not fit.

    ```python
    import diffusers, fastddim.integrations.diffusers as fast
    unet = diffusers.UNet2DModel(sample_size=16, block_out_channels=(32, 32, 32, 32))
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    x_T = fast.initial_latents(pipe, seed=[3, 4])  # [2, 3, 16, 16]
    ```
    """
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if model is None:
        raise TypeError(
            "pipe: expected a pipeline with a unet or a transformer, got a "
            f"{type(pipe).__name__} without either"
        )
    taken = inspect.signature(pipe.__call__).parameters
    others = [name for name in _OTHER_LATENTS if name in taken]
    size = getattr(model.config, "sample_size", None)
    if others or size is None:
        reason = f"takes {others[0]}" if others else "has no sample_size"
        raise ValueError(
            f"pipe: expected a pipeline of images, got a {type(pipe).__name__}, which {reason}; "
            "call fastddim.philox.initial_latents with the shape of its latents"
        )
    vae = getattr(pipe, "vae", None)
    channels = model.config.in_channels if vae is None else vae.config.latent_channels
    pixels = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    default = (size, size) if isinstance(size, int) else tuple(size)
    extent = [
        one if given is None else _latent_extent(name, given, pixels)
        for name, given, one in (("height", height, default[0]), ("width", width, default[1]))
    ]
    if batch_size is None:
        batch_size = len(seed) if isinstance(seed, Sequence | Tensor) else 1
    return philox.initial_latents(
        (batch_size, channels, *extent), seed, dtype=model.dtype, device=pipe._execution_device
    )


def _latent_extent(name: str, given: int, pixels: int) -> int:
    extent, rest = divmod(given, pixels)
    if rest or extent < 1:
        raise ValueError(f"{name}: expected a positive multiple of {pixels}, got {given}")
    return extent
