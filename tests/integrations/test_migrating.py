"""docs/migrating.md: what stands there before and after gives the same numbers."""

from __future__ import annotations

import re
import types
from pathlib import Path

import diffusers
import pytest
import torch

import fastddim

from .peers import (
    TOLERANCE,
    assert_same,
    k_diffusion_sampling,
    ldm_ddim,
    lucidrains,
    modules_named,
    same_draws,
)
from .test_denoising_diffusion_pytorch import Model as LucidrainsModel
from .test_ermongroup import LINEAR as BETAS
from .test_ermongroup import model as ermongroup_model
from .test_ermongroup import peer_ddpm, peer_generalized
from .test_guided_diffusion import Model as GuidedModel
from .test_guided_diffusion import make as make_guided
from .test_k_diffusion import LINEAR, WebuiModel, denoiser, levels, peer_webui
from .test_latent_diffusion import Latent

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def code(section: str, title: str) -> str:
    (block,) = re.findall(rf'```python title="{title}"\n(.*?)```', SECTIONS[section], re.DOTALL)
    return block


def subclass(kind: type) -> type:
    """One that the page's code may change."""
    return type(kind.__name__, (kind,), {})


def module(**names):
    return types.SimpleNamespace(__path__=[], **names)


def a_pipeline():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return {"pipe": pipe, "DDIMScheduler": diffusers.DDIMScheduler}, {}


def a_repository_of_ermongroup():
    x = torch.randn(2, 3, 5, 5)
    names = {"x": x, "model": ermongroup_model, "betas": BETAS.float()}
    denoising = module(generalized_steps=peer_generalized, ddpm_steps=peer_ddpm)
    return names, {"functions": module(denoising=denoising), "functions.denoising": denoising}


def a_guided_diffusion():
    return {"diffusion": make_guided(), "model": GuidedModel()}, {}


def a_latent_diffusion():
    kind = subclass(ldm_ddim().DDIMSampler)
    names = ("ldm", "ldm.models", "ldm.models.diffusion", "ldm.models.diffusion.ddim")
    modules = {name: module() for name in names[:-1]} | {names[-1]: module(DDIMSampler=kind)}
    return {"model": Latent(), "c": torch.randn(2)}, modules


def a_diffusion_of_lucidrains():
    peer, _ = lucidrains()
    package = module(GaussianDiffusion=subclass(peer.GaussianDiffusion))
    return {"model": LucidrainsModel()}, {"denoising_diffusion_pytorch": package}


def a_denoiser():
    sigmas = levels(torch.float32)
    names = {"model": denoiser, "x": torch.randn(2, 3, 5, 5) * sigmas[0], "sigmas": sigmas}
    sampling = k_diffusion_sampling()
    return names, {"k_diffusion": module(sampling=sampling), "k_diffusion.sampling": sampling}


def a_webui():
    timesteps = torch.arange(1, 1000, 100)
    names = {"model": WebuiModel(LINEAR.float()), "x": torch.randn(2, 4, 8, 8)}
    impl = module(ddim=peer_webui)
    modules = {"modules": module(sd_samplers_timesteps_impl=impl)}
    return names | {"timesteps": timesteps}, modules | {"modules.sd_samplers_timesteps_impl": impl}


def a_loop():
    model = fastddim.models.load("digits")
    return {
        "torch": torch,
        "model": model,
        "x": torch.randn(2, 1, 8, 8),
        "eta": 0.5,
        "timesteps": list(range(900, -1, -100)),
        "alphas_cumprod": model.schedule.alphas_cumprod,
    }, {}


# What there is before, and the name of the result.
CASES = {
    "diffusers": (a_pipeline, "images"),
    "ermongroup/ddim": (a_repository_of_ermongroup, "xs"),
    "guided-diffusion, improved-diffusion": (a_guided_diffusion, "sample"),
    "latent-diffusion, Stable Diffusion": (a_latent_diffusion, "samples"),
    "lucidrains' denoising-diffusion-pytorch": (a_diffusion_of_lucidrains, "images"),
    "k-diffusion": (a_denoiser, "x_0"),
    "AUTOMATIC1111's stable-diffusion-webui": (a_webui, "image"),
    "A loop of your own": (a_loop, "x"),
}


def test_every_section_is_run():
    assert list(SECTIONS) == list(CASES)


# The peer's own, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("section", CASES)
def test_before_and_after_agree(section):
    prepare, result = CASES[section]

    def run(title):
        torch.manual_seed(3)
        names, modules = prepare()
        torch.manual_seed(4)
        with modules_named(modules):
            exec(compile(code(section, title), f"{section}: {title}", "exec"), names)
        value = names[result]
        return value if isinstance(value, torch.Tensor | list) else torch.from_numpy(value)

    own, expected = same_draws(lambda: run("after"), lambda: run("before"))
    assert_same(own, expected, 10 * TOLERANCE[torch.float32])
