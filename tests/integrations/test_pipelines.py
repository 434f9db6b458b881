"""Pipelines of diffusers, before and after the one-line change: the same seed, the same image."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import fastddim

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers")
ours = importlib.import_module("fastddim.integrations.diffusers")

STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Uses one thread: models this small gain nothing from more, and lose much where cores are
    shared.
    """
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


class TestPhilox:
    """Noise from the seeds of a pipeline's generators."""

    OPTIONS: ClassVar[dict[str, Any]] = {"batch_size": 2, "eta": 1.0}

    @staticmethod
    def pipeline(**noise: Any) -> Any:
        pipe = unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler())
        pipe.scheduler = ours.DDIMScheduler.from_config(
            pipe.scheduler.config, noise="philox", **noise
        )
        return pipe

    def test_seeds_give_images(self) -> None:
        pipe = self.pipeline()
        five, six = (images(pipe, seed=seed, **self.OPTIONS) for seed in (5, 6))
        assert abs(five - six).max() > 0.1
        assert np.array_equal(images(pipe, seed=5, **self.OPTIONS), five)
        assert np.array_equal(images(self.pipeline(seed=8), seed=5, **self.OPTIONS), five)

    def test_the_noise_is_not_that_of_torch(self) -> None:
        pipe = self.pipeline()
        philox = images(pipe, seed=5, **self.OPTIONS)
        pipe.scheduler.set_noise("torch")
        assert abs(images(pipe, seed=5, **self.OPTIONS) - philox).max() > 0.1

    def test_one_generator_gives_other_images_each_time(self) -> None:
        pipe, generator = self.pipeline(), torch.Generator().manual_seed(5)
        runs = [
            np.asarray(
                pipe(
                    num_inference_steps=STEPS,
                    output_type="np",
                    generator=generator,
                    **self.OPTIONS,
                ).images
            )
            for _ in range(2)
        ]
        assert abs(runs[0] - runs[1]).max() > 0.1

    def test_a_list_gives_each_sample_its_noise(self) -> None:
        pipe = self.pipeline()
        together = images(pipe, seed=[3, 4], **self.OPTIONS)
        for i, seed in enumerate((3, 4)):
            alone = images(pipe, seed=[seed], batch_size=1, eta=1.0)
            assert abs(together[i] - alone[0]).max() <= 1 / 255

    def test_ancestral(self) -> None:
        pipe = unconditional(diffusers.DDPMPipeline, ours.DDPMScheduler())
        pipe.scheduler.set_noise("philox")
        five, six = (images(pipe, seed=seed) for seed in (5, 6))
        assert abs(five - six).max() > 0.1
        assert np.array_equal(images(pipe, seed=5), five)

    def test_stable_diffusion(self) -> None:
        """Stable Diffusion from the same latents, so that only the step noise differs."""
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline)
        pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config, noise="philox")
        latents = ours.initial_latents(pipe, 7, batch_size=2)
        kwargs = {**embeddings(), "latents": latents, "eta": 1.0, "guidance_scale": 3.0}
        five, six = (images(pipe, seed=seed, **kwargs) for seed in (5, 6))
        assert abs(five - six).max() > 0.1
        assert np.array_equal(images(pipe, seed=5, **kwargs), five)

    def test_a_saved_pipeline_has_it(self, tmp_path: Path) -> None:
        pipe = unconditional(diffusers.DDPMPipeline, ours.DDPMScheduler())
        pipe.scheduler.set_noise("philox", 3)
        before = images(pipe, seed=0)
        pipe.save_pretrained(tmp_path)
        loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.scheduler._fastddim_work.seed == 3
        assert_same(before, images(loaded, seed=0))
        # DDIMPipeline makes diffusers' own scheduler of it, whose config still holds the noise.
        other = diffusers.DDIMPipeline.from_pretrained(tmp_path)
        assert type(other.scheduler) is diffusers.DDIMScheduler
        back = ours.DDIMScheduler.from_config(other.scheduler.config)
        assert back._fastddim_work.seed == 3


class TestTimesteps:
    """`pipe(timesteps=[…])`, which diffusers' own DDIM refuses."""

    VISITED = (981, 620, 333, 50)

    @staticmethod
    def run(pipe: Any, timesteps: list[int] | None, **kwargs: Any) -> np.ndarray:
        kwargs = {**embeddings(), "guidance_scale": 3.0, "output_type": "np", **kwargs}
        generator = torch.Generator().manual_seed(1)
        return np.asarray(pipe(timesteps=timesteps, generator=generator, **kwargs).images)

    def test_those_of_a_number_give_its_images(self) -> None:
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline)
        with pytest.raises(ValueError, match="does not support custom"):
            self.run(pipe, list(self.VISITED))
        pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(STEPS)
        visited = pipe.scheduler.timesteps.tolist()
        expected = self.run(pipe, None, num_inference_steps=STEPS)
        assert_same(expected, self.run(pipe, visited))
        assert abs(self.run(pipe, list(self.VISITED)) - expected).max() > 0.01

    def test_strength_leaves_out_the_first(self) -> None:
        pipe = stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)
        pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
        visited: list[int] = []
        self.run(
            pipe,
            list(self.VISITED),
            image=[picture(0), picture(1)],
            strength=0.5,
            callback_on_step_end=lambda pipe, i, t, kwargs: visited.append(int(t)) or {},
        )
        assert visited == list(self.VISITED[2:])


