"""The loop: `sample`, `Sampler` and `invert` against transcriptions, diffusers, their contract."""

from __future__ import annotations

import inspect
import itertools
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fastddim
from fastddim import Sampler, Schedule, philox, select_timesteps
from fastddim.options import Reporting
from fastddim.plan import PREDICTIONS, SPACINGS

from .support.environment import CPU_IMPLS
from .support.models import GaussianModel, SmallNet, elementwise_model, elementwise_numpy
from .support.optional import optional
from .support.paper import ddim_sample, ddim_step, linear_alphas
from .support.probes import LiveStorage, NoSync, torch_threads
from .support.recorded_graph import recorded_graphs

diffusers = optional("diffusers")

SHAPE = (2, 3, 6, 6)
LINEAR = Schedule.linear()


def latents(shape=SHAPE, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Recorder:
    """A model that keeps copies of its inputs."""

    def __init__(self, model=elementwise_model):
        self.model = model
        self.x, self.t, self.kwargs, self.outputs = [], [], [], []

    def __call__(self, x, t, **kwargs):
        self.x.append(x.clone())
        self.t.append(t.clone())
        self.kwargs.append(kwargs)
        self.outputs.append(self.model(x, t).clone())
        return self.outputs[-1]


class TestEquation12:
    """η ≥ 0 sampling in float64 against the transcription in NumPy."""

    def check(self, own, expected):
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-10, atol=1e-10)
        assert np.abs(expected).max() > 0.1

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("steps", [1, 2, 10, 33, 100])
    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_ddim(self, steps, spacing, impl):
        x_T = latents()
        own = fastddim.sample(elementwise_model, steps, x_T=x_T, spacing=spacing, impl=impl)
        timesteps = select_timesteps(1000, steps, spacing).tolist()
        self.check(own, ddim_sample(elementwise_numpy, x_T.numpy(), timesteps, linear_alphas()))

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("variance", ["small", "large"])
    @pytest.mark.parametrize("clip", [None, 1.0])
    def test_every_kind(self, prediction, variance, clip, impl):
        x_T, noise = latents(), latents((20, *SHAPE), seed=1)
        for eta, rederive_eps in ((0.0, True), (0.4, False), (1.0, True)):
            kind = {
                "eta": eta,
                "variance": variance,
                "prediction": prediction,
                "clip": clip,
                "rederive_eps": rederive_eps,
            }
            own = fastddim.sample(elementwise_model, 20, x_T=x_T, noise=noise, impl=impl, **kind)
            expected = ddim_sample(
                elementwise_numpy,
                x_T.numpy(),
                list(range(999, -1, -50)),
                linear_alphas(),
                noise.numpy(),
                **kind,
            )
            self.check(own, expected)

    def test_all_1000_steps(self):
        x_T = latents()
        own = fastddim.sample(elementwise_model, 1000, x_T=x_T)
        self.check(
            own,
            ddim_sample(elementwise_numpy, x_T.numpy(), range(999, -1, -1), linear_alphas()),
        )

    def test_explicit_timesteps(self):
        x_T, timesteps = latents(), [981, 600, 599, 3]
        own = fastddim.sample(elementwise_model, timesteps, x_T=x_T)
        self.check(own, ddim_sample(elementwise_numpy, x_T.numpy(), timesteps, linear_alphas()))

    def test_schedule(self):
        x_T = latents()
        own = fastddim.sample(
            elementwise_model, 10, x_T=x_T, schedule=Schedule.linear(100, 0.001, 0.2)
        )
        alphas = linear_alphas(100, 0.001, 0.2)
        self.check(own, ddim_sample(elementwise_numpy, x_T.numpy(), range(99, -1, -10), alphas))

    @pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
    def test_zero_terminal_snr(self, prediction):
        x_T = latents()
        schedule = LINEAR.zero_terminal_snr()
        own = fastddim.sample(
            elementwise_model,
            10,
            x_T=x_T,
            schedule=schedule,
            spacing="trailing",
            prediction=prediction,
        )
        expected = ddim_sample(
            elementwise_numpy,
            x_T.numpy(),
            list(range(999, 0, -100)),
            schedule.alphas_cumprod.numpy(),
            prediction=prediction,
        )
        self.check(own, expected)

    def test_image_to_image(self):
        """Noise a clean image to timestep t, then sample from t down."""
        x_0, z = latents(seed=2).clamp(-1, 1), latents(seed=3)
        a = linear_alphas()
        timesteps = [t for t in select_timesteps(1000, 50).tolist() if t < 400]
        x_t = LINEAR.add_noise(x_0, timesteps[0], z)
        own = fastddim.sample(elementwise_model, timesteps, x_T=x_t)
        start = a[399] ** 0.5 * x_0.numpy() + (1 - a[399]) ** 0.5 * z.numpy()
        self.check(own, ddim_sample(elementwise_numpy, start, timesteps, a))

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_coefficients_per_sample(self, impl):
        eta, scale = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
        x_T, noise = latents(), latents((10, *SHAPE), seed=1)

        def model(x, t):
            return elementwise_model(x, t) * torch.tensor([1.0, 1.0, 0.5, 0.5]).view(4, 1, 1, 1)

        own = fastddim.sample(
            model, 10, x_T=x_T, noise=noise, eta=eta, guidance_scale=scale, impl=impl
        )
        a = linear_alphas()
        for i, g in enumerate(scale.tolist()):
            expected = ddim_sample(
                # u + g·(c − u) with c = u/2.
                lambda x, t, g=g: elementwise_numpy(x, t) * (1 + g * (0.5 - 1)),
                x_T[i : i + 1].numpy(),
                range(999, -1, -100),
                a,
                noise[:, i : i + 1].numpy(),
                eta=eta[i].item(),
            )
            self.check(own[i : i + 1], expected)


