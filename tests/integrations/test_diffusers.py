"""The schedulers against diffusers' own, live: every option, every kind of timestep and noise."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim

from ..support.dropins.diffusers import CLASSES, DDIM, assert_alike, diffusers, ours, pair
from ..support.dropins.peers import run_example
from ..support.environment import Some
from ..support.probes import NoSync

SHAPE = (2, 3, 4, 5)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LIMITS: dict[str, dict[str, Any]] = {
    "free": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "threshold": {
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.7,
    },
}


def in_float64(*schedulers: Any) -> None:
    """ᾱ in float64, so that coefficients are in float64 too."""
    for scheduler in schedulers:
        for name in ("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "one"):
            if name in vars(scheduler):
                setattr(scheduler, name, getattr(scheduler, name).double())


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", DDIM)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("rederive", [False, True])
def test_ddim_steps(name: str, prediction: str, limit: str, rederive: bool, some: Some) -> None:
    """Steps in float64 agree over spacings, ends of the schedule, offsets and numbers of steps; 61
    and 103 steps are among those that end at t = −1.
    """
    every = itertools.product(
        ("leading", "trailing", "linspace"), (True, False), (0, 1), (1, 7, 50, 61, 103)
    )
    for spacing, one, offset, steps in some(
        every, name, prediction, limit, rederive, quick=4, deep=10
    ):
        theirs, own = pair(
            name,
            steps,
            prediction_type=prediction,
            timestep_spacing=spacing,
            set_alpha_to_one=one,
            steps_offset=offset,
            **LIMITS[limit],
        )
        in_float64(theirs, own)
        assert torch.equal(theirs.timesteps, own.timesteps)
        visited = theirs.timesteps.tolist()
        for t in {*visited[:2], visited[len(visited) // 2], *visited[-2:]}:
            for eta in (0.0, 0.5, 1.0):
                x, m, z = (1.5 * draw(*SHAPE) for _ in range(3))
                expected, got = (
                    s.step(m, t, x, eta, rederive, variance_noise=z) for s in (theirs, own)
                )
                assert_alike(expected, got)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "variance",
    [
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ],
)
def test_ddpm_steps(prediction: str, limit: str, variance: str, some: Some) -> None:
    learned = variance.startswith("learned")
    every = itertools.product(
        ("leading", "trailing", "linspace"), (0, 1), (1, 50, 61, None, [999, 500, 499, 3])
    )
    for spacing, offset, steps in some(every, prediction, limit, variance, quick=4, deep=8):
        theirs, own = pair(
            "DDPMScheduler",
            None,
            prediction_type=prediction,
            variance_type=variance,
            timestep_spacing=spacing,
            steps_offset=offset,
            **LIMITS[limit],
        )
        in_float64(theirs, own)
        for scheduler in (theirs, own):
            if isinstance(steps, list):
                scheduler.set_timesteps(timesteps=steps)
            elif steps is not None:
                scheduler.set_timesteps(steps)
        visited = theirs.timesteps.tolist()
        for t in {*visited[:2], visited[len(visited) // 2], *visited[-2:]}:
            x, m = draw(*SHAPE), draw(2, 6 if learned else 3, 4, 5)
            if variance == "learned":
                m[:, 3:] = m[:, 3:].abs()
            expected, got = (
                s.step(m, t, x, generator=torch.Generator().manual_seed(t % 7))
                for s in (theirs, own)
            )
            assert_alike(expected, got)


def test_ddpm_of_other_timesteps_and_variance() -> None:
    """Timesteps may be set on the scheduler itself; of a timestep that occurs twice, the first
    counts.
    """
    theirs, own = pair("DDPMScheduler", 10)
    x, m = draw(*SHAPE), draw(2, 6, 4, 5)

    def compare(t: int, m: Tensor) -> None:
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(t)
            results.append(scheduler.step(m, t, x))
        assert_alike(*results, 1e-5)

    compare(900, m[:, :3])
    for scheduler in (theirs, own):
        scheduler.timesteps = torch.tensor([901, 500, 500, 100])
    for t in (901, 500, 100):
        compare(t, m[:, :3])
    for scheduler in (theirs, own):
        scheduler.timesteps[3] = 300
    for t in (500, 300):
        compare(t, m[:, :3])
    for scheduler in (theirs, own):
        scheduler.variance_type = "learned_range"
    compare(901, m)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_inverse_steps(prediction: str, clip: bool, one: bool) -> None:
    for spacing, offset, steps in itertools.product(("leading", "trailing"), (0, 1), (7, 50, 61)):
        theirs, own = pair(
            "DDIMInverseScheduler",
            steps,
            prediction_type=prediction,
            clip_sample=clip,
            set_alpha_to_one=one,
            timestep_spacing=spacing,
            steps_offset=offset,
        )
        in_float64(theirs, own)
        assert torch.equal(theirs.timesteps, own.timesteps)
        for t in theirs.timesteps.tolist():
            if prediction == "sample" and one and t - 1000 // steps < 0:
                continue  # x_0 does not depend on the state there: 0/0
            x, m = draw(*SHAPE), draw(*SHAPE)
            assert_alike(theirs.step(m, t, x), own.step(m, t, x))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("one", [False, True])
def test_steps_of_a_batch_of_timesteps(prediction: str, one: bool) -> None:
    theirs, own = pair(
        "DDIMParallelScheduler", 50, prediction_type=prediction, set_alpha_to_one=one
    )
    in_float64(theirs, own)
    timesteps = torch.tensor([980, 500, 20, 0, -1])
    x, m = draw(5, 3, 4), draw(5, 3, 4)
    for rederive in (False, True):
        # It ends at another ᾱ than a step does, in the same table if they were mixed up.
        assert_alike(*(s.step(m, 0, x, 0.0, rederive) for s in (theirs, own)))
        expected, got = (
            s.batch_step_no_noise(m, timesteps, x, 0.0, rederive) for s in (theirs, own)
        )
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError):
        own.batch_step_no_noise(m, timesteps, x, 0.5)
    theirs, own = pair(
        "DDIMParallelScheduler", 50, prediction_type=prediction, set_alpha_to_one=one
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        expected, got = (
            s.batch_step_no_noise(m.to(dtype), timesteps, x.to(dtype)) for s in (theirs, own)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def unit_model(x: Tensor, t: Any) -> Tensor:
    return x * 0.7 / (1 + x * x) + float(t) / 4000


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_whole_loops(name: str, dtype: torch.dtype) -> None:
    """Loops with the same generator give the same samples, and leave the generator in the same
    state.
    """
    etas = (0.0, 1.0) if name in DDIM else (None,)
    for eta, spacing in itertools.product(etas, ("leading", "trailing")):
        theirs, own = pair(name, 20, timestep_spacing=spacing)
        results, states = [], []
        for scheduler in (theirs, own):
            generator = torch.Generator().manual_seed(3)
            x = draw_like(dtype)
            kwargs: dict[str, Any] = (
                {} if name == "DDIMInverseScheduler" else {"generator": generator}
            )
            if eta is not None:
                kwargs["eta"] = eta
            for t in scheduler.timesteps:
                x = scheduler.step(unit_model(x, t), t, x, **kwargs).prev_sample
            results.append(x)
            states.append(generator.get_state())
        assert torch.equal(*states)
        tolerance = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2}.get(dtype, 0.2)
        torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def draw_like(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_is_no_worse(dtype: torch.dtype, prediction: str) -> None:
    theirs, own = pair("DDIMScheduler", 50, prediction_type=prediction, clip_sample=False)
    exact, _ = pair("DDIMScheduler", 50, prediction_type=prediction, clip_sample=False)
    in_float64(exact)
    for t, eta in itertools.product((980, 500, 20), (0.0, 1.0)):
        x, m, z = (draw(4, 4, 32, 32, dtype=dtype) for _ in range(3))
        truth = exact.step(m.double(), t, x.double(), eta, variance_noise=z.double())
        expected, got = (s.step(m, t, x, eta, variance_noise=z) for s in (theirs, own))
        for field in ("prev_sample", "pred_original_sample"):
            error, peer = ((r[field].double() - truth[field]).abs().mean() for r in (got, expected))
            assert error <= peer


@pytest.mark.parametrize("name", DDIM)
def test_noise_is_drawn_as_diffusers_draws_it(name: str) -> None:
    theirs, own = pair(name)
    x, m = draw(*SHAPE).float(), draw(*SHAPE).float()

    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for make in (lambda: seeded(1)[0], lambda: seeded(1, 2), lambda: seeded(5)):
        generators = make(), make()
        expected, got = (
            s.step(m, 500, x, 0.7, generator=g)
            for s, g in zip((theirs, own), generators, strict=True)
        )
        assert_alike(expected, got, 1e-5)
        for a, b in zip(*(g if isinstance(g, list) else [g] for g in generators), strict=True):
            assert torch.equal(a.get_state(), b.get_state())
    results = []
    for scheduler in (theirs, own):
        torch.manual_seed(8)
        results.append(scheduler.step(m, 500, x, 1.0))
        results.append(torch.get_rng_state())
    assert_alike(results[0], results[2], 1e-5)
    assert torch.equal(results[1], results[3])


def test_no_noise_is_drawn_where_none_is_added() -> None:
    for name, t in (("DDIMScheduler", 500), ("DDPMScheduler", 0)):
        _, own = pair(name)
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        own.step(draw(*SHAPE), t, draw(*SHAPE), generator=generator)
        assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "kind",
    [int, np.int64, torch.tensor, lambda t: torch.tensor(t, dtype=torch.int32)],
    ids=["int", "numpy", "tensor", "int32"],
)
def test_kinds_of_timestep(name: str, kind: Any) -> None:
    """A timestep may be of every kind, among the scheduler's own or, if diffusers takes it,
    elsewhere.
    """
    theirs, own = pair(name, 10)
    x, m = draw(*SHAPE), draw(*SHAPE)
    for t in (900, 100) if name == "DDPMScheduler" else (900, 1, 49, 999):
        arguments = (m, kind(t), x)
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(0)
            results.append(scheduler.step(*arguments))
        assert_alike(*results, 1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_timesteps_out_of_range(name: str) -> None:
    theirs, own = pair(name, 10)
    for t in (1000, 5000, 501, -1) if name == "DDPMScheduler" else (1000, 5000, -1001):
        for scheduler in (theirs, own):
            with pytest.raises(IndexError):
                scheduler.step(draw(*SHAPE), t, draw(*SHAPE))


def test_an_offset_past_the_end_names_the_timestep() -> None:
    _, own = pair("DDIMScheduler", 1000, steps_offset=1)
    with pytest.raises(
        IndexError, match=r"timestep: expected an index .* \[-1000, 1000\), got 1000"
    ):
        own.step(draw(*SHAPE), own.timesteps[0], draw(*SHAPE))


@pytest.mark.parametrize("name", CLASSES)
def test_config_is_read_when_used(name: str) -> None:
    theirs, own = pair(name)
    x, m = 3 * draw(*SHAPE), draw(*SHAPE)

    def compare() -> Tensor:
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(0)
            results.append(scheduler.step(m, 500, x))
        assert_alike(*results, 1e-5)
        return results[0].prev_sample

    seen = [compare()]
    for change in (
        {"clip_sample": False},
        {"prediction_type": "v_prediction"},
        {"clip_sample": True, "clip_sample_range": 0.3},
    ):
        for scheduler in (theirs, own):
            scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(
                {**scheduler._internal_dict, **change}
            )
        seen.append(compare())
    for scheduler in (theirs, own):
        scheduler.register_to_config(prediction_type="sample")
    seen.append(compare())
    for scheduler in (theirs, own):
        scheduler.set_timesteps(20)
    if name != "DDPMScheduler":
        seen.append(compare())
    for scheduler in (theirs, own):
        scheduler.alphas_cumprod[100:700] *= 0.9
    seen.append(compare())
    for scheduler in (theirs, own):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.95
    seen.append(compare())
    for scheduler in (theirs, own):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.95
    seen.append(compare())
    for a, b in itertools.pairwise(seen):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", DDIM)
def test_zero_terminal_snr(name: str, prediction: str, eta: float) -> None:
    theirs, own = pair(
        name,
        20,
        prediction_type=prediction,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    in_float64(theirs, own)
    x = draw(*SHAPE)
    for t in theirs.timesteps:
        m, z = draw(*SHAPE), draw(*SHAPE)
        for rederive in (False, True):
            expected, got = (
                s.step(m, t, x, eta, rederive, variance_noise=z) for s in (theirs, own)
            )
            if t == 999 and eta == 1:
                # 1 − ᾱ_prev − σ² is 0 except for rounding: theirs has the root of that, or NaN.
                assert got.prev_sample.isfinite().all()
                torch.testing.assert_close(
                    expected.prev_sample.where(~expected.prev_sample.isnan(), got.prev_sample),
                    got.prev_sample,
                    rtol=1e-6,
                    atol=1e-6,
                )
            else:
                assert_alike(expected, got, 1e-9)
        x = got.prev_sample


def test_an_eta_that_leaves_no_variance_gives_nan_as_there() -> None:
    theirs, own = pair("DDIMScheduler", 10, clip_sample=False)
    x, m = draw(*SHAPE), draw(*SHAPE)
    for t in theirs.timesteps:
        expected, got = (s.step(m, t, x, 1.6, variance_noise=x) for s in (theirs, own))
        assert_alike(expected, got, 1e-5)
    assert expected.prev_sample.isfinite().all()


def test_errors_are_those_of_diffusers() -> None:
    x, m = draw(*SHAPE), draw(*SHAPE)
    theirs, own = pair("DDIMScheduler", None)
    for scheduler in (theirs, own):
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            scheduler.step(m, 500, x)
        scheduler.set_timesteps(50)
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            scheduler.step(m, 500, x, 1.0, generator=torch.Generator(), variance_noise=x)
        scheduler.step(m, 500, x, 0.0, generator=torch.Generator(), variance_noise=x)
        scheduler.register_to_config(prediction_type="score")
        with pytest.raises(ValueError, match="prediction_type given as score must be one of"):
            scheduler.step(m, 500, x)


@pytest.mark.parametrize("name", CLASSES)
def test_what_the_kernel_does_not_take(name: str) -> None:
    """Tensors that broadcast, and integers, give the results of diffusers."""
    theirs, own = pair(name)
    cases = [
        (draw(1, 3, 4, 5), draw(*SHAPE)),
        (draw(*SHAPE), draw(1, 3, 4, 5)),
        (draw(*SHAPE), torch.randint(-3, 3, SHAPE)),
    ]
    for m, x in cases:
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(0)
            results.append(scheduler.step(m, 500, x))
        assert_alike(*results, 1e-5)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mixed_dtypes(name: str, prediction: str) -> None:
    """The results have the dtypes that the results of diffusers have, and are no further from the
    exact values.
    """
    theirs, own = pair(name, prediction_type=prediction)
    for of_m, of_x in itertools.permutations(
        (torch.float64, torch.float32, torch.float16, torch.bfloat16), 2
    ):
        m, x = draw(4, 3, 16, 16, dtype=of_m), draw(4, 3, 16, 16, dtype=of_x)
        kwargs = {} if name not in DDIM else {"eta": 0.5, "variance_noise": m}
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(0)
            results.append(scheduler.step(m, 500, x, **kwargs))
        expected, got = results
        assert (
            got.prev_sample.dtype == expected.prev_sample.dtype == torch.promote_types(of_m, of_x)
        )
        assert got.pred_original_sample.dtype == expected.pred_original_sample.dtype
        tolerance = 1e-5 if {of_m, of_x} <= {torch.float64, torch.float32} else 3e-2
        for field in ("prev_sample", "pred_original_sample"):
            torch.testing.assert_close(
                got[field].double(), expected[field].double(), rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("ratio", [0.0, 1e-3, 1.0, 1.5])
def test_ends_of_thresholding(ratio: float) -> None:
    """A ratio that is no quantile is refused, as in diffusers."""
    for limit in (0.5, 1.0, 30.0):
        theirs, own = pair(
            "DDIMScheduler",
            thresholding=True,
            dynamic_thresholding_ratio=ratio,
            sample_max_value=limit,
        )
        x, m = draw(*SHAPE), draw(*SHAPE)
        if ratio > 1:
            for scheduler in (theirs, own):
                with pytest.raises(RuntimeError, match="quantile"):
                    scheduler.step(m, 700, x)
        else:
            assert_alike(theirs.step(m, 700, x), own.step(m, 700, x), 1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "expanded", "empty"])
def test_layouts(layout: str) -> None:
    theirs, own = pair("DDIMScheduler")
    x, m, z = (draw(2, 4, 6, 8) for _ in range(3))
    change = {
        "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
        "sliced": lambda v: v[..., ::2],
        "permuted": lambda v: v.permute(0, 3, 1, 2),
        "expanded": lambda v: v[:, :1].expand(2, 4, 6, 8),
        "empty": lambda v: v[:0],
    }[layout]
    x, m, z = change(x), change(m), change(z)
    results = [s.step(m, 500, x, 0.5, variance_noise=z, return_dict=False) for s in (theirs, own)]
    assert_alike(*results, 1e-5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_add_noise_and_velocity(name: str, dtype: torch.dtype) -> None:
    theirs, own = pair(name)
    in_float64(theirs, own)
    x, noise = draw(5, 3, 7, dtype=dtype), draw(5, 3, 7, dtype=dtype)
    for timesteps in (torch.tensor([0, 10, 500, 999, 3]), torch.tensor([700])):
        for method in ("add_noise", "get_velocity"):
            expected, got = (getattr(s, method)(x, noise, timesteps) for s in (theirs, own))
            exact = getattr(theirs, method)(x.double(), noise.double(), timesteps)
            assert got.dtype == expected.dtype == dtype
            assert (got - exact).abs().mean() <= (expected - exact).abs().mean() + 1e-15
            assert (got - exact).abs().max() <= 4 * torch.finfo(dtype).eps * 4
    one = torch.tensor(4)
    assert torch.equal(own.add_noise(x, noise, one), own.add_noise(x, noise, one[None]))
    with pytest.raises(IndexError):
        own.add_noise(x, noise, torch.tensor([1000]))
    negative = torch.tensor([-1])
    torch.testing.assert_close(
        own.add_noise(x, noise, negative), theirs.add_noise(x, noise, negative)
    )


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_gradients(limit: str, eta: float) -> None:
    theirs, own = pair("DDIMScheduler", **LIMITS[limit])
    in_float64(theirs, own)
    values, weights = [2 * draw(*SHAPE) for _ in range(3)], [draw(*SHAPE) for _ in range(2)]
    grads = []
    for scheduler in (theirs, own):
        x, m, z = (v.clone().requires_grad_() for v in values)
        out = scheduler.step(m, 500, x, eta, variance_noise=z, return_dict=False)
        sum((w * o).sum() for w, o in zip(weights, out, strict=True)).backward()
        grads.append([g if g is not None else torch.zeros(SHAPE) for g in (x.grad, m.grad, z.grad)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b.double(), a.double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_gradients_of_ddpm(variance: str) -> None:
    theirs, own = pair("DDPMScheduler", variance_type=variance)
    in_float64(theirs, own)
    channels = 6 if variance == "learned_range" else 3
    values, weights = (draw(*SHAPE), draw(2, channels, 4, 5)), [draw(*SHAPE) for _ in range(2)]
    grads = []
    for scheduler in (theirs, own):
        x, m = (v.clone().requires_grad_() for v in values)
        generator = torch.Generator().manual_seed(0)
        out = scheduler.step(m, 500, x, generator=generator, return_dict=False)
        sum((w * o).sum() for w, o in zip(weights, out, strict=True)).backward()
        grads.append((x.grad, m.grad))
    for a, b in zip(*grads, strict=True):
        assert a.abs().max() > 1e-3
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_gradients_of_mixing(method: str) -> None:
    theirs, own = pair("DDIMScheduler", None)
    in_float64(theirs, own)
    values, weight, timesteps = (draw(3, 5), draw(3, 5)), draw(3, 5), torch.tensor([0, 400, 999])
    grads = []
    for scheduler in (theirs, own):
        x, noise = (v.clone().requires_grad_() for v in values)
        (weight * getattr(scheduler, method)(x, noise, timesteps)).sum().backward()
        grads.append((x.grad, noise.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_those_of_diffusers(name: str) -> None:
    """Signatures are those of diffusers, since pipelines read them to see the arguments of a
    scheduler.
    """
    for method in ("step", "set_timesteps", "add_noise", "get_velocity", "batch_step_no_noise"):
        theirs = getattr(getattr(diffusers, name), method, None)
        own = getattr(getattr(ours, name), method, None)
        if theirs is None:
            assert own is None
            continue
        expected, got = (inspect.signature(f).parameters for f in (theirs, own))
        if method == "set_timesteps":
            # As DDPM's has it, so that pipelines find `timesteps`; the number may be left out.
            assert list(got) == ["self", "num_inference_steps", "device", "timesteps"]
            assert list(got)[: len(expected)] == list(expected)
            assert all(p.default is None for p in list(got.values())[1:])
            continue
        assert list(got) == list(expected)
        assert [p.default for p in got.values()] == [p.default for p in expected.values()]


@pytest.mark.parametrize("name", CLASSES)
def test_save_and_load(name: str, tmp_path: Any) -> None:
    theirs, own = pair(name, prediction_type="v_prediction", clip_sample_range=0.6)
    own.save_pretrained(tmp_path)
    x, m = draw(*SHAPE), draw(*SHAPE)
    torch.manual_seed(0)
    expected = theirs.step(m, 500, x)
    for cls in (getattr(ours, name), getattr(diffusers, name)):
        loaded = cls.from_pretrained(tmp_path)
        loaded.set_timesteps(50)
        torch.manual_seed(0)
        assert_alike(expected, loaded.step(m, 500, x), 1e-5)
    back = getattr(diffusers, name).from_config(own.config)
    assert type(back) is getattr(diffusers, name)
    saved = {k: v for k, v in own.config.items() if not k.startswith("_")}
    assert saved == {k: v for k, v in theirs.config.items() if not k.startswith("_")}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("name", CLASSES)
def test_copies(name: str, copied: Any) -> None:
    _, own = pair(name)
    x, m = draw(*SHAPE), draw(*SHAPE)
    torch.manual_seed(0)
    expected = own.step(m, 500, x)
    torch.manual_seed(0)
    assert_alike(expected, copied(own).step(m, 500, x))
    if name != "DDIMInverseScheduler":
        own.set_noise("philox", seed=5, sample_offset=2)
        eta = {"eta": 1.0} if name in DDIM else {}
        assert_alike(own.step(m, 500, x, **eta), copied(own).step(m, 500, x, **eta))


@pytest.mark.parametrize("name", CLASSES)
def test_pickles_and_pipelines_name_the_package_alone(name: str) -> None:
    """Pickles and pipelines name the package only: later versions move files, and load what earlier
    ones have saved.
    """
    _, own = pair(name)
    own.set_noise("philox", seed=5)
    strings = [
        argument
        for _, argument, _ in pickletools.genops(pickle.dumps(own))
        if isinstance(argument, str) and argument.startswith("fastddim")
    ]
    assert set(strings) == {"fastddim.integrations.diffusers"}
    assert type(own).__module__ == "fastddim.integrations.diffusers"
    # What earlier versions have pickled in the place of a scheduler's tables.
    restored = ours._restored(5, 2)
    assert (restored.seed, restored.sample_offset) == (5, 2)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("whole", [True, False], ids=["made and used", "used"])
def test_in_inference_mode(name: str, whole: bool) -> None:
    """Pipelines run in inference mode, and their schedulers serve outside it afterwards."""
    theirs, own = pair(name, None)
    x, m = draw(*SHAPE), draw(*SHAPE)
    with torch.inference_mode():
        if whole:
            theirs, own = pair(name, None)
        for scheduler in (theirs, own):
            scheduler.set_timesteps(10)
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(0)
            results.append(scheduler.step(m, 500, x))
        assert_alike(*results, 1e-5)
    results = []
    for scheduler in (theirs, own):
        torch.manual_seed(0)
        results.append(scheduler.step(m, 500, x))
    assert_alike(*results, 1e-5)


def test_an_eta_that_is_no_number_is_for_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An η that is no number is left to diffusers, even if it equals the η of the step before."""
    _, own = pair("DDIMScheduler")
    x, m = draw(*SHAPE), draw(*SHAPE)
    own.step(m, 500, x, 0.5, variance_noise=x)
    calls = []
    original = diffusers.DDIMScheduler.step
    monkeypatch.setattr(
        diffusers.DDIMScheduler,
        "step",
        lambda self, *arguments: calls.append(1) or original(self, *arguments),
    )
    own.step(m, 500, x, torch.tensor(0.5), variance_noise=x)
    assert calls
    own.step(m, 500, x, True, variance_noise=x)
    own.step(m, 500, x, 1, variance_noise=x)
    assert len(calls) == 1


