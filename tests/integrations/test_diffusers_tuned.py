"""Tuned steps through the schedulers of diffusers: the samples of `fastddim.sample`."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import Schedule, TunedSteps

from ..support.dropins.diffusers import DDIM, diffusers, ours
from ..support.models import elementwise_model
from ..support.tuned import random_steps

SHAPE = (2, 3, 4, 5)
FREE = {"clip_sample": False}

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "free": (FREE, {}),
    "clip": ({"clip_sample": True, "clip_sample_range": 0.8}, {"clip": 0.8}),
    "rederived": ({"clip_sample": True}, {"clip": 1.0, "rederive_eps": True}),
    "threshold": (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7},
        {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7},
    ),
    "v": (
        {**FREE, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
        {"prediction": "v_prediction"},
    ),
    "sample": ({**FREE, "prediction_type": "sample"}, {"prediction": "sample"}),
    "zero SNR": (
        {**FREE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction": "v_prediction"},
    ),
}


def scheduler_of(config: dict[str, Any], name: str = "DDIMScheduler", **options: Any) -> Any:
    theirs = getattr(diffusers, name)(**config)
    return getattr(ours, name).from_config(theirs.config, **options)


def drawn(scheduler: Any, x: Tensor, model: Any = elementwise_model, **options: Any) -> Tensor:
    """The loop of a pipeline."""
    scheduler.set_timesteps(len(scheduler.config["_fastddim_tuned"]["timesteps"]))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def steps_for(schedule: Schedule, S: int = 5, **options: Any) -> TunedSteps:
    return random_steps(S, schedule=schedule, **options)


class TestSamples:
    @pytest.mark.parametrize("name", DDIM)
    @pytest.mark.parametrize("exact", [False, True])
    @pytest.mark.parametrize("case", CONFIGS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_they_are_those_of_sample(self, case, exact, name, dtype):
        """The samples are those of `sample`, tuned for ᾱ of the scheduler or for ᾱ of its config in
        float64.
        """
        config, options = CONFIGS[case]
        theirs = getattr(diffusers, name)(**config)
        schedule = Schedule.from_diffusers(theirs.config if exact else theirs)
        tuned = steps_for(schedule, **options)
        scheduler = scheduler_of(config, name, tuned=tuned)
        x_T = torch.randn(SHAPE).to(dtype)
        rederive = {"use_clipped_model_output": True} if options.get("rederive_eps") else {}
        expected = fastddim.sample(elementwise_model, tuned, schedule=schedule, x_T=x_T, **options)
        assert torch.equal(drawn(scheduler, x_T, **rederive), expected)
        assert torch.equal(drawn(scheduler, x_T, **rederive), expected), "again"

    def test_predicted_samples_and_tuples(self):
        tuned = random_steps(3, schedule=Schedule.linear())
        scheduler = scheduler_of(FREE, tuned=tuned)
        x = torch.randn(SHAPE)
        wanted: list[Tensor] = []
        fastddim.sample(
            elementwise_model, tuned, x_T=x, callback=lambda s, t, x_t, x_0: wanted.append(x_0)
        )
        scheduler.set_timesteps(3)
        for t, expected in zip(scheduler.timesteps.tolist(), wanted, strict=True):
            m = elementwise_model(x, torch.full((2,), t))
            x, x_0 = scheduler.step(m, t, x, return_dict=False)
            assert torch.equal(x_0, expected)

    def test_large_samples(self):
        tuned, x_T = random_steps(3), torch.randn(1, 3, 512, 512)
        expected = fastddim.sample(elementwise_model, tuned, x_T=x_T)
        assert torch.equal(drawn(scheduler_of(FREE, tuned=tuned), x_T), expected)

    def test_in_inference_mode_and_out_of_it(self):
        tuned, x_T = random_steps(4), torch.randn(SHAPE)
        scheduler = scheduler_of(FREE, tuned=tuned)
        with torch.inference_mode():
            inside = drawn(scheduler, x_T)
        assert torch.equal(drawn(scheduler, x_T), inside)

    def test_a_copy_goes_on_by_itself(self):
        tuned, x = random_steps(4), torch.randn(SHAPE)
        expected = fastddim.sample(elementwise_model, tuned, x_T=x)
        scheduler = scheduler_of(FREE, tuned=tuned)
        scheduler.set_timesteps(4)
        for s, t in enumerate(tuned.timesteps):
            if s == 2:
                scheduler, other = copy.deepcopy(scheduler), scheduler
                drawn(other, torch.randn(SHAPE))
            x = scheduler.step(elementwise_model(x, torch.full((2,), t)), t, x).prev_sample
        assert torch.equal(x, expected)

    def test_a_pipeline(self):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ).eval()
        tuned = random_steps(3, clip=1.0)
        pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config, tuned=tuned)
        given = {"num_inference_steps": 3, "output_type": "np"}
        image = pipe(generator=torch.manual_seed(4), **given).images
        x_T = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(4))
        with torch.no_grad():
            x = fastddim.sample(unet, tuned, x_T=x_T, clip=1.0)
        expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert (image == expected).all()


class TestConfig:
    @staticmethod
    def same(scheduler: Any, tuned: TunedSteps) -> None:
        x_T = torch.randn(SHAPE)
        expected = fastddim.sample(elementwise_model, tuned, x_T=x_T)
        assert torch.equal(drawn(scheduler, x_T), expected)

    def test_a_saved_scheduler_has_them(self, tmp_path, caplog):
        tuned = random_steps(5)
        scheduler_of(FREE, tuned=tuned).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert TunedSteps.from_dict(content["_fastddim_tuned"]) == tuned
        self.same(ours.DDIMScheduler.from_pretrained(tmp_path), tuned)
        # diffusers' own takes no notice, and carries them along.
        theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path)
        self.same(ours.DDIMScheduler.from_config(theirs.config), tuned)
        other = diffusers.DPMSolverMultistepScheduler.from_config(theirs.config)
        self.same(ours.DDIMScheduler.from_config(other.config, clip_sample=False), tuned)

    def test_a_saved_pipeline_has_them(self, tmp_path):
        tuned = random_steps(5)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
        pipe = diffusers.DDPMPipeline(unet, scheduler_of(FREE, tuned=tuned))
        pipe.save_pretrained(tmp_path)
        self.same(diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler, tuned)
        # This pipeline converts its scheduler to diffusers' own.
        pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path)
        self.same(ours.DDIMScheduler.from_config(pipe.scheduler.config), tuned)

    def test_a_file(self, tmp_path):
        tuned = random_steps(5)
        tuned.save(tmp_path / "steps.json")
        for path in (tmp_path / "steps.json", str(tmp_path / "steps.json")):
            self.same(scheduler_of(FREE, tuned=path), tuned)

    def test_a_pickle(self):
        tuned = random_steps(5)
        self.same(pickle.loads(pickle.dumps(scheduler_of(FREE, tuned=tuned))), tuned)

    def test_they_can_be_set_and_taken_away(self):
        tuned, x, plain = random_steps(5), torch.randn(SHAPE), scheduler_of(FREE)
        scheduler = scheduler_of(FREE)
        assert "_fastddim_tuned" not in scheduler.config
        for steps in (tuned, random_steps(5, seed=1)):
            scheduler.set_tuned(steps)
            self.same(scheduler, steps)
        scheduler.set_tuned(None)
        for each in (plain, scheduler, ours.DDIMScheduler.from_config(scheduler.config)):
            each.set_timesteps(7)
            m = elementwise_model(x, torch.full((2,), 3))
            assert each.timesteps.tolist() == plain.timesteps.tolist()
            expected = plain.step(m, plain.timesteps[0], x).prev_sample
            assert torch.equal(each.step(m, each.timesteps[0], x).prev_sample, expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({}, r"steps: expected clip None, for which they were tuned, got 1.0"),
            ({**FREE, "prediction_type": "sample"}, r"expected prediction 'epsilon', .*'sample'"),
            ({**FREE, "beta_end": 0.03}, r"steps: expected the schedule for which they were tuned"),
            ({**FREE, "num_train_timesteps": 999}, r"expected the schedule .* T = 1000 .* T = 999"),
            ({**FREE, "thresholding": True}, r"expected dynamic_thresholding_ratio None, .*0.995"),
        ],
    )
    def test_another_config(self, config, message):
        with pytest.raises(ValueError, match=message):
            scheduler_of(config, tuned=random_steps(5))

    def test_another_alphas_cumprod_than_that_of_the_config(self):
        scheduler = scheduler_of(FREE)
        scheduler.alphas_cumprod = Schedule.cosine().alphas_cumprod.float()
        with pytest.raises(ValueError, match=r"steps: expected the schedule for which they were"):
            scheduler.set_tuned(random_steps(5))

    def test_guidance_is_not_asked_for(self):
        scheduler_of(FREE, tuned=random_steps(5, guidance_scale=7.5, guidance_rescale=0.7))

    def test_another_number_of_steps(self):
        scheduler = scheduler_of(FREE, tuned=random_steps(5))
        message = r"^num_inference_steps: expected 5, the number of the tuned steps, got 50$"
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(50)

    def test_before_set_timesteps(self):
        scheduler = scheduler_of(FREE, tuned=random_steps(5))
        x = torch.randn(SHAPE)
        with pytest.raises(ValueError, match=r"^num_inference_steps: expected set_timesteps to be"):
            scheduler.step(x, 3, x)

    def test_arguments_of_a_step(self):
        tuned, x = random_steps(5), torch.randn(SHAPE)
        scheduler = scheduler_of(FREE, tuned=tuned)
        scheduler.set_timesteps(5)
        first, second, third = tuned.timesteps[:3]
        with pytest.raises(ValueError, match=r"^eta: expected 0 with tuned steps.*got 0.5"):
            scheduler.step(x, first, x, eta=0.5)
        with pytest.raises(ValueError, match=r"rederive_eps False, for which .*got True"):
            scheduler.step(x, first, x, use_clipped_model_output=True)
        with pytest.raises(ValueError, match=r"^sample: expected a floating-point tensor shaped"):
            scheduler.step(x, first, x[:1])
        with pytest.raises(RuntimeError, match=r"^epsilon: .* not differentiable"):
            scheduler.step(x, first, x.clone().requires_grad_())
        for t in (second, 1):
            with pytest.raises(ValueError, match=rf"^timestep: expected {first}, since .*got {t}"):
                scheduler.step(x, t, x)
        scheduler.step(x, first, x)
        message = rf"^timestep: expected {first} or {second}, since .*got {third}"
        with pytest.raises(ValueError, match=message):
            scheduler.step(x, third, x)
        with pytest.raises(ValueError, match=r"^sample: expected \(2, 3, 4, 5\), torch.float32"):
            scheduler.step(x[:1], second, x[:1])
        scheduler.step(x, second, x)

    def test_what_is_none(self):
        with pytest.raises(TypeError, match=r"^tuned: expected TunedSteps or a path, got int"):
            scheduler_of(FREE, tuned=3)

    @pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMInverseScheduler"])
    def test_other_schedulers(self, name):
        with pytest.raises(ValueError, match=rf"^tuned: expected None for {name}, got TunedSteps"):
            scheduler_of({}, name, tuned=random_steps(5))

    def test_many_timesteps_at_once(self):
        scheduler = scheduler_of(FREE, "DDIMParallelScheduler", tuned=random_steps(5))
        x = torch.randn(SHAPE)
        with pytest.raises(ValueError, match=r"^tuned: expected None for batch_step_no_noise"):
            scheduler.batch_step_no_noise(x, torch.tensor([5, 3]), x)

    def test_a_config_that_was_changed_later(self):
        tuned, x = random_steps(5), torch.randn(SHAPE)
        scheduler = scheduler_of(FREE, tuned=replace(tuned))
        scheduler.set_timesteps(5)
        scheduler.register_to_config(clip_sample=True)
        with pytest.raises(ValueError, match=r"expected clip None, for which .*got 1.0"):
            scheduler.step(x, tuned.timesteps[0], x)

    def test_a_config_that_was_broken(self, tmp_path: Path):
        scheduler_of(FREE, tuned=random_steps(5)).save_pretrained(tmp_path)
        file = tmp_path / "scheduler_config.json"
        content = json.loads(file.read_text())
        content["_fastddim_tuned"]["history"] = [1]
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"^history: expected one value a step, 5, got 1"):
            ours.DDIMScheduler.from_pretrained(tmp_path)