class TestDiffusers:
    shape = (2, 3, 16, 16)

    def peer(self, scheduler, model, steps, x, eta=0.0, noise=None):
        scheduler.set_timesteps(steps)
        for s, t in enumerate(scheduler.timesteps):
            output = model(x, t.expand(x.shape[0]))
            z = None if noise is None else noise[s]
            x = scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample
        return x

    @pytest.mark.parametrize("steps", [10, 20, 50, 100])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    def test_leading(self, steps, eta, prediction):
        scheduler = diffusers.DDIMScheduler(
            clip_sample=False, timestep_spacing="leading", prediction_type=prediction
        )
        model, x_T = SmallNet(), latents(self.shape, torch.float32)
        noise = latents((steps, *self.shape), torch.float32, seed=1)
        with torch.no_grad():
            expected = self.peer(scheduler, model, steps, x_T, eta, noise if eta else None)
        own = fastddim.sample(
            model,
            steps,
            x_T=x_T,
            noise=noise,
            eta=eta,
            prediction=prediction,
            spacing="leading",
            schedule=Schedule.from_diffusers(scheduler),
        )
        scale = expected.abs().max().clamp_min(1)
        assert (own - expected).abs().max() < 1e-5 * scale

    def test_clipped(self):
        scheduler = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="leading")
        model, x_T = SmallNet(), latents(self.shape, torch.float32)
        with torch.no_grad():
            expected = self.peer(scheduler, model, 20, x_T)
        own = fastddim.sample(
            model,
            20,
            x_T=x_T,
            clip=1.0,
            spacing="leading",
            schedule=Schedule.from_diffusers(scheduler),
        )
        assert (own - expected).abs().max() < 1e-5

    def test_unet(self):
        """A randomly initialised UNet2DModel, its shape taken from its config."""
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ).eval()
        drawn = fastddim.sample(unet, 5, batch_size=2, seed=3)
        assert drawn.shape == (2, 1, 8, 8)
        assert drawn.dtype == torch.float32
        assert not drawn.requires_grad
        unet.double()

        def model(x, t):
            with torch.no_grad():
                return unet(torch.from_numpy(x), torch.full((len(x),), t)).sample.numpy()

        x_T = latents((2, 1, 8, 8))
        own = fastddim.sample(unet, 5, x_T=x_T)
        expected = ddim_sample(model, x_T.numpy(), range(999, -1, -200), linear_alphas())
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-10, atol=1e-10)

    def test_rectangular_unet_config(self):
        model = Recorder()
        model.config = types.SimpleNamespace(in_channels=2, sample_size=(4, 6))
        assert fastddim.sample(model, 2, batch_size=3).shape == (3, 2, 4, 6)
        model.config = {"in_channels": 2, "sample_size": 5}
        assert fastddim.sample(model, 2).shape == (1, 2, 5, 5)


UPDATE = {
    "eta": 0.0,
    "prediction": "epsilon",
    "clip": None,
    "rederive_eps": False,
    "guidance_scale": None,
    "guidance_rescale": 0.0,
}
FIT = {"temperature": 1.0, "dynamic_thresholding_ratio": None, "sample_max_value": None}
LOOP = {"order": 1, "denoised_fn": None}
MASK = {"mask": None, "known": None}
NOISE = {"seed": None, "sample_offset": 0, "noise": None}
PLAN = {"schedule": None, "spacing": "trailing", "steps_offset": 0}
RUN = {
    "device": None,
    "dtype": None,
    "model_dtype": None,
    "impl": "auto",
    "graph": "auto",
    "check_finite": False,
    "uncond_model": None,
}
GIVEN = {"model_kwargs": None, "uncond_kwargs": None}
WATCH = {"progress": False, "callback": None, "return_trajectory": False}


