"""One step of each drop-in compared with the original's, in the same process.

Loops get a model without cost, and their time is divided by the number of steps. Noise from torch's
generator costs both the same, so it is drawn once before, and timed separately.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"

import diffusers
import pytest
import torch
from harness import case_id, compare
from torch import Tensor

import fastddim.integrations.denoising_diffusion_pytorch
import fastddim.integrations.diffusers
import fastddim.integrations.ermongroup
import fastddim.integrations.guided_diffusion
import fastddim.integrations.k_diffusion
import fastddim.integrations.latent_diffusion
import fastddim.integrations.webui

sys.path.append(str(Path(__file__).resolve().parent.parent))
peers = importlib.import_module("tests.support.dropins.peers")

RESULTS = "dropins-cpu"
SMALL, MEDIUM, LARGE = (1, 4, 64, 64), (64, 3, 64, 64), (64, 3, 256, 256)
STEPS = 10
ALPHAS = fastddim.Schedule.linear().alphas_cumprod

Run = Callable[[], Any]


@dataclass(frozen=True)
class Pair:
    """The original and the drop-in; each call takes `steps` steps and returns their results."""

    original: Run
    fastddim: Run
    steps: int = 1


class Inputs:
    """A state, a model output and noise of one shape."""

    def __init__(self, shape: tuple[int, ...], eta: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.shape, self.eta = shape, eta
        self.x, self.m, self.z = (torch.randn(shape, generator=generator) for _ in range(3))
        self.t = torch.full((shape[0],), 5)

    def model(self, *arguments: Any, **kwargs: Any) -> Tensor:
        return self.m

    def noise(self, *arguments: Any, **kwargs: Any) -> Tensor:
        return self.z

    @contextmanager
    def drawn_before(self) -> Iterator[None]:
        with (
            mock.patch.object(torch, "randn_like", self.noise),
            mock.patch.object(torch, "randn", self.noise),
        ):
            yield


def of_scheduler(name: str) -> Callable[[Inputs], Pair]:
    def make(inputs: Inputs) -> Pair:
        original = getattr(diffusers, name)(clip_sample=False)
        own = getattr(fastddim.integrations.diffusers, name).from_config(original.config)

        def run(scheduler: Any) -> Run:
            scheduler.set_timesteps(50)
            t = scheduler.timesteps[20]
            if name == "DDIMScheduler":
                z = inputs.z if inputs.eta else None
                kwargs = {"eta": inputs.eta, "variance_noise": z}
                return lambda: scheduler.step(inputs.m, t, inputs.x, **kwargs).prev_sample
            return lambda: scheduler.step(inputs.m, t, inputs.x).prev_sample

        return Pair(run(original), run(own))

    return make


def of_add_noise(inputs: Inputs) -> Pair:
    def run(module: Any) -> Run:
        scheduler = module.DDIMScheduler()
        return lambda: scheduler.add_noise(inputs.x, inputs.z, inputs.t)

    return Pair(run(diffusers), run(fastddim.integrations.diffusers))


def of_ermongroup(name: str) -> Callable[[Inputs], Pair]:
    def make(inputs: Inputs) -> Pair:
        written_out = importlib.import_module("tests.support.dropins.ermongroup")
        original = getattr(written_out, f"peer_{name.partition('_')[0]}")
        own = getattr(fastddim.integrations.ermongroup, name)
        seq, b = list(range(0, 1000, 1000 // STEPS)), torch.linspace(1e-4, 0.02, 1000)
        kwargs = {} if name == "ddpm_steps" else {"eta": inputs.eta}

        def run(steps: Any) -> Run:
            return lambda: steps(inputs.x, seq, inputs.model, b, **kwargs)[0][-1]

        return Pair(run(original), run(own), STEPS)

    return make


def of_guided_diffusion(inputs: Inputs) -> Pair:
    module = peers.guided_diffusion()

    def make() -> Any:
        return module.GaussianDiffusion(
            betas=module.get_named_beta_schedule("linear", 1000),
            model_mean_type=module.ModelMeanType.EPSILON,
            model_var_type=module.ModelVarType.FIXED_LARGE,
            loss_type=module.LossType.MSE,
        )

    original, own = make(), make()
    fastddim.integrations.guided_diffusion.install(own)

    def run(diffusion: Any) -> Run:
        return lambda: diffusion.ddim_sample(inputs.model, inputs.x, inputs.t, eta=inputs.eta)[
            "sample"
        ]

    return Pair(run(original), run(own))


def of_latent_diffusion(guided: bool) -> Callable[[Inputs], Pair]:
    def make(inputs: Inputs) -> Pair:
        alphas = ALPHAS.float()
        doubled = torch.cat([inputs.m, inputs.m * 0.5])
        model = SimpleNamespace(
            num_timesteps=1000,
            alphas_cumprod=alphas,
            alphas_cumprod_prev=torch.cat([torch.ones(1), alphas[:-1]]),
            betas=torch.linspace(1e-4, 0.02, 1000),
            sqrt_one_minus_alphas_cumprod=(1 - alphas).sqrt(),
            device=torch.device("cpu"),
            parameterization="eps",
            apply_model=lambda x, t, c: doubled if guided else inputs.m,
        )
        condition = torch.zeros(inputs.shape[0], 1)
        kwargs = {}
        if guided:
            kwargs = {
                "unconditional_guidance_scale": 7.5,
                "unconditional_conditioning": condition,
            }

        def run(sampler: Any) -> Run:
            sampler.make_schedule(50, ddim_eta=inputs.eta, verbose=False)
            return lambda: sampler.p_sample_ddim(inputs.x, condition, inputs.t, index=20, **kwargs)[
                0
            ]

        original, own = (peers.ldm_ddim().DDIMSampler(model) for _ in range(2))
        fastddim.integrations.latent_diffusion.install(own)
        return Pair(run(original), run(own))

    return make


def of_lucidrains(inputs: Inputs) -> Pair:
    module, _ = peers.lucidrains()
    model = torch.nn.Identity()
    model.forward = inputs.model
    model.channels = model.out_dim = inputs.shape[1]
    model.self_condition = model.random_or_learned_sinusoidal_cond = False
    diffusion = module.GaussianDiffusion(
        model,
        image_size=inputs.shape[-1],
        objective="pred_noise",
        sampling_timesteps=STEPS,
        ddim_sampling_eta=inputs.eta,
    )
    own = fastddim.integrations.denoising_diffusion_pytorch.ddim_sample
    return Pair(
        lambda: diffusion.ddim_sample(inputs.shape),
        lambda: own(diffusion, inputs.shape),
        STEPS,
    )


def of_k_diffusion(inputs: Inputs) -> Pair:
    module = peers.k_diffusion_sampling()
    own = fastddim.integrations.k_diffusion.sample_ddim
    sigmas = torch.cat([torch.linspace(80, 0.1, STEPS), torch.zeros(1)])
    arguments = (inputs.model, inputs.x, sigmas)
    kwargs: dict[str, Any] = {"disable": True}
    if inputs.eta:
        kwargs |= {"eta": inputs.eta, "noise_sampler": lambda *sigmas: inputs.z}
        return Pair(
            lambda: module.sample_euler_ancestral(*arguments, **kwargs),
            lambda: own(*arguments, **kwargs),
            STEPS,
        )
    return Pair(
        lambda: module.sample_euler(*arguments, **kwargs), lambda: own(*arguments, **kwargs), STEPS
    )


def of_webui(inputs: Inputs) -> Pair:
    written_out = importlib.import_module("tests.support.dropins.webui")

    class Model:
        inner_model = SimpleNamespace(inner_model=SimpleNamespace(alphas_cumprod=ALPHAS.float()))

        def __call__(self, *arguments: Any, **kwargs: Any) -> Tensor:
            return inputs.m

    model = Model()
    timesteps = torch.arange(1, 1000, 1000 // STEPS)
    arguments = (model, inputs.x, timesteps)
    kwargs = {"disable": True, "eta": inputs.eta}
    return Pair(
        lambda: written_out.peer_webui(*arguments, **kwargs),
        lambda: fastddim.integrations.webui.ddim(*arguments, **kwargs),
        len(timesteps) - 1,
    )


DROPINS: dict[str, tuple[Callable[[Inputs], Pair], tuple[Any, ...], tuple[float, ...]]] = {
    "diffusers DDIMScheduler.step": (
        of_scheduler("DDIMScheduler"),
        (SMALL, MEDIUM, LARGE),
        (0.0, 1.0),
    ),
    "diffusers DDPMScheduler.step": (of_scheduler("DDPMScheduler"), (SMALL, MEDIUM), (1.0,)),
    "diffusers DDIMInverseScheduler.step": (
        of_scheduler("DDIMInverseScheduler"),
        (SMALL, MEDIUM),
        (0.0,),
    ),
    "diffusers DDIMScheduler.add_noise": (of_add_noise, (SMALL, MEDIUM), (0.0,)),
    "ermongroup generalized_steps": (
        of_ermongroup("generalized_steps"),
        (SMALL, MEDIUM),
        (0.0, 1.0),
    ),
    "ermongroup ddpm_steps": (of_ermongroup("ddpm_steps"), (SMALL, MEDIUM), (1.0,)),
    "guided-diffusion ddim_sample": (of_guided_diffusion, (SMALL, MEDIUM), (0.0, 1.0)),
    "latent-diffusion p_sample_ddim": (of_latent_diffusion(False), (SMALL, MEDIUM), (0.0, 1.0)),
    "latent-diffusion p_sample_ddim, guided": (of_latent_diffusion(True), (SMALL, MEDIUM), (0.0,)),
    "lucidrains ddim_sample": (of_lucidrains, (SMALL, MEDIUM), (0.0, 1.0)),
    "k-diffusion sample_euler(_ancestral)": (of_k_diffusion, (SMALL, MEDIUM), (0.0, 1.0)),
    "webui ddim": (of_webui, (SMALL, MEDIUM), (0.0, 1.0)),
}

CASES = [
    (name, shape, eta)
    for name, (_, shapes, etas) in DROPINS.items()
    for shape in shapes
    for eta in etas
]


@pytest.mark.parametrize(
    ("name", "shape", "eta"),
    CASES,
    ids=[case_id(n, shape, f"eta{eta:g}") for n, shape, eta in CASES],
)
def test_dropin(
    name: str, shape: tuple[int, ...], eta: float, rows: list[dict[str, Any]], benchmark: Any
) -> None:
    torch.set_num_threads(2)
    inputs = Inputs(shape, eta)
    with inputs.drawn_before():
        pair = DROPINS[name][0](inputs)
        expected, got = pair.original(), pair.fastddim()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        del expected, got
        timings = compare({"original": pair.original, "fastddim": pair.fastddim}, "fastddim")
    draw = compare({"draw": lambda: torch.randn(shape)}, "draw", budget=0.3)
    rows.append(
        {
            "case": name,
            "eta": eta,
            "shape": shape,
            "steps": pair.steps,
            "timings": {n: asdict(timing) for n, timing in {**timings, **draw}.items()},
        }
    )
    benchmark.extra_info["speedup"] = timings["original"].ratio
    with inputs.drawn_before():
        benchmark.pedantic(pair.fastddim, rounds=5, iterations=3, warmup_rounds=1)
