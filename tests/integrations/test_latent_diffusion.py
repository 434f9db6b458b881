"""Live comparison with `DDIMSampler` of stable-diffusion-sdkit (package `ldm`)."""

from __future__ import annotations

import copy
import gc
import itertools
import types
import weakref

import numpy as np
import pytest
import torch

from fastddim.integrations import latent_diffusion as fast
from fastddim.steptable import StepTable

from ..support.dropins.latent_diffusion import Latent, T, compare, fast_of, make, scaled
from ..support.dropins.peers import (
    TOLERANCE,
    assert_same,
    default_dtype,
    ldm_ddim,
    run_example,
    same_draws,
)
from ..support.probes import NoSync

SHAPE = (3, 2, 6, 5)

# The peer's own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_parameterization = pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])


class Corrector:
    def modify_score(self, model, e_t, x, t, c, strength):
        return e_t * strength + 0.1 * x + 0.01 * t.to(x.dtype).reshape(-1, 1, 1, 1)


def conditions(kind):
    c, u = torch.rand(3, dtype=torch.get_default_dtype()), torch.zeros(3)
    if kind == "dict":
        return {"a": c, "b": [c, c + 1]}, {"a": u, "b": [u, u - 1]}
    if kind == "list":
        return [c, 2 * c], [u, u - 1]
    return c, u


@each_dtype
@each_parameterization
def test_steps(parameterization, dtype, some):
    with default_dtype(dtype):
        corrector = {"score_corrector": Corrector(), "corrector_kwargs": {"strength": 0.7}}
        correctors = [{}, corrector] if parameterization == "eps" else [{}]
        every = itertools.product(
            (0.0, 0.6, 1.0),
            (False, True),
            (False, True),
            correctors,
            (1.0, 7.5),
            ("tensor", "dict"),
        )
        for eta, original, quantize, correct, scale, kind in some(
            every, parameterization, dtype, quick=16
        ):
            sampler, x = make(parameterization, eta=eta), torch.randn(SHAPE)
            c, u = conditions(kind)
            for index, kwargs in (
                (0, {"repeat_noise": True}),
                (9, {"temperature": 0.7, "noise_dropout": 0.3}),
                (4, {}),
            ):
                step = index if original else int(sampler.ddim_timesteps[index])
                run = lambda s: scaled(  # noqa: E731
                    s,
                    s.p_sample_ddim(
                        x,  # noqa: B023
                        c,  # noqa: B023
                        torch.full((3,), step),  # noqa: B023
                        index,  # noqa: B023
                        use_original_steps=original,  # noqa: B023
                        quantize_denoised=quantize,  # noqa: B023
                        unconditional_guidance_scale=scale,  # noqa: B023
                        unconditional_conditioning=u,  # noqa: B023
                        **correct,  # noqa: B023
                        **kwargs,  # noqa: B023
                    ),
                    index,  # noqa: B023
                    original,  # noqa: B023
                )
                compare(sampler, run, TOLERANCE[dtype])


@each_dtype
@each_parameterization
def test_sampling(parameterization, dtype):
    """Whole loops agree through `sample`, and through `ddim_sampling` for the arguments that
    `sample` does not pass.
    """
    with default_dtype(dtype):
        c, u = conditions("list")
        sampler = make(parameterization)
        mask = (torch.rand(1, 1, *SHAPE[2:]) > 0.5).to(dtype)
        for steps, kwargs in (
            (10, {}),
            (7, {"eta": 1.0, "temperature": 0.8, "noise_dropout": 0.2, "log_every_t": 3}),
            (5, {"eta": 0.4, "unconditional_guidance_scale": 3.0, "unconditional_conditioning": u}),
            (
                20,
                {
                    "unconditional_conditioning": u,
                    "ucg_schedule": list(np.linspace(0.5, 2, 20)),
                },
            ),
            (10, {"mask": mask, "x0": torch.randn(SHAPE), "x_T": torch.randn(SHAPE), "eta": 0.3}),
        ):
            compare(
                sampler,
                lambda s: s.sample(steps, 3, SHAPE[1:], c, verbose=False, **kwargs),  # noqa: B023
                TOLERANCE[dtype],
            )
        for kwargs in (
            {"ddim_use_original_steps": True},
            {"ddim_use_original_steps": True, "timesteps": 9},
            {"timesteps": 6},
            {"timesteps": 100},
        ):
            called = [], []

            def run(s):
                s.ddim_sampling(
                    c,
                    SHAPE,
                    callback=called[0].append,  # noqa: B023
                    img_callback=lambda x_0, i: called[1].append((x_0, i)),  # noqa: B023
                    **kwargs,  # noqa: B023
                )
                result = copy.copy(called[0]), copy.copy(called[1])  # noqa: B023
                called[0].clear(), called[1].clear()  # noqa: B023
                return result

            assert len(compare(sampler, run, TOLERANCE[dtype])[0]) > 3
            compare(sampler, lambda s: s.ddim_sampling(c, SHAPE, **kwargs), TOLERANCE[dtype])  # noqa: B023