class TestSignatures:
    """The public keyword arguments and their defaults."""

    @pytest.mark.parametrize(
        ("function", "positional", "defaults"),
        [
            (
                fastddim.sample,
                ["model", "steps"],
                UPDATE
                | NOISE
                | PLAN
                | RUN
                | GIVEN
                | WATCH
                | FIT
                | LOOP
                | MASK
                | {"variance": "small", "x_T": None, "first_step": 0}
                | {"shape": None, "batch_size": 1},
            ),
            (
                Sampler,
                ["model", "steps"],
                UPDATE
                | PLAN
                | RUN
                | GIVEN
                | FIT
                | LOOP
                | {"variance": "small", "shape": None, "batch_size": 1},
            ),
            (
                Sampler.__call__,
                ["self"],
                NOISE | GIVEN | WATCH | MASK | {"x_T": None, "first_step": 0, "out": None},
            ),
            (
                fastddim.invert,
                ["model", "x_0", "steps"],
                UPDATE | PLAN | RUN | GIVEN | WATCH | {"order": 1, "refine": 0},
            ),
            (
                fastddim.step,
                ["x_t", "model_output", "alpha_t", "alpha_prev"],
                UPDATE
                | NOISE
                | FIT
                | {
                    "variance": "small",
                    "step_index": 0,
                    "out": None,
                    "return_x0": False,
                    "impl": "auto",
                },
            ),
            (fastddim.slerp, ["z_0", "z_1", "weight"], {}),
        ],
        ids=["sample", "Sampler", "call", "invert", "step", "slerp"],
    )
    def test_keywords(self, function, positional, defaults):
        parameters = inspect.signature(function).parameters.values()
        keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert keywords == defaults
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == positional

    def test_the_default_schedule_is_linear(self):
        assert torch.equal(
            fastddim.sample(elementwise_model, 5, shape=SHAPE, seed=1),
            fastddim.sample(elementwise_model, 5, shape=SHAPE, seed=1, schedule=Schedule.linear()),
        )

    @pytest.mark.parametrize(
        "function",
        [
            fastddim.sample,
            fastddim.Sampler,
            fastddim.invert,
            fastddim.Stream.submit,
            fastddim.generate,
            select_timesteps,
        ],
        ids=lambda function: function.__qualname__,
    )
    def test_runs_start_at_the_last_timestep(self, function):
        assert inspect.signature(function).parameters["spacing"].default == "trailing"

    def test_one_step_starts_at_the_last_timestep(self):
        model = Recorder()
        fastddim.sample(model, 1, x_T=latents())
        assert [t.tolist() for t in model.t] == [[999, 999]]


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestSameBits:
    """The sample that a number belongs to decides its bits, and nothing else."""

    # Large enough for torch to share it among two threads.
    shape = (64, 3, 14, 14)

    @pytest.mark.parametrize(
        "kind",
        [
            {"eta": 0.0},
            {"eta": 1.0},
            {"eta": 1.0, "variance": "large", "clip": 1.0, "dtype": torch.bfloat16},
        ],
        ids=["ddim", "ddpm", "sigma-hat in bfloat16"],
    )
    def test_batches_and_threads(self, impl, kind):
        kind = {"seed": 5, "impl": impl, **kind}
        with torch_threads(1):
            expected = fastddim.sample(elementwise_model, 2, shape=self.shape, **kind)
        for batch, threads in ((1, 1), (7, 2), (7, 1), (64, 2)):
            with torch_threads(threads):
                parts = [
                    fastddim.sample(
                        elementwise_model,
                        2,
                        shape=(min(batch, 64 - start), *self.shape[1:]),
                        sample_offset=start,
                        **kind,
                    )
                    for start in range(0, 64, batch)
                ]
            assert torch.equal(torch.cat(parts), expected), f"batches of {batch}, {threads} threads"

    def test_x_T_for_any_model(self, impl):
        expected = philox.initial_latents(self.shape, 5)
        net = SmallNet().requires_grad_(False)
        for batch, model in ((1, net), (7, net), (64, elementwise_model)):
            starts = []
            for offset in range(0, 64, batch):
                recorder = Recorder(model)
                fastddim.sample(
                    recorder,
                    1,
                    shape=(min(batch, 64 - offset), *self.shape[1:]),
                    seed=5,
                    sample_offset=offset,
                    impl=impl,
                )
                starts.append(recorder.x[0])
            assert torch.equal(torch.cat(starts), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_x_T_in_every_dtype(self, impl, dtype):
        trajectory = fastddim.sample(
            elementwise_model,
            1,
            shape=SHAPE,
            dtype=dtype,
            seed=5,
            sample_offset=9,
            return_trajectory=True,
            impl=impl,
        )
        expected = philox.initial_latents(SHAPE, 5, sample_offset=9)
        assert torch.equal(trajectory[0], expected.to(dtype))

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_seed_per_sample(self, impl, eta):
        seeds = [3, 2**64 - 1, 0, 3]
        kind = {"eta": eta, "impl": impl}
        for given in (seeds, torch.tensor([3, -1, 0, 3]), tuple(seeds)):
            batch = fastddim.sample(elementwise_model, 5, shape=(4, 3, 4), seed=given, **kind)
            for i, seed in enumerate(seeds):
                alone = fastddim.sample(elementwise_model, 5, shape=(1, 3, 4), seed=seed, **kind)
                assert torch.equal(batch[i : i + 1], alone)

    def test_calls_with_a_seed_repeat(self, impl):
        kind = {"shape": (2, 5), "eta": 1.0, "impl": impl}
        own = fastddim.sample(elementwise_model, 5, seed=0, **kind)
        torch.randn(3)
        assert torch.equal(fastddim.sample(elementwise_model, 5, seed=0, **kind), own)
        assert not torch.equal(fastddim.sample(elementwise_model, 5, seed=1, **kind), own)

    def test_step_noise_is_the_specified_one(self, impl):
        x_T = latents()
        own = fastddim.sample(
            elementwise_model, 5, x_T=x_T, eta=1.0, seed=9, sample_offset=3, impl=impl
        )
        noise = torch.stack(
            [philox.step_noise(SHAPE, s, 9, sample_offset=3, dtype=torch.float64) for s in range(5)]
        )
        given = fastddim.sample(elementwise_model, 5, x_T=x_T, eta=1.0, noise=noise, impl=impl)
        torch.testing.assert_close(own, given, rtol=1e-12, atol=1e-12)

    def test_global_state_is_left_alone(self, impl):
        before = torch.get_rng_state()
        fastddim.sample(elementwise_model, 5, shape=(2, 5), eta=1.0, seed=0, impl=impl)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        "kind",
        [
            {"steps": 5},
            {"steps": [900, 500, 3], "eta": torch.tensor([0.5, 1.0])},
            {"steps": 5, "seed": [1, 2], "guidance_scale": 2.0},
        ],
        ids=["number", "tensors", "seeds"],
    )
    def test_global_defaults_do_not_matter(self, impl, kind):
        """Global defaults do not matter: a default device or dtype is for tensors that the user
        makes.
        """
        kind = {"shape": SHAPE, "device": "cpu", "impl": impl, "eta": 1.0, "seed": 2} | kind
        x = latents()
        previous = torch.get_default_dtype()

        def everything():
            return (
                fastddim.sample(elementwise_model, **kind),
                fastddim.invert(elementwise_model, x, 5, impl=impl),
                fastddim.invert(elementwise_model, x, [900, 3], impl=impl),
                fastddim.step(x, x, 0.5, 0.6125, eta=1.0, seed=4, impl=impl),
                fastddim.slerp(x, x.flip(0), 0.3),
                Schedule.cosine().add_noise(x, 5, seed=3),
            )

        expected = everything()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                own = everything()
        finally:
            torch.set_default_dtype(previous)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