def test_the_output_object_is_a_whole_one() -> None:
    theirs, own = pair("DDIMScheduler")
    x, m = draw(*SHAPE), draw(*SHAPE)
    expected, got = theirs.step(m, 500, x), own.step(m, 500, x)
    assert list(got.keys()) == list(expected.keys())
    assert got.prev_sample is got["prev_sample"]
    assert got[0] is got.to_tuple()[0]
    restored = pickle.loads(pickle.dumps(got))
    assert type(restored) is type(expected)
    assert torch.equal(restored.prev_sample, got.prev_sample)
    got.prev_sample = x
    assert got["prev_sample"] is x
    assert repr(got).startswith("DDIMSchedulerOutput(prev_sample=")


class TestOnADevice:
    """Timesteps on a device are recognised by their address. "meta" stands in for a device: its
    tensors have no values, so that reading one fails.
    """

    @pytest.mark.parametrize("name", CLASSES)
    def test_nothing_waits(self, name: str) -> None:
        _, own = pair(name, None)
        own.set_timesteps(10, device="meta")
        assert own.timesteps.device.type == "meta"
        x = torch.zeros(SHAPE, device="meta")
        for view in (own.timesteps, own.timesteps[3:], own.timesteps[::2]):
            for t in view:
                own.step(x, t, x)

    @pytest.mark.parametrize("name", CLASSES)
    def test_values_are_right(self, name: str) -> None:
        _, own = pair(name, None)
        own.set_timesteps(10, device="meta")
        values = list(range(0, 1000, 100))
        values = values if name == "DDIMInverseScheduler" else values[::-1]
        assert [own._host_value(t) for t in own.timesteps] == values
        assert [own._host_value(t) for t in own.timesteps[4::3]] == values[4::3]

    def test_elements_of_elsewhere_are_used_where_they_lie(self) -> None:
        _, own = pair("DDIMScheduler", None)
        own.set_timesteps(10, device="meta")
        x = torch.zeros(SHAPE, device="meta")
        for t in (
            torch.zeros((), dtype=torch.int32, device="meta"),
            own.timesteps.clone()[2],
            own.timesteps.view(torch.int32)[2],
        ):
            assert own._host_value(t) is None
            assert own.step(x, t, x).prev_sample.shape == SHAPE

    @pytest.mark.parametrize("name", CLASSES[:3])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
    def test_rows_read_where_they_lie(
        self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, own = pair(name)
        x, m = draw(*SHAPE), draw(*SHAPE)
        for t in (999, 500, 1, 0, -1, -1000):
            expected = own.step(m, t, x)
            with monkeypatch.context() as patched:
                patched.setattr(own, "_host_value", lambda t: None)
                got = own.step(m, torch.tensor(t, dtype=dtype), x)
            assert_alike(expected, got, 0.0)

    @pytest.mark.parametrize("name", CLASSES)
    def test_copies_know_theirs(self, name: str) -> None:
        _, own = pair(name, None)
        own.set_timesteps(10, device="meta")
        other = copy.deepcopy(own)
        assert other.timesteps is not own.timesteps
        values = [own._host_value(t) for t in own.timesteps]
        assert [other._host_value(t) for t in other.timesteps] == values
        own.timesteps.add_(1)
        other = copy.deepcopy(own)
        assert other._host_value(other.timesteps[0]) is None

    def test_changed_in_place_they_are_no_longer_known(self) -> None:
        _, own = pair("DDIMScheduler", None)
        own.set_timesteps(10, device="meta")
        own.timesteps.add_(1)
        assert own._host_value(own.timesteps[0]) is None

    @pytest.mark.parametrize("name", CLASSES)
    def test_under_the_probe(self, name: str) -> None:
        _, own = pair(name, 10)
        x, m = draw(*SHAPE), draw(*SHAPE)
        own.step(m, 500, x)
        t = own.timesteps[4].item()
        with NoSync() as probe:
            own.step(m, t, x)
        assert probe.calls > 0


class TestPhilox:
    """The noise of noise="philox" is that of `fastddim.sample`."""

    @pytest.mark.parametrize("seed", [7, [3, 2**64 - 1]])
    def test_ddim(self, seed: Any) -> None:
        theirs = diffusers.DDIMScheduler(clip_sample=False)
        own = ours.DDIMScheduler.from_config(theirs.config, noise="philox", seed=seed)
        own.set_timesteps(10)
        x = x_T = draw(*SHAPE)
        for t in own.timesteps:
            x = own.step(unit_model(x, t), t, x, eta=1.0).prev_sample
        expected = fastddim.sample(
            lambda x, t: unit_model(x, t[0]),
            10,
            x_T=x_T,
            eta=1.0,
            seed=seed,
            spacing="leading",
            schedule=fastddim.Schedule.from_diffusers(theirs),
        )
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
        generator = torch.Generator()
        first = own.step(x, 500, x, 1.0, generator=generator).prev_sample
        assert not torch.equal(first, own.step(x, 500, x, 1.0).prev_sample)

    def test_ddpm(self) -> None:
        own = ours.DDPMScheduler(clip_sample=False)
        own.set_noise("philox", seed=4, sample_offset=2)
        own.set_timesteps(10)
        x, m = draw(*SHAPE), draw(*SHAPE)
        for s, t in enumerate(own.timesteps.tolist()[:-1]):
            a, p = (own.alphas_cumprod[i].item() for i in (t, t - 100))
            expected = fastddim.step(
                x, m, a, p, eta=1.0, rederive_eps=True, seed=4, sample_offset=2, step_index=s
            )
            torch.testing.assert_close(
                own.step(m, t, x).prev_sample, expected, rtol=1e-4, atol=1e-4
            )

    def test_it_can_be_changed_and_left(self) -> None:
        _, own = pair("DDIMScheduler")
        x, m = draw(*SHAPE), draw(*SHAPE)

        def step() -> Tensor:
            torch.manual_seed(0)
            return own.step(m, 500, x, 1.0).prev_sample

        drawn = step()
        own.set_noise("philox", seed=1)
        first = step()
        own.set_noise("philox", seed=2)
        assert not torch.equal(step(), first)
        assert not torch.equal(first, drawn)
        own.set_noise("torch")
        assert torch.equal(step(), drawn)

    def test_steps_are_counted_in_the_timesteps_of_now(self) -> None:
        """Steps are counted in the present timesteps, however these have changed: the first takes
        the noise of step 0.
        """
        _, own = pair("DDIMScheduler")
        own.set_noise("philox", seed=1)
        x = draw(*SHAPE)

        def noise(t: int) -> Tensor:
            drawn = (
                own.step(x, t, x, 1.0).prev_sample
                - own.step(x, t, x, 1.0, variance_noise=torch.zeros_like(x)).prev_sample
            )
            return drawn / drawn.std()

        first, second = noise(980), noise(960)
        own.timesteps = torch.tensor([500, 960])
        torch.testing.assert_close(noise(500), first)
        torch.testing.assert_close(noise(960), second)
        own.timesteps[0] = 700
        torch.testing.assert_close(noise(700), first)

    def test_errors(self) -> None:
        _, own = pair("DDIMScheduler")
        with pytest.raises(ValueError, match="noise: expected one of 'torch', 'philox', got 'cpu'"):
            own.set_noise("cpu")
        own.set_noise("philox")
        with pytest.raises(ValueError, match="timestep: expected one of the scheduler's timesteps"):
            own.step(draw(*SHAPE), 501, draw(*SHAPE), 1.0)


def test_schedulers_that_are_left_take_their_tables_along() -> None:
    """The number of tables is bounded for any number of different η."""
    _, own = pair("DDIMScheduler")
    x = draw(*SHAPE)
    for i in range(100):
        own.step(x, 500, x, i / 100, variance_noise=x)
    assert len(own._fastddim_work.tables) == 16


@pytest.mark.parametrize("name", [*CLASSES, None])
def test_the_examples_run(name: str | None) -> None:
    run_example(getattr(ours, name) if name else ours)