def test_quantized_loop():
    """A quantized loop agrees in float64 only: in float32, rounding decides the
    quantized values.
    """
    with default_dtype(torch.float64):
        for parameterization in ("eps", "v"):
            c, _ = conditions("tensor")
            run = lambda s: s.sample(10, 3, SHAPE[1:], c, quantize_x0=True, verbose=False)  # noqa: B023, E731
            compare(make(parameterization), run, 1e-10)


@each_dtype
@pytest.mark.parametrize("original", [False, True])
def test_encode_and_decode(original, dtype):
    with default_dtype(dtype):
        for parameterization, scale in itertools.product(("eps", "v"), (1.0, 1.5)):
            c, u = conditions("tensor")
            sampler, x = make(parameterization, eta=0.3), torch.randn(SHAPE)
            guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": u}
            for count, intermediates in ((10, None), (10, 3), (6, 2), (1, 1)):
                called = []
                encoded, out = compare(
                    sampler,
                    lambda s: s.encode(
                        x,  # noqa: B023
                        c,  # noqa: B023
                        count,  # noqa: B023
                        original,
                        intermediates,  # noqa: B023
                        callback=called.append,  # noqa: B023
                        **guidance,  # noqa: B023
                    ),
                    TOLERANCE[dtype],
                )
                assert called == [*range(count)] * 2
                assert out["x_encoded"] is encoded
            for count in (1, 7, 10):
                called = []

                def run(s):
                    images = []
                    decoded = s.decode(
                        x,  # noqa: B023
                        c,  # noqa: B023
                        count,  # noqa: B023
                        use_original_steps=original,
                        callback=called.append,  # noqa: B023
                        img_callback=lambda x_prev, i: images.append((x_prev, i)),
                        **guidance,  # noqa: B023
                    )
                    return decoded, images

                compare(sampler, run, TOLERANCE[dtype])
                assert called == [*range(count)] * 2
    with pytest.raises(AssertionError, match="t_enc: expected at most"):
        fast.encode(sampler, x, c, T + 1)
    with pytest.raises(AssertionError, match="unconditional_conditioning"):
        fast.encode(sampler, x, c, 3, unconditional_guidance_scale=2.0)