class TestGivenNoise:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
    def test_generator_draws_x_T_first(self, dtype):
        own = fastddim.sample(
            elementwise_model, 5, shape=SHAPE, dtype=dtype, eta=1.0, noise=generator(4)
        )
        stream = generator(4)
        drawn = [torch.randn(SHAPE, generator=stream, dtype=dtype) for _ in range(6)]
        expected = fastddim.sample(
            elementwise_model, 5, x_T=drawn[0], eta=1.0, noise=torch.stack(drawn[1:])
        )
        assert torch.equal(own, expected)

    def test_generator_with_x_T_draws_steps_only(self):
        x_T = latents()
        own = fastddim.sample(elementwise_model, 5, x_T=x_T, eta=1.0, noise=generator(4))
        stream = generator(4)
        noise = torch.stack(
            [torch.randn(SHAPE, generator=stream, dtype=torch.float64) for _ in range(5)]
        )
        assert torch.equal(
            own, fastddim.sample(elementwise_model, 5, x_T=x_T, eta=1.0, noise=noise)
        )

    def test_generator_per_sample(self):
        own = fastddim.sample(
            elementwise_model, 5, shape=(3, 2, 4), eta=1.0, noise=[generator(i) for i in range(3)]
        )
        for i in range(3):
            alone = fastddim.sample(
                elementwise_model, 5, shape=(1, 2, 4), eta=1.0, noise=generator(i)
            )
            assert torch.equal(own[i : i + 1], alone)

    def test_generator_without_step_noise_draws_x_T_alone(self):
        stream = generator(4)
        own = fastddim.sample(elementwise_model, 5, shape=SHAPE, noise=stream)
        fresh = generator(4)
        x_T = torch.randn(SHAPE, generator=fresh)
        assert torch.equal(own, fastddim.sample(elementwise_model, 5, x_T=x_T))
        assert torch.equal(stream.get_state(), fresh.get_state())

    def test_tensor_leaves_x_T_to_the_seed(self):
        noise = latents((5, *SHAPE), torch.float32)
        own = fastddim.sample(elementwise_model, 5, shape=SHAPE, eta=1.0, seed=6, noise=noise)
        expected = fastddim.sample(
            elementwise_model, 5, x_T=philox.initial_latents(SHAPE, 6), eta=1.0, noise=noise
        )
        assert torch.equal(own, expected)

    def test_tensor_is_unread_where_no_noise_is_added(self):
        noise = torch.full((5, *SHAPE), torch.nan)
        x_T = latents()
        assert torch.equal(
            fastddim.sample(elementwise_model, 5, x_T=x_T, noise=noise.double()),
            fastddim.sample(elementwise_model, 5, x_T=x_T),
        )
        noise[:-1] = latents((4, *SHAPE), torch.float32)
        assert fastddim.sample(elementwise_model, 5, x_T=x_T, eta=1.0, noise=noise).isfinite().all()


class TestModels:
    def test_arguments(self):
        model = Recorder()
        fastddim.sample(model, [900, 500, 3], shape=SHAPE)
        assert [t.tolist() for t in model.t] == [[900] * 2, [500] * 2, [3] * 2]
        assert all(t.dtype == torch.int64 for t in model.t)
        assert all(t.device == x.device for t, x in zip(model.t, model.x, strict=True))
        assert all(x.shape == SHAPE for x in model.x)
        assert model.kwargs == [{}] * 3

    def test_guidance(self):
        """x and t are doubled; the output is read as unconditional, then conditional."""
        labels, extra = torch.arange(4), object()
        model = Recorder()

        def conditional(x, t, *, labels, extra):
            return model(x, t, labels=labels, extra=extra) + labels.view(4, 1, 1, 1) / 8

        x_T = latents()
        own = fastddim.sample(
            conditional,
            [900, 500, 3],
            x_T=x_T,
            guidance_scale=2.5,
            model_kwargs={"labels": labels, "extra": extra},
        )
        for x, t, kwargs in zip(model.x, model.t, model.kwargs, strict=True):
            assert x.shape == (4, *SHAPE[1:])
            assert torch.equal(x[:2], x[2:])
            assert t.shape == (4,)
            assert kwargs["labels"] is labels
            assert kwargs["extra"] is extra
        assert torch.equal(model.x[0][:2], x_T)
        u, c = (labels[half].view(2, 1, 1, 1).numpy() / 8 for half in (slice(0, 2), slice(2, 4)))
        expected = ddim_sample(
            lambda x, t: elementwise_numpy(x, t) + u + 2.5 * (c - u),
            x_T.numpy(),
            [900, 500, 3],
            linear_alphas(),
        )
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-10, atol=1e-10)

    def test_kwargs_without_guidance(self):
        model, value = Recorder(), object()
        fastddim.sample(model, 2, shape=SHAPE, model_kwargs={"value": value})
        assert all(kwargs["value"] is value for kwargs in model.kwargs)

    @pytest.mark.parametrize("guidance_scale", [None, 2.0])
    def test_learned_variance(self, guidance_scale):
        wide = SmallNet(3, outputs=6)
        kind = {"shape": SHAPE, "seed": 0, "guidance_scale": guidance_scale}
        own = fastddim.sample(wide, 5, **kind)
        narrow = fastddim.sample(lambda x, t: wide(x, t)[:, :3], 5, **kind)
        assert torch.equal(own, narrow)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda m: (m, "other"),
            lambda m: types.SimpleNamespace(sample=m),
            lambda m: diffusers.models.unets.unet_2d.UNet2DOutput(sample=m),
        ],
        ids=["tuple", "object", "diffusers"],
    )
    def test_results(self, wrap):
        expected = fastddim.sample(elementwise_model, 5, shape=SHAPE, seed=0)
        own = fastddim.sample(lambda x, t: wrap(elementwise_model(x, t)), 5, shape=SHAPE, seed=0)
        assert torch.equal(own, expected)

    def test_output_that_is_the_input(self):
        """An output that aliases the state is read before the state is written over."""
        for guidance_scale in (None, 3.0):
            kind = {"shape": SHAPE, "eta": 1.0, "seed": 0, "guidance_scale": guidance_scale}
            own = fastddim.sample(lambda x, t: x, 5, **kind)
            expected = fastddim.sample(lambda x, t: x.clone(), 5, **kind)
            assert torch.equal(own, expected)

    @pytest.mark.parametrize(
        ("state", "parameters"),
        [
            (torch.float32, torch.float16),
            (torch.float32, torch.bfloat16),
            (torch.float64, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("guidance_scale", [None, 2.0])
    def test_dtypes(self, state, parameters, guidance_scale):
        """The model gets its parameters' dtype, the state keeps its own."""
        net = SmallNet().to(parameters)
        seen = []
        net.register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1].dtype)))
        kind = {"shape": SHAPE, "dtype": state, "eta": 1.0, "seed": 0}
        own = fastddim.sample(net, 5, guidance_scale=guidance_scale, **kind)
        assert set(seen) == {(parameters, torch.int64)}
        assert own.dtype == state

        def model(x, t):
            return net(x.to(parameters), t)

        expected = fastddim.sample(model, 5, guidance_scale=guidance_scale, **kind)
        assert torch.equal(own, expected)

    def test_default_dtype_is_float32(self):
        assert fastddim.sample(elementwise_model, 2, shape=SHAPE).dtype == torch.float32
        assert fastddim.sample(elementwise_model, 2, x_T=latents()).dtype == torch.float64

    def test_what_a_model_tells(self):
        model = Recorder()
        model.sample_shape = (2, 5)
        model.schedule = Schedule.linear(10, 0.01, 0.5)
        own = fastddim.sample(model, 5, batch_size=3, seed=0)
        assert own.shape == (3, 2, 5)
        expected = partial(fastddim.sample, elementwise_model, 5, seed=0)
        assert torch.equal(own, expected(shape=(3, 2, 5), schedule=model.schedule))
        overruled = fastddim.sample(model, 5, shape=(1, 2, 7), schedule=LINEAR, seed=0)
        assert torch.equal(overruled, expected(shape=(1, 2, 7)))

    @pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 1, 2, 2, 2), (0, 4)])
    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_any_rank(self, shape, impl):
        own = fastddim.sample(
            elementwise_model, 5, shape=shape, dtype=torch.float64, eta=1.0, seed=0, impl=impl
        )
        noise = [philox.step_noise(shape, s, 0, dtype=torch.float64).numpy() for s in range(5)]
        expected = ddim_sample(
            elementwise_numpy,
            philox.initial_latents(shape, 0, dtype=torch.float64).numpy(),
            range(999, -1, -200),
            linear_alphas(),
            noise,
            eta=1.0,
        )
        assert own.shape == shape
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-10, atol=1e-10)