def transformer(pipeline: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    )
    made = pipeline(
        model, stable_diffusion(diffusers.StableDiffusionPipeline).vae, ours.DDIMScheduler()
    )
    made.set_progress_bar_config(disable=True)
    return made


class TestInitialLatents:
    def test_of_each_pipeline(self) -> None:
        """Latents are those of `fastddim.sample`, in the shape and the dtype of the model."""
        for pipe, shape in (
            (unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler()), (3, 16, 16)),
            (stable_diffusion(diffusers.StableDiffusionPipeline), (4, 8, 8)),
            (transformer(diffusers.DiTPipeline), (4, 8, 8)),
        ):
            one = ours.initial_latents(pipe, 7)
            assert torch.equal(one, fastddim.philox.initial_latents((1, *shape), 7))
            many = ours.initial_latents(pipe, 7, batch_size=3)
            assert torch.equal(many, fastddim.philox.initial_latents((3, *shape), 7))
            assert torch.equal(ours.initial_latents(pipe, [5, 7])[1:], one)
            assert torch.equal(ours.initial_latents(pipe, torch.tensor([5, 7]))[1:], one)
            assert not torch.equal(ours.initial_latents(pipe), ours.initial_latents(pipe))

    def test_of_other_sizes_and_dtypes(self) -> None:
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline).to(torch.bfloat16)
        latents = ours.initial_latents(pipe, 7, height=32, width=48)
        expected = fastddim.philox.initial_latents((1, 4, 16, 24), 7, dtype=torch.bfloat16)
        assert latents.dtype == torch.bfloat16
        assert torch.equal(latents, expected)

    def test_a_pipeline_starts_from_them(self) -> None:
        """A pipeline starts from the latents that `fastddim.sample` starts from, with the same
        noise.
        """
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline)
        config = {**pipe.scheduler.config, "set_alpha_to_one": True}
        pipe.scheduler = ours.DDIMScheduler.from_config(config, noise="philox", seed=7)
        x_T = ours.initial_latents(pipe, 7, batch_size=2)
        given = embeddings()
        result = pipe(
            **given,
            latents=x_T,
            eta=1.0,
            guidance_scale=1.0,
            num_inference_steps=STEPS,
            output_type="latent",
        ).images
        expected = fastddim.sample(
            pipe.unet,
            STEPS,
            x_T=x_T,
            eta=1.0,
            seed=7,
            schedule=fastddim.Schedule.from_diffusers(pipe.scheduler),
            spacing="leading",
            steps_offset=1,
            model_kwargs={"encoder_hidden_states": given["prompt_embeds"]},
        )
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)

    def test_the_example_of_the_page(self) -> None:
        page = (Path(__file__).parents[2] / "docs/migrating.md").read_text(encoding="utf-8")
        title = 'title="images that the device does not change"'
        (code,) = re.findall(rf"```python {title}\n(.*?)```", page, re.DOTALL)
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline)
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            names = {"pipe": pipe, "inputs": {**embeddings(), "output_type": "np"}}
            exec(compile(code, "docs/migrating.md", "exec"), names)
            results.append(names["images"])
        assert results[0].shape == (2, 16, 16, 3)
        assert np.array_equal(*results), "of torch's generator"

    def test_errors(self) -> None:
        pipe = stable_diffusion(diffusers.StableDiffusionPipeline)
        with pytest.raises(ValueError, match=r"^height: expected a positive multiple of 2, got 33"):
            ours.initial_latents(pipe, 7, height=33)
        with pytest.raises(ValueError, match=r"^seed: expected one seed per sample, 3, got 2"):
            ours.initial_latents(pipe, [1, 2], batch_size=3)
        with pytest.raises(TypeError, match=r"^pipe: expected a pipeline with a unet or a trans"):
            ours.initial_latents(diffusers.DDIMScheduler(), 7)

        class OfFrames(type(pipe)):  # type: ignore[misc]
            def __call__(self, prompt: str, num_frames: int) -> None:
                raise NotImplementedError

        other = OfFrames(**pipe.components, requires_safety_checker=False)
        with pytest.raises(ValueError, match=r"^pipe: .* got a OfFrames, which takes num_frames"):
            ours.initial_latents(other, 7)


# In two processes that begin with diffusers alone; the first imports a module besides.
RELOAD = """
import importlib, json, os, sys
from diffusers import DDPMPipeline

folder, name = sys.argv[1:]
first = os.fork()
if first == 0:
    importlib.import_module(name)
else:
    os.waitpid(first, 0)
try:
    said = type(DDPMPipeline.from_pretrained(folder).scheduler).__module__
except Exception as error:
    said = str(error)
print(json.dumps(said), flush=True)
"""


def test_a_saved_pipeline_in_another_process(tmp_path: Path) -> None:
    """A saved pipeline loads in another process after the import; without it, the pipeline loads
    too, or the error says what to import.
    """
    name = "fastddim.integrations.diffusers"
    unconditional(diffusers.DDPMPipeline, ours.DDPMScheduler()).save_pretrained(tmp_path)

    command = [sys.executable, "-c", RELOAD, str(tmp_path), name]
    loaded = subprocess.run(command, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    imported, left = map(json.loads, loaded.stdout.splitlines())
    assert imported == name, loaded.stderr
    assert left == name or f"import {name} before calling `from_pretrained`" in left
