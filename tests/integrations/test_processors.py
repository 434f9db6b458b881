"""Drop-ins give their originals' numbers where those cancel, on any processor.

At η = 1 from nearly pure noise 1 − ᾱ_prev − σ² is of the size of its rounding, and its root turns a
last bit of float32 into 3e-4. So the originals are followed to the last bit: on this processor, and
on two whose vector library rounds differently.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar
from torch import Tensor

from fastddim.integrations import denoising_diffusion_pytorch as lucidrains
from fastddim.integrations import ermongroup, k_diffusion, webui

from ..support.dropins import latent_diffusion as of_ldm
from ..support.dropins import lucidrains as of_lucidrains
from ..support.dropins.diffusers import DDIM, assert_alike, pair
from ..support.dropins.ermongroup import peer_ddpm, peer_generalized
from ..support.dropins.guided_diffusion import fast as guided_fast
from ..support.dropins.peers import assert_same, guided_diffusion, k_diffusion_sampling, same_draws
from ..support.dropins.webui import WebuiModel, peer_webui
from ..support.probes import OtherProcessor

SHAPE = (3, 2, 5, 4)
# Some roundings of float32 numbers up to 10, far below the 3e-4.
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.parametrize(
        "processor",
        [contextlib.nullcontext, OtherProcessor, lambda: OtherProcessor(shortest=1)],
        ids=["this", "of other vectors", "of other roots"],
    ),
    # ldm's own, with NumPy 2.
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]


def model(x: Tensor, t: Any, *_: Any, **__: Any) -> Tensor:
    return torch.tanh(x) * 0.7


def cosine(count: int = 1000) -> Tensor:
    """β of the squared cosine: the last ᾱ of 1000 is 2e-9."""
    betas: Tensor = betas_for_alpha_bar(count)
    return betas


@pytest.mark.parametrize("name", DDIM)
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_diffusers_ddim(name: str, prediction: str, processor: Any) -> None:
    for spacing, steps in itertools.product(("linspace", "trailing"), (2, 20)):
        theirs, own = pair(
            name,
            steps,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction,
            timestep_spacing=spacing,
            clip_sample=False,
        )
        x, m, z = torch.randn(3, *SHAPE).unbind()
        compared = 0
        # From nearly pure noise, and at the end.
        timesteps = theirs.timesteps.tolist()
        chosen = [*timesteps[:4], *timesteps[4:][-2:]]
        for t, eta in itertools.product(chosen, (0.5, 1.0)):
            with processor():
                expected, got = (s.step(m, t, x, eta, variance_noise=z) for s in (theirs, own))
            assert got.prev_sample.isfinite().all()
            # Where rounding alone takes the difference below 0, diffusers gives NaN.
            if expected.prev_sample.isfinite().all():
                assert_alike(expected, got, TOLERANCE)
                compared += 1
        assert compared >= 2 * len(chosen) - 2


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_diffusers_ddpm(variance: str, processor: Any) -> None:
    theirs, own = pair(
        "DDPMScheduler",
        20,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type=variance,
        clip_sample=False,
    )
    x, m = torch.randn(2, *SHAPE).unbind()
    for t in theirs.timesteps.tolist():
        with processor():
            expected, got = (
                s.step(m, t, x, generator=torch.Generator().manual_seed(1)) for s in (theirs, own)
            )
        assert_alike(expected, got, TOLERANCE)


@pytest.mark.parametrize("objective", ["pred_x0", "pred_v"])
def test_lucidrains(objective: str, processor: Any) -> None:
    # Loops are short, since the model magnifies a rounding from step to step. Some are NaN in both.
    for steps in (2, 5, 8):
        diffusion = of_lucidrains.make(
            torch.float32,
            objective=objective,
            timesteps=1000,
            beta_schedule="cosine",
            ddim_sampling_eta=1.0,
            sampling_timesteps=steps,
        )
        with processor():
            of_lucidrains.compare(diffusion, lucidrains.ddim_sample, SHAPE, tolerance=TOLERANCE)


def test_guided_diffusion(processor: Any) -> None:
    peer = guided_diffusion()
    diffusion = peer.SpacedDiffusion(
        peer.space_timesteps(1000, "20"),
        betas=cosine().double().numpy(),
        model_mean_type=peer.ModelMeanType.START_X,
        model_var_type=peer.ModelVarType.FIXED_SMALL,
        loss_type=peer.LossType.MSE,
    )
    x, t = torch.randn(SHAPE), torch.tensor([19, 18, 3])
    with processor():
        own, expected = same_draws(*[
            lambda d=d: d.ddim_sample(model, x, t, clip_denoised=False, eta=1.0)
            for d in (guided_fast(diffusion), diffusion)
        ])  # fmt: skip
    assert_same(own, expected, TOLERANCE)


@pytest.mark.parametrize("parameterization", ["v", "eps"])
def test_latent_diffusion(
    parameterization: str, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphas = (1 - cosine(of_ldm.T).double()).cumprod(0)
    for original, eta in itertools.product((False, True), (0.5, 1.0)):
        latent = of_ldm.Latent(parameterization)
        latent.alphas_cumprod = alphas.float()
        latent.alphas_cumprod_prev = torch.cat([torch.ones(1), latent.alphas_cumprod[:-1]])
        latent.sqrt_alphas_cumprod = alphas.sqrt().float()
        latent.sqrt_one_minus_alphas_cumprod = (1 - alphas).sqrt().float()
        monkeypatch.setattr(of_ldm, "Latent", lambda *_, latent=latent: latent)
        sampler = of_ldm.make(parameterization, steps=5, eta=eta)
        last = of_ldm.T - 1 if original else 4
        for batch, index in itertools.product((1, 3), (last, 1)):
            step = index if original else int(sampler.ddim_timesteps[index])
            x, t = torch.randn(batch, *SHAPE[1:]), torch.full((batch,), step)
            with processor():
                of_ldm.compare(
                    sampler,
                    lambda s: of_ldm.scaled(
                        s,
                        s.p_sample_ddim(
                            x,  # noqa: B023
                            torch.zeros(1),
                            t,  # noqa: B023
                            index,  # noqa: B023
                            use_original_steps=original,  # noqa: B023
                        ),
                        index,  # noqa: B023
                        original,  # noqa: B023
                    ),
                    TOLERANCE,
                )


@pytest.mark.parametrize("batch", [1, 3])
def test_ermongroup(batch: int, processor: Any) -> None:
    x, b, seq = torch.randn(batch, 2, 5), torch.linspace(1e-4, 0.02, 1000), [0, 200, 500, 999]
    for run, peer, kwargs in (
        (ermongroup.generalized_steps, peer_generalized, {"eta": 1.0}),
        (ermongroup.ddpm_steps, peer_ddpm, {}),
    ):
        with processor():
            own, expected = same_draws(
                lambda: run(x, seq, model, b, **kwargs),  # noqa: B023
                lambda: peer(x, seq, model, b, **kwargs),  # noqa: B023
            )
        assert_same(own, expected, TOLERANCE)


def test_k_diffusion(processor: Any) -> None:
    sigmas = torch.tensor([10.0, 3.0, 2.99, 0.05, 0.0])
    x = torch.randn(SHAPE) * sigmas[0]
    peer = k_diffusion_sampling()
    with processor():
        own, expected = same_draws(*[
            lambda f=f: f(model, x, sigmas, disable=True, eta=1.0)
            for f in (k_diffusion.sample_ddim, peer.sample_euler_ancestral)
        ])  # fmt: skip
    assert_same(own, expected, TOLERANCE)


@pytest.mark.parametrize("batch", [1, 3])
def test_webui(batch: int, processor: Any) -> None:
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    x, timesteps = torch.randn(batch, 5), torch.tensor([1, 300, 600, 999])
    with processor():
        own, expected = same_draws(*[
            lambda f=f: f(WebuiModel(alphas), x, timesteps, eta=1.0)
            for f in (webui.ddim, peer_webui)
        ])  # fmt: skip
    assert_same(own, expected, TOLERANCE)
