"""docs/migrating.md: the code before and the code after give the same numbers."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch

import fastddim

from ..support.dropins.diffusion_policy import make as make_diffusion_policy
from ..support.dropins.diffusion_policy import observation
from ..support.dropins.ermongroup import LINEAR as BETAS
from ..support.dropins.ermongroup import model as ermongroup_model
from ..support.dropins.ermongroup import peer_ddpm, peer_generalized
from ..support.dropins.guided_diffusion import Model as GuidedModel
from ..support.dropins.guided_diffusion import make as make_guided
from ..support.dropins.k_diffusion import LINEAR, denoiser, levels
from ..support.dropins.latent_diffusion import Latent
from ..support.dropins.lerobot import make_policy as make_lerobot_policy
from ..support.dropins.lerobot import observations
from ..support.dropins.lucidrains import Model as LucidrainsModel
from ..support.dropins.peers import (
    TOLERANCE,
    assert_same,
    k_diffusion_sampling,
    ldm_ddim,
    lucidrains,
    modules_named,
    same_draws,
)
from ..support.dropins.webui import WebuiModel, peer_webui
from ..support.optional import optional

diffusers = optional("diffusers")

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def code(section: str, title: str) -> str:
    (block,) = re.findall(rf'```python title="{title}"\n(.*?)```', SECTIONS[section], re.DOTALL)
    return block


def subclass(kind: type) -> type:
    """A subclass that the page's code may change."""
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


def a_policy_of_lerobot():
    policy = make_lerobot_policy(num_inference_steps=5)
    return {"policy": policy, "observation": next(observations(policy, 2))}, {}


def a_diffusion_policy():
    scheduler = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    policy = make_diffusion_policy("inpainting", scheduler).requires_grad_(False)
    return {"policy": policy, "obs_dict": observation(0)}, {}


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
    "LeRobot": (a_policy_of_lerobot, "action"),
    "real-stanford/diffusion_policy": (a_diffusion_policy, "action"),
    "A loop of your own": (a_loop, "x"),
}


def test_every_section_is_run():
    assert list(SECTIONS) == [*CASES, "Where to go on"]


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


def noise_of(x, steps, seed=5):
    """The noise of a loop that calls `randn_like` at every step."""
    torch.manual_seed(seed)
    noise = torch.stack([torch.randn_like(x) for _ in range(steps)])
    torch.manual_seed(seed)
    return noise


class TestAsSample:
    """Calls of peers as the page writes them by `fastddim.sample`."""

    @pytest.mark.parametrize("offset", [0, 1])
    def test_diffusers(self, offset):
        scheduler = diffusers.DDIMScheduler(steps_offset=offset)
        model = fastddim.models.load("digits")
        scheduler.set_timesteps(10)
        x = x_T = torch.randn(2, 1, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(2)), t, x).prev_sample
        own = fastddim.sample(
            model,
            10,
            x_T=x_T,
            spacing="leading",
            steps_offset=offset,
            schedule=fastddim.Schedule.from_diffusers(scheduler),
            prediction=scheduler.config.prediction_type,
            clip=1.0,
        )
        assert_same(own, x, 1e-4)

    @pytest.mark.parametrize(
        ("peer", "options"),
        [
            (lambda *run: peer_generalized(*run, eta=0.5), {"eta": 0.5}),
            (peer_ddpm, {"eta": 1, "variance": "large", "clip": 1.0, "rederive_eps": True}),
        ],
    )
    def test_ermongroup(self, peer, options):
        x, seq = torch.randn(2, 3, 5, 5, dtype=torch.float64), range(0, 1000, 100)
        noise = noise_of(x, 10)
        expected, _ = peer(x, seq, ermongroup_model, BETAS)
        own = fastddim.sample(
            lambda x, t: ermongroup_model(x, t.float()),
            10,
            x_T=x,
            noise=noise,
            spacing="uniform",
            schedule=fastddim.Schedule.from_betas(BETAS),
            **options,
        )
        assert_same(own, expected[-1], 1e-10)

    def test_guided_diffusion(self):
        diffusion, model = make_guided(), GuidedModel().double()
        whole = make_guided(spaced=None)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        own = fastddim.sample(
            model,
            diffusion.timestep_map[::-1],
            x_T=x,
            schedule=fastddim.Schedule.from_betas(whole.betas),
            clip=1.0,
            rederive_eps=True,
        )
        # The peer rounds its coefficients to float32.
        assert_same(own, diffusion.ddim_sample_loop(model, x.shape, noise=x), 1e-5)

    def test_lucidrains(self):
        peer, _ = lucidrains()
        model = LucidrainsModel().double()
        options = {"image_size": 8, "timesteps": 100, "sampling_timesteps": 7}
        diffusion = peer.GaussianDiffusion(model, **options).double()
        assert diffusion.objective == "pred_v"
        torch.manual_seed(5)
        x = torch.randn(2, 2, 8, 8)
        torch.manual_seed(5)
        expected = diffusion.ddim_sample((2, 2, 8, 8))
        own = fastddim.sample(
            model,
            torch.linspace(-1, 99, 8).int().tolist()[:0:-1],
            x_T=x.double(),
            schedule=fastddim.Schedule.from_betas(diffusion.betas),
            prediction="v_prediction",
            clip=1.0,
            rederive_eps=True,
        )
        assert_same((own + 1) / 2, expected.double(), 1e-5)