@each_dtype
@pytest.mark.parametrize("original", [False, True])
def test_stochastic_encode(original, dtype):
    with default_dtype(dtype):
        sampler, x, t = make(), torch.randn(SHAPE), torch.tensor([0, 9, 3])
        for noise in (None, torch.randn(SHAPE)):
            compare(
                sampler,
                lambda s: s.stochastic_encode(x, t, original, noise),  # noqa: B023
                TOLERANCE[dtype],
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_parameterization
def test_half_precision(parameterization, dtype):
    """As in the original, the state becomes float32 in a step, but keeps its dtype in `encode`."""
    sampler, x, (c, u) = make(parameterization), torch.randn(SHAPE).to(dtype), conditions("tensor")
    arguments = (x, c, torch.full((3,), 17), 4)
    half_model = sampler.model.apply_model
    # Guided outputs are rounded to half in the peer, and in a step of this package they are not.
    for guidance in ({}, {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": u}):
        own, expected = same_draws(
            lambda: fast.p_sample_ddim(sampler, *arguments, **guidance),  # noqa: B023
            lambda: sampler.p_sample_ddim(*arguments, **guidance),  # noqa: B023
        )
        sampler.model.apply_model = lambda x, t, c: half_model(x.to(dtype), t, c).double()
        wide = (x.double(), *arguments[1:])
        truth, _ = same_draws(*[lambda: sampler.p_sample_ddim(*wide, **guidance)] * 2)  # noqa: B023
        sampler.model.apply_model = half_model
        for ours, theirs, exact in zip(own, expected, truth, strict=True):
            assert ours.dtype == theirs.dtype == torch.float32
            error, its_error = ((v - exact).abs().max() for v in (ours, theirs))
            assert error <= its_error + 1e-6
    encoded, _ = fast.encode(sampler, x, c, 4)
    expected, _ = sampler.encode(x, c, 4)
    assert encoded.dtype == expected.dtype == dtype
    torch.testing.assert_close(encoded, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    noise, t = torch.randn_like(x), torch.tensor([0, 9, 3])
    own, expected = (f(x, t, noise=noise) for f in (fast_of(sampler).stochastic_encode,
                                                    sampler.stochastic_encode))  # fmt: skip
    assert_same(own, expected, 1e-6)


@each_parameterization
def test_coefficients_are_rounded_as_in_the_peer(parameterization):
    """Coefficients are rounded as in the peer; a float64 state with float32 buffers shows their
    last bits.
    """
    # Without noise, which the peer rounds to float32 after it has multiplied it.
    sampler, x = make(parameterization, eta=0.0), torch.randn(SHAPE).double()
    c, u = conditions("tensor")
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": u}
    for original, quantize in itertools.product((False, True), (False, True)):
        run = lambda s: s.p_sample_ddim(  # noqa: E731
            x,
            c,
            torch.full((3,), 4 if original else 17),  # noqa: B023
            4,
            use_original_steps=original,  # noqa: B023
            quantize_denoised=quantize,  # noqa: B023
            **guidance,
        )
        compare(sampler, run, 1e-10)
    compare(sampler, lambda s: s.encode(x, c, 9, **guidance), 1e-10)
    compare(sampler, lambda s: s.stochastic_encode(x, torch.tensor([0, 9, 3])), 1e-10)


def test_sigmas_of_all_timesteps():
    """A model without sigmas of all timesteps, as in the original's own repository, gets those of
    the sampler.
    """
    sampler, x, (c, _) = make(), torch.randn(SHAPE), conditions("tensor")
    arguments = (x, c, torch.full((3,), 5), 5)
    (expected, _), _ = same_draws(
        *[lambda: sampler.p_sample_ddim(*arguments, use_original_steps=True)] * 2
    )
    del sampler.model.ddim_sigmas_for_original_num_steps
    with pytest.raises(AttributeError):
        sampler.p_sample_ddim(*arguments, use_original_steps=True)
    (own, _), _ = same_draws(
        *[lambda: fast.p_sample_ddim(sampler, *arguments, use_original_steps=True)] * 2
    )
    assert_same(own, expected, 1e-5)


def test_refused():
    sampler, x, (c, _) = make("v"), torch.randn(SHAPE), conditions("tensor")
    arguments = (sampler, x, c, torch.full((3,), 17), 4)
    with pytest.raises(NotImplementedError, match="dynamic_threshold"):
        fast.p_sample_ddim(*arguments, dynamic_threshold=0.9)
    with pytest.raises(AssertionError, match="score_corrector"):
        fast.p_sample_ddim(*arguments, score_corrector=Corrector(), corrector_kwargs={})
    with pytest.raises(AssertionError, match="ucg_schedule: expected one scale a step, 10, got 2"):
        fast.ddim_sampling(sampler, c, SHAPE, ucg_schedule=[1.0, 2.0])


def test_tables_follow_the_object():
    """Tables follow another schedule, parameterization or η in the same object."""
    sampler, own, (c, u) = make(), make(), conditions("tensor")
    fast.install(own)
    for eta, parameterization, steps in ((0.2, "eps", 10), (0.9, "eps", 10), (0.9, "v", 8)):
        for each in (own, sampler):
            each.make_schedule(steps, ddim_eta=eta, verbose=False)
            each.model.parameterization = parameterization
        draws = same_draws(*[
            lambda s=s: s.ddim_sampling(c, SHAPE, unconditional_guidance_scale=2.0,
                                        unconditional_conditioning=u)
            for s in (own, sampler)
        ])  # fmt: skip
        assert_same(*draws, 1e-5)
        for options in itertools.product((False, True), repeat=2):
            timestep = 4 if options[0] else int(sampler.ddim_timesteps[4])
            arguments = (torch.ones(SHAPE), c, torch.full((3,), timestep), 4, False, *options)
            draws = same_draws(*[lambda s=s: s.p_sample_ddim(*arguments) for s in (own, sampler)])  # noqa: B023
            assert_same(*draws, 1e-5)
    for scale in np.linspace(2, 3, 100):
        own.p_sample_ddim(
            torch.randn(SHAPE), c, torch.full((3,), 1), 0, unconditional_guidance_scale=scale,
            unconditional_conditioning=u,
        )  # fmt: skip
    assert len(fast._tables[own]) == 64


def test_tables_are_no_part_of_the_object():
    own, (c, _) = fast_of(make()), conditions("tensor")
    own.p_sample_ddim(torch.randn(SHAPE), c, torch.full((3,), 1), 0)
    assert own in fast._tables
    assert not [v for v in vars(own).values() if isinstance(v, StepTable)]
    kept, alive = len(fast._tables), weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None
    assert len(fast._tables) < kept


def test_nothing_waits_for_the_device():
    """Nothing waits for the device from the second step at an index on, except the user's
    functions.
    """
    sampler, x = fast_of(make()), torch.randn(SHAPE)
    c, u = conditions("tensor")
    t = torch.full((3,), 17)
    for scale, quantize in itertools.product((1.0, 3.0), (False, True)):
        arguments = {"unconditional_guidance_scale": scale, "unconditional_conditioning": u}
        sampler.p_sample_ddim(x, c, t, 4, quantize_denoised=quantize, **arguments)
        with NoSync() as probe:
            sampler.p_sample_ddim(x, c, t, 4, quantize_denoised=quantize, **arguments)
        assert probe.calls > 0


def test_example():
    class DDIMSampler(ldm_ddim().DDIMSampler):
        pass

    stand_in = types.SimpleNamespace(DDIMSampler=DDIMSampler)
    modules = {"ldm": 0, "ldm.models": 0, "ldm.models.diffusion": 0, "ldm.models.diffusion.ddim": 0}
    modules = {name: types.SimpleNamespace(__path__=[]) for name in modules}
    modules["ldm.models.diffusion.ddim"] = stand_in
    model = Latent()
    model.apply_model = lambda x, t, c: 0.1 * x
    names = run_example(fast, modules, model=model)
    assert DDIMSampler.p_sample_ddim is fast.p_sample_ddim
    assert names["samples"].shape == (2, 4, 8, 8)
    assert names["samples"].isfinite().all()