class TestCallback:
    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_arguments(self, impl):
        calls, model, x_T = [], Recorder(), latents()
        timesteps = [900, 500, 3]
        trajectory = fastddim.sample(
            model,
            timesteps,
            x_T=x_T,
            eta=0.5,
            callback=lambda *args: calls.append(args),
            return_trajectory=True,
            impl=impl,
        )
        a = linear_alphas()
        assert [(type(s), s, type(t), t) for s, t, _, _ in calls] == [
            (int, i, int, t) for i, t in enumerate(timesteps)
        ]
        for s, t, x_t, x_0 in calls:
            assert torch.equal(x_t, trajectory[s + 1])
            _, expected = ddim_step(model.x[s].numpy(), model.outputs[s].numpy(), a[t], 1.0)
            np.testing.assert_allclose(x_0.numpy(), expected, rtol=1e-12, atol=1e-12)

    def test_x_0_is_clipped_where_asked(self):
        seen = []
        fastddim.sample(
            elementwise_model,
            5,
            shape=SHAPE,
            clip=0.25,
            callback=lambda s, t, x_t, x_0: seen.append(x_0),
        )
        assert max(x_0.abs().max() for x_0 in seen) == 0.25

    def test_gets_copies(self):
        kept = []

        def callback(s, t, x_t, x_0):
            kept.append((x_t, x_t.clone(), x_0, x_0.clone()))
            if s % 2:
                x_t.zero_()
                x_0.fill_(torch.nan)
                kept.pop()

        own = fastddim.sample(elementwise_model, 6, shape=SHAPE, seed=0, callback=callback)
        assert torch.equal(own, fastddim.sample(elementwise_model, 6, shape=SHAPE, seed=0))
        assert len(kept) == 3
        for x_t, x_t_then, x_0, x_0_then in kept:
            assert torch.equal(x_t, x_t_then)
            assert torch.equal(x_0, x_0_then)

    def test_trajectory(self):
        x_T, model = latents(), Recorder()
        trajectory = fastddim.sample(model, 5, x_T=x_T, return_trajectory=True)
        assert torch.equal(trajectory[:-1], torch.stack(model.x))
        own = fastddim.sample(model, 5, x_T=x_T)
        assert trajectory.shape == (6, *SHAPE)
        assert trajectory.dtype == x_T.dtype
        assert torch.equal(trajectory[0], x_T)
        assert torch.equal(trajectory[-1], own)

    def test_progress_goes_to_stderr(self, capsys):
        fastddim.sample(elementwise_model, 5, shape=SHAPE)
        silent = capsys.readouterr()
        assert (silent.out, silent.err) == ("", "")
        shown = fastddim.sample(elementwise_model, 5, shape=SHAPE, seed=0, progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "5/5" in err
        assert torch.equal(shown, fastddim.sample(elementwise_model, 5, shape=SHAPE, seed=0))


class TestInterrupt:
    def interrupting(self, at, stop):
        calls = []

        def model(x, t):
            calls.append(None)
            if stop and len(calls) == at:
                raise KeyboardInterrupt
            return elementwise_model(x, t)

        return model

    @pytest.mark.parametrize("guidance_scale", [None, 2.0])
    @pytest.mark.parametrize("at", [1, 3, 5])
    def test_in_the_model(self, at, guidance_scale):
        kind = {"shape": SHAPE, "eta": torch.tensor([1.0, 0.5]), "guidance_scale": guidance_scale}
        expected = Sampler(elementwise_model, 5, **kind)(seed=3)
        sampler = Sampler(self.interrupting(at, stop=True), 5, **kind)
        with pytest.raises(KeyboardInterrupt):
            sampler(seed=1)
        assert torch.equal(sampler(seed=3), expected)

    @pytest.mark.parametrize("at", [0, 2, 4])
    def test_in_the_callback(self, at):
        sampler = Sampler(elementwise_model, 5, shape=SHAPE, eta=1.0)
        expected = sampler(seed=3)

        def callback(s, t, x_t, x_0):
            if s == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sampler(seed=1, callback=callback, progress=True)
        assert torch.is_grad_enabled()
        assert torch.equal(sampler(seed=3), expected)


class TestSamplerObject:
    def test_is_sample(self):
        kind = {
            "shape": SHAPE,
            "eta": 0.5,
            "spacing": "trailing",
            "clip": 1.0,
            "rederive_eps": True,
            "variance": "large",
            "prediction": "v_prediction",
            "dtype": torch.float64,
        }
        sampler = Sampler(elementwise_model, 5, **kind)
        for call in ({"seed": 3}, {"seed": 1, "sample_offset": 8}, {"x_T": latents(), "seed": 2}):
            assert torch.equal(
                sampler(**call), fastddim.sample(elementwise_model, 5, **kind, **call)
            )

    def test_results_are_the_callers(self):
        sampler = Sampler(elementwise_model, 5, shape=SHAPE, eta=1.0)
        first, trajectory = sampler(seed=1), sampler(seed=1, return_trajectory=True)
        then = first.clone(), trajectory.clone()
        second = sampler(seed=2)
        assert not torch.equal(first, second)
        assert torch.equal(first, then[0])
        assert torch.equal(trajectory, then[1])
        assert first.untyped_storage().nbytes() == first.numel() * 4
        first.zero_()
        trajectory.zero_()
        assert torch.equal(sampler(seed=2), second)

    def test_x_T_is_not_modified(self):
        x_T = latents()
        before = x_T.clone()
        fastddim.sample(elementwise_model, 5, x_T=x_T, eta=1.0)
        fastddim.invert(elementwise_model, x_T, 5)
        assert torch.equal(x_T, before)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
    def test_results_are_ordinary_tensors(self, mode):
        net = SmallNet()
        with mode():
            sampler = Sampler(net, 3, shape=SHAPE, eta=1.0)
            results = [
                sampler(),
                sampler(return_trajectory=True),
                fastddim.sample(net, 3, x_T=latents(dtype=torch.float32).requires_grad_()),
                fastddim.invert(net, latents(dtype=torch.float32), 3),
            ]
            kept = []
            sampler(callback=lambda s, t, x_t, x_0: kept.extend((x_t, x_0)))
        for result in (*results, *kept, sampler()):
            assert not result.is_inference()
            assert not result.requires_grad
            result.requires_grad_()
            (result**2).sum().backward()
            assert torch.equal(result.grad, 2 * result.detach())
        assert net.weight.grad is None


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestNoHostWork:
    KINDS = (
        {"eta": 0.0},
        {"eta": 1.0, "clip": 1.0, "rederive_eps": True},
        {"eta": torch.tensor([0.0, 1.0]), "variance": "large"},
        {"eta": 0.5, "guidance_scale": torch.tensor([1.0, 3.0])},
        {"guidance_scale": 2.0, "dtype": torch.bfloat16},
    )

    @pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
    @pytest.mark.parametrize("seed", [3, [1, 2]], ids=["one seed", "seeds"])
    def test_no_synchronisation(self, impl, kind, seed):
        """Nothing synchronises over the whole loop: reset, every step with its noise, callback and
        trajectory.
        """
        sampler = Sampler(SmallNet(), 4, shape=SHAPE, impl=impl, **kind)
        expected = sampler(seed=seed, return_trajectory=True)
        samples = philox.check_samples(seed, 2)
        x_T = philox.initial_latents(SHAPE, seed, dtype=sampler.dtype)
        seen = []
        with NoSync() as mode:
            own = sampler._loop.run(
                x_T,
                Reporting(callback=lambda *args: seen.append(args), return_trajectory=True),
                samples=samples,
            )
        assert mode.calls > 4 * 3
        assert len(seen) == 4
        assert torch.equal(own, expected)

    @pytest.mark.parametrize("noise", ["tensor", "generator", "generators"])
    def test_no_synchronisation_with_given_noise(self, impl, noise):
        given = {
            "tensor": lambda: latents((4, *SHAPE), torch.float32),
            "generator": lambda: generator(1),
            "generators": lambda: [generator(1), generator(2)],
        }[noise]
        sampler = Sampler(SmallNet(), 4, shape=SHAPE, eta=1.0, impl=impl)
        x_T = latents(dtype=torch.float32)
        expected = sampler(x_T=x_T, noise=given())
        source = given()
        with NoSync():
            own = sampler._loop.run(x_T, noise=source)
        assert torch.equal(own, expected)

    def test_no_synchronisation_in_inversion(self, impl):
        """`invert` prepares and runs in one call, and reads values on the host only for its checks
        before the first model call.
        """
        entered = []

        def model(x, t):
            if not entered:
                entered.append(NoSync())
                entered[0].__enter__()
            return elementwise_model(x, t)

        def leave(s, t, x_t, x_0):
            if s == 4:
                entered[0].__exit__(None, None, None)

        fastddim.invert(model, latents(), 5, callback=leave, impl=impl)
        assert entered[0].calls > 5 * 3

    @pytest.mark.parametrize(
        "synchronise",
        [
            lambda x: x.mean().item(),
            lambda x: float(x.sum()),
            lambda x: bool(x.isfinite().all()),
            lambda x: x[x > 0],
            lambda x: x.nonzero(),
            lambda x: torch.equal(x, x),
            lambda x: x * torch.tensor(2.0),
            lambda x: x.to("meta"),
        ],
        ids=[
            "item",
            "float",
            "bool",
            "mask",
            "nonzero",
            "equal",
            "constant",
            "device",
        ],
    )
    def test_the_probe_catches(self, impl, synchronise):
        def model(x, t):
            synchronise(x)
            return elementwise_model(x, t)

        sampler = Sampler(model, 4, shape=SHAPE, impl=impl)
        x_T, samples = latents(dtype=torch.float32), philox.check_samples(0, 2)
        with NoSync(), pytest.raises(AssertionError, match="in the loop"):
            sampler._loop.run(x_T, samples=samples)

    def test_check_finite_does_synchronise(self, impl):
        """`check_finite` waits for the device at every step, as documented; the default
        does not.
        """
        sampler = Sampler(elementwise_model, 4, shape=SHAPE, impl=impl, check_finite=True)
        x_T, samples = latents(dtype=torch.float32), philox.check_samples(0, 2)
        with NoSync(), pytest.raises(AssertionError, match="in the loop"):
            sampler._loop.run(x_T, samples=samples)

    @pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
    def test_memory_does_not_grow(self, impl, kind):
        """The most bytes alive are those of a few steps, whatever the number of steps."""
        peaks = []
        for steps in (3, 20):
            sampler = Sampler(elementwise_model, steps, shape=SHAPE, impl=impl, **kind)
            x_T = philox.initial_latents(SHAPE, dtype=sampler.dtype)
            samples = philox.check_samples(0, 2)
            with LiveStorage() as probe:
                sampler._loop.run(x_T, samples=samples)
            peaks.append(probe.peak)
        assert peaks[0] > 0
        # Only the timesteps and the coefficient table are longer.
        rows = sampler._loop.buffers.table.untyped_storage().nbytes() + 21 * 8
        assert peaks[1] - peaks[0] <= rows

    def test_buffers_stay(self, impl):
        sampler = Sampler(elementwise_model, 5, shape=SHAPE, eta=1.0, impl=impl)
        inputs = set()
        sampler._loop.step.model = lambda x, t: inputs.add((x.data_ptr(), t.data_ptr())) or x * 0.5
        for seed in range(3):
            sampler(seed=seed)
        assert len(inputs) == 1


def test_no_value_is_read():
    """No value is read: tensors on the meta device have none, and a loop that needs one cannot run
    there.
    """
    for kind in ({"eta": 0.0}, {"eta": 1.0, "guidance_scale": 2.0}):
        own = fastddim.sample(
            elementwise_model, 5, shape=SHAPE, device="meta", impl="reference", **kind
        )
        assert own.device.type == "meta"
        assert own.shape == SHAPE


class TestInvert:
    """Encoding: the same plan walked upwards."""

    def rotate_up(self, x, output, a, p, prediction):
        """x_t solved from x_p = √p·x_0 + √(1−p)·ε, without the plan's A and B."""
        if prediction == "score":
            return self.rotate_up(x, -((1 - a) ** 0.5) * output, a, p, "epsilon")
        if prediction == "epsilon":
            return (a / p) ** 0.5 * (x - (1 - p) ** 0.5 * output) + (1 - a) ** 0.5 * output
        # With √ā = cos φ, v-prediction turns the state: x_p = cos(φ_t−φ_p)·x_t − sin(φ_t−φ_p)·v.
        turn = np.arccos(np.sqrt(a)) - np.arccos(np.sqrt(p))
        return (x + np.sin(turn) * output) / np.cos(turn)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "score"])
    @pytest.mark.parametrize("steps", [1, 10, [900, 500, 499, 3]])
    @pytest.mark.parametrize("spacing", ["uniform", "trailing"])
    def test_relation(self, prediction, steps, spacing, impl):
        x_0 = latents().clamp(-1, 1)
        own = fastddim.invert(
            elementwise_model, x_0, steps, prediction=prediction, spacing=spacing, impl=impl
        )
        a, x, p = linear_alphas(), x_0.numpy(), 1.0
        for t in reversed(select_timesteps(1000, steps, spacing).tolist()):
            x = self.rotate_up(x, elementwise_numpy(x, t), a[t], p, prediction)
            p = a[t]
        np.testing.assert_allclose(own.numpy(), x, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "score"])
    def test_exact_where_the_output_does_not_depend_on_the_state(self, prediction):
        """Inversion is exact if the output does not depend on the state: the explicit guess is the
        solution, and decoding gives the data back.
        """

        def model(x, t):
            return torch.sin(t.to(x.dtype)).view(-1, 1, 1, 1) * torch.ones_like(x)

        x_0 = latents()
        z = fastddim.invert(model, x_0, 20, prediction=prediction)
        back = fastddim.sample(model, 20, x_T=z, prediction=prediction)
        torch.testing.assert_close(back, x_0, rtol=1e-11, atol=1e-11)
        assert (z - x_0).abs().max() > 0.1

    def test_round_trip_falls_with_the_number_of_steps(self):
        """The error of the round trip falls with the number of steps, as O(1/S), on Gaussian data
        with the exact ε.
        """
        model = GaussianModel(LINEAR.alphas_cumprod)
        x_0 = model.mean + model.scale * latents()
        errors = []
        for steps in (10, 20, 50, 100, 200, 500):
            z = fastddim.invert(model, x_0, steps)
            back = fastddim.sample(model, steps, x_T=z)
            errors.append((back - x_0).square().mean().item())
        assert all(later < earlier for earlier, later in itertools.pairwise(errors))
        # First order: 100 → 500 steps divide the mean squared error by nearly 5².
        assert 20 < errors[3] / errors[5] < 30

    def test_encodes_to_the_latent_of_the_flow(self):
        """For Gaussian data the ODE's solution is known: standardised data is preserved."""
        model = GaussianModel(LINEAR.alphas_cumprod)
        x_0 = model.mean + model.scale * latents()
        a = linear_alphas()[999]
        z = fastddim.invert(model, x_0, 1000)
        deviation = (a * model.scale**2 + 1 - a) ** 0.5
        expected = a**0.5 * model.mean + deviation * (x_0 - model.mean) / model.scale
        torch.testing.assert_close(z, expected, rtol=0, atol=0.02)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_callback_and_trajectory(self, impl):
        calls, model, x_0 = [], Recorder(), latents()
        trajectory = fastddim.invert(
            model,
            x_0,
            [900, 500, 3],
            callback=lambda *args: calls.append(args),
            return_trajectory=True,
            impl=impl,
        )
        a = linear_alphas()
        assert [(s, t) for s, t, _, _ in calls] == [(0, 3), (1, 500), (2, 900)]
        assert [t.tolist() for t in model.t] == [[3] * 2, [500] * 2, [900] * 2]
        assert torch.equal(trajectory[0], x_0)
        assert torch.equal(trajectory[-1], fastddim.invert(model, x_0, [900, 500, 3], impl=impl))
        for s, t, x_t, predicted in calls:
            assert torch.equal(x_t, trajectory[s + 1])
            _, expected = ddim_step(x_t.numpy(), model.outputs[s].numpy(), a[t], 1.0)
            np.testing.assert_allclose(predicted.numpy(), expected, rtol=1e-10, atol=1e-10)

    def test_guidance(self):
        scale = torch.tensor([1.0, 3.0])

        def model(x, t):
            return elementwise_model(x, t) * torch.tensor([1.0, 1.0, 0.5, 0.5]).view(4, 1, 1, 1)

        x_0 = latents()
        own = fastddim.invert(model, x_0, 10, guidance_scale=scale)
        for i, g in enumerate(scale.tolist()):
            alone = fastddim.invert(
                lambda x, t, g=g: elementwise_model(x, t) * (1 + g * (0.5 - 1)), x_0[i : i + 1], 10
            )
            torch.testing.assert_close(own[i : i + 1], alone, rtol=1e-11, atol=1e-11)

    def test_sample_prediction_is_refused(self):
        with pytest.raises(ValueError, match=r"^prediction: expected .* got 'sample'"):
            fastddim.invert(elementwise_model, latents(), 10, prediction="sample")

    def test_dtype_follows_the_data(self):
        for dtype in (torch.float64, torch.float32, torch.float16):
            x_0 = latents(dtype=dtype)
            assert fastddim.invert(elementwise_model, x_0, 3).dtype == dtype


