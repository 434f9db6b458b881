"""Pipelines of diffusers, before and after the one-line change: the same seed, the same image."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers")
ours = importlib.import_module("fastddim.integrations.diffusers")

STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unconditional(pipeline: Any, scheduler: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    made = pipeline(unet, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def stable_diffusion(pipeline: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=1,
            vocab_size=100,
            max_position_embeddings=77,
        )
    )
    # As Stable Diffusion 1 has it.
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    made = pipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def embeddings() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: torch.randn(2, 77, 32, generator=generator) for name in names}


def mask() -> Image.Image:
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[8:24, 4:20] = 255
    return Image.fromarray(pixels)


STABLE: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "txt2img": ("StableDiffusionPipeline", lambda: {"height": 32, "width": 32}),
    "img2img": ("StableDiffusionImg2ImgPipeline", lambda: {"image": picture(0), "strength": 0.6}),
    "inpaint": (
        "StableDiffusionInpaintPipeline",
        lambda: {
            "image": picture(0),
            "mask_image": mask(),
            "height": 32,
            "width": 32,
            "strength": 0.99,
        },
    ),
}


def images(pipe: Any, **kwargs: Any) -> np.ndarray:
    seeds = kwargs.pop("seed")
    kwargs["generator"] = (
        [torch.Generator().manual_seed(seed) for seed in seeds]
        if isinstance(seeds, list)
        else torch.Generator().manual_seed(seeds)
    )
    result = pipe(num_inference_steps=kwargs.pop("steps", STEPS), output_type="np", **kwargs)
    return np.asarray(result.images)


def assert_same(before: np.ndarray, after: np.ndarray) -> None:
    assert before.std() > 0.01
    assert np.isfinite(before).all()
    assert abs(before - after).max() <= 1 / 255


@pytest.mark.parametrize("seed", [0, [3, 4]], ids=["generator", "generators"])
@pytest.mark.parametrize(
    ("pipeline", "scheduler", "options"),
    [
        ("DDPMPipeline", "DDPMScheduler", {}),
        ("DDIMPipeline", "DDIMScheduler", {"eta": 0.0}),
        ("DDIMPipeline", "DDIMScheduler", {"eta": 1.0}),
        ("DDIMPipeline", "DDIMScheduler", {"eta": 0.3, "use_clipped_model_output": True}),
    ],
)
def test_unconditional(pipeline: str, scheduler: str, options: dict[str, Any], seed: Any) -> None:
    pipe = unconditional(getattr(diffusers, pipeline), getattr(diffusers, scheduler)())
    before = images(pipe, batch_size=2, seed=seed, **options)
    pipe.scheduler = getattr(ours, scheduler).from_config(pipe.scheduler.config)
    after = images(pipe, batch_size=2, seed=seed, **options)
    assert type(pipe.scheduler) is getattr(ours, scheduler)
    assert_same(before, after)
    assert_same(after, images(pipe, batch_size=2, seed=seed, **options))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", STABLE)
def test_stable_diffusion(kind: str, eta: float) -> None:
    name, arguments = STABLE[kind]
    pipe = stable_diffusion(getattr(diffusers, name))
    kwargs = {**embeddings(), **arguments(), "guidance_scale": 3.0, "eta": eta}
    before = images(pipe, seed=[1, 2], **kwargs)
    pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    assert_same(before, images(pipe, seed=[1, 2], **kwargs))


def test_save_and_load(tmp_path: Path) -> None:
    """The scheduler's class is recorded, and found again."""
    pipe = unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler())
    pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    before = images(pipe, seed=0)
    pipe.save_pretrained(tmp_path)
    assert "fastddim.integrations.diffusers" in (tmp_path / "model_index.json").read_text()
    stable = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    stable.set_progress_bar_config(disable=True)
    # The constructor of DDIMPipeline makes diffusers' own scheduler of whatever it is given.
    assert isinstance(stable.scheduler, diffusers.DDIMScheduler)
    stable.scheduler = ours.DDIMScheduler.from_config(stable.scheduler.config)
    assert_same(before, images(stable, seed=0))
    ancestral = unconditional(diffusers.DDPMPipeline, ours.DDPMScheduler())
    before = images(ancestral, seed=0)
    ancestral.save_pretrained(tmp_path / "ddpm")
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ddpm")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ours.DDPMScheduler
    assert_same(before, images(loaded, seed=0))
