"""Samplers of policies' loops, against loops over schedulers of diffusers, live."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from fastddim import notices
from fastddim.integrations._policies import LoopCall, Samplers
from fastddim.integrations._scheduler_steps import SchedulerSteps, Uncovered

from ..support.dropins.peers import assert_same, same_draws
from ..support.optional import optional

diffusers = optional("diffusers")

SPACINGS = ("leading", "trailing", "linspace")
STEPS = [(1, 0), (7, 1), (10, 0), (29, 0), (50, 0)]
"""(number of steps, offset of those that lead); trailing, 29 of 50 visit t = −1 too."""

PREDICTIONS = ("epsilon", "sample", "v_prediction")
LIMITS = {
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "no clip": {"clip_sample": False},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5},
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t, shift):
        return torch.tanh(self.weight * x.flip(1) + shift[:, None] - t[:, None, None] / 100)


@pytest.fixture(autouse=True)
def no_warning_given(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())


def scheduler_of(kind, **config):
    return getattr(diffusers, kind)(50, **config)


def loop(network, scheduler, steps, shift, step_kwargs):
    """The loop of policies over a scheduler."""
    x = torch.randn(2, 4, 3, dtype=shift.dtype)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = network(x, t.expand(2), shift)
        x = scheduler.step(output, t, x, **step_kwargs).prev_sample
    return x


def compare(scheduler, steps, **step_kwargs):
    network, shift = Network().eval().double(), torch.randn(2, 3, dtype=torch.float64)
    call = LoopCall(
        network,
        scheduler,
        steps,
        (2, 4, 3),
        torch.float64,
        torch.device("cpu"),
        {"shift": shift},
        step_kwargs,
    )
    with torch.no_grad():
        sampler = Samplers("policies").find(call)
        own, expected = same_draws(
            lambda: sampler.draw({"shift": shift}),
            lambda: loop(network, scheduler, steps, shift, step_kwargs),
        )
    assert_same(own, expected, 1e-9)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_network_is_in_the_mode_of_the_caller(mode):
    def network(x, t, shift):
        seen.append(torch.is_inference_mode_enabled())
        return x * shift[:, None, :]

    seen, shift = [], torch.randn(2, 3)
    call = LoopCall(
        network,
        scheduler_of("DDPMScheduler"),
        5,
        (2, 4, 3),
        torch.float32,
        torch.device("cpu"),
        {"shift": shift},
    )
    sampler = Samplers("policies").find(call)
    seen.clear()
    with mode():
        sampler.draw({"shift": shift})
    assert seen == 5 * [mode is torch.inference_mode]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
class TestSteps:
    """Whole loops, with the noise that they draw."""

    def test_ddim(self, prediction, limit, some):
        every = product(SPACINGS, STEPS, (True, False), (0, 0.4, 1.0), (True, False))
        for spacing, (steps, offset), one, eta, clipped in some(
            every, prediction, limit, quick=3, deep=30
        ):
            scheduler = scheduler_of(
                "DDIMScheduler",
                timestep_spacing=spacing,
                steps_offset=offset,
                set_alpha_to_one=one,
                prediction_type=prediction,
                **LIMITS[limit],
            )
            compare(scheduler, steps, eta=eta, use_clipped_model_output=clipped)

    def test_ddpm(self, prediction, limit, some):
        variances = ("fixed_small", "fixed_small_log", "fixed_large")
        every = product(SPACINGS, STEPS, variances)
        for spacing, (steps, offset), variance in some(every, prediction, limit, quick=3, deep=30):
            scheduler = scheduler_of(
                "DDPMScheduler",
                timestep_spacing=spacing,
                steps_offset=offset,
                variance_type=variance,
                prediction_type=prediction,
                **LIMITS[limit],
            )
            compare(scheduler, steps)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_zero_terminal_snr(kind):
    scheduler = scheduler_of(kind, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    compare(scheduler, 10)


def test_scheduler_is_left_as_it_is():
    scheduler = scheduler_of("DDIMScheduler")
    SchedulerSteps.of(scheduler, 7, {})
    assert len(scheduler.timesteps) == 50
    assert scheduler.num_inference_steps is None


class OtherStep:
    def step(self, model_output, *args, **kwargs):
        return super().step(1.001 * model_output, *args, **kwargs)


class Failing:
    def step(self, *args, **kwargs):
        raise RuntimeError("no step")


@pytest.mark.parametrize(
    ("kind", "config", "step_kwargs", "reason"),
    [
        ("DPMSolverMultistepScheduler", {}, {}, "none of DDIMScheduler, DDPMScheduler: DPMSolver"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, {}, "variance_type='learned_range'"),
        ("DDIMScheduler", {"prediction_type": "score"}, {}, "prediction_type='score'"),
        ("DDPMScheduler", {}, {"eta": 0.5}, r"calls DDPMScheduler.step with eta=0.5"),
        ("DDIMScheduler", {}, {"variance_noise": None}, "step with variance_noise=None"),
        ("DDIMScheduler", {}, {"eta": -1.0}, "timestep 40 is none of DDPM's or DDIM's"),
        (OtherStep, {}, {}, "its scheduler, OtherStep, at timestep 40 is none of DDPM's or DDIM's"),
        (Failing, {}, {}, "its scheduler's step at timestep 40 fails: no step"),
    ],
)
def test_uncovered(kind, config, step_kwargs, reason):
    """Steps that no sampler takes, each with its reason."""
    if isinstance(kind, type):
        mixed = type(kind.__name__, (kind, diffusers.DDIMScheduler), {})
        scheduler = mixed(50, **config)
    else:
        scheduler = scheduler_of(kind, **config)
    with pytest.raises(Uncovered, match=reason):
        SchedulerSteps.of(scheduler, 5, step_kwargs)


def test_schedulers_of_this_package(some):
    """Schedulers of this package are those of diffusers with other code; noise of their own is not
    the loop's.
    """
    from fastddim.integrations.diffusers import DDIMScheduler, DDPMScheduler

    compare(DDIMScheduler(50), 5, eta=1.0)
    compare(DDPMScheduler(50), 5)
    seeded = DDIMScheduler.from_config(DDIMScheduler(50).config, noise="philox", seed=1)
    with pytest.raises(Uncovered, match="none of DDPM's or DDIM's"):
        SchedulerSteps.of(seeded, 5, {"eta": 1.0})


def test_noise_of_generators():
    """`normal_` fills a row with the numbers of `torch.randn`, however few they are."""
    for shape in [(1,), (2, 3), (15,), (16,), (17,), (4, 16, 2)]:
        rows = torch.empty(3, *shape)
        own, expected = same_draws(
            lambda: [row.normal_() for row in rows],  # noqa: B023
            lambda: [torch.randn(shape) for _ in range(3)],  # noqa: B023
        )
        assert_same(own, expected, 0)


def test_memory_is_bounded():
    network, shift = Network().eval(), torch.randn(1, 3)
    samplers, scheduler = Samplers("policies"), scheduler_of("DDIMScheduler")
    for steps in range(1, 9):
        samplers.find(
            LoopCall(
                network,
                scheduler,
                steps,
                (1, 4, 3),
                torch.float32,
                torch.device("cpu"),
                {"shift": shift},
            )
        )
    assert len(samplers._kept) == 4