class TestOut:
    """A call that writes its samples into a given tensor."""

    def sampler(self, **kind):
        return Sampler(SmallNet(), 3, shape=SHAPE, schedule=LINEAR, **kind)

    @pytest.mark.parametrize("graph", [False, "auto", True, "loop"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_has_the_samples(self, dtype, graph, monkeypatch):
        with recorded_graphs(monkeypatch):
            sampler = self.sampler(eta=1.0, dtype=dtype, graph=graph)
            known, other = latents(dtype=dtype, seed=1), latents(dtype=dtype)
            calls = [{}, {"x_T": latents(dtype=dtype)}, {"mask": torch.ones(6, 6).tril()}]
            # Also where it is read before, and where it lies in another order.
            strided = torch.empty((*SHAPE[::-1],), dtype=dtype).permute(3, 2, 1, 0)
            for call, out in itertools.product(calls, (other, strided, known)):
                given = {"known": known} if "mask" in call else {}
                expected = sampler(seed=2, **call, **given)
                assert sampler(seed=2, out=out, **call, **given) is out
                assert torch.equal(out, expected)

    def test_may_be_of_any_mode(self):
        sampler, expected = self.sampler(), self.sampler()(seed=1)
        with torch.inference_mode():
            inside = torch.empty(SHAPE)
            assert torch.equal(sampler(seed=1, out=inside), expected)
        assert torch.equal(sampler(seed=2, out=inside), sampler(seed=2))

    def test_a_run_that_stops(self):
        sampler, out = self.sampler(), torch.empty(SHAPE)
        states = sampler(seed=1, return_trajectory=True)
        sampler(seed=1, out=out, callback=lambda s, *_: fastddim.STOP if s == 1 else None)
        assert torch.equal(out, states[2])

    @pytest.mark.parametrize(
        ("out", "error", "match"),
        [
            (latents((2, 3, 6)), ValueError, "out: expected the shape of the state"),
            (latents(), ValueError, "out: expected dtype torch.float32, got torch.float64"),
            (latents().float().to("meta"), ValueError, "out: expected the device of the state"),
            (np.zeros(SHAPE), TypeError, "out: expected a tensor, got"),
            (torch.zeros(1, 3, 6, 6).expand(SHAPE), ValueError, "out: expected memory for each"),
        ],
        ids=["shape", "dtype", "device", "type", "expanded"],
    )
    def test_what_samples_cannot_be_written_into(self, out, error, match):
        with pytest.raises(error, match=match):
            self.sampler()(out=out)

    def test_is_without_a_trajectory(self):
        with pytest.raises(ValueError, match="out: expected None with return_trajectory=True"):
            self.sampler()(out=torch.empty(SHAPE), return_trajectory=True)

    def test_is_for_outside_of_programs(self):
        sampler, out = self.sampler(), torch.zeros(SHAPE)
        expected = sampler(seed=1)
        compiled = torch.compile(lambda out: sampler(seed=1, out=out) * 2, backend="eager")
        assert torch.equal(compiled(out), expected * 2)
        assert torch.equal(out, expected)
        with pytest.raises(ValueError, match="out: expected what a program can hold"):
            make_fx(lambda out: sampler(seed=1, out=out))(out)
