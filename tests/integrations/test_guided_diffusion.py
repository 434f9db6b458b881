"""Live comparison with the port of guided-diffusion in coqui-tts."""

from __future__ import annotations

import copy
import gc
import itertools
import types
import weakref

import pytest
import torch

from fastddim.integrations import guided_diffusion
from fastddim.steptable import StepTable

from ..support.dropins.guided_diffusion import Model, fast, make
from ..support.dropins.peers import TOLERANCE, assert_same, run_example, same_draws
from ..support.dropins.peers import guided_diffusion as load_peer
from ..support.probes import NoSync

SHAPE = (3, 2, 5, 7)
KINDS = ["EPSILON", "START_X", "PREVIOUS_X"]


def gradient(x, t, shift=0.0):
    return -x * (0.3 + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / 1000) + shift


def draw(dtype, shape=SHAPE):
    return torch.randn(shape, dtype=dtype)


def compare(diffusion, run, tolerance):
    own, expected = same_draws(lambda: run(fast(diffusion)), lambda: run(diffusion))
    assert_same(own, expected, tolerance)
    return own


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps(kind, variance, dtype, some):
    """Steps agree for every option, with a timestep of its own for each sample, the first and the
    last among them.
    """
    diffusion, model = make(kind, variance), Model(learned="LEARNED" in variance)
    x, t = draw(dtype), torch.tensor([0, 19, 7])
    every = itertools.product(
        (True, False),
        (None, lambda x_0: 0.9 * x_0 + 0.2),
        (None, gradient),
        ({}, {"shift": 0.25}),
        (0.0, 0.7, 1.0, 3.0),
    )
    for clip, denoised_fn, cond_fn, kwargs, eta in some(every, kind, variance, dtype, quick=16):
        common = {"clip_denoised": clip, "denoised_fn": denoised_fn, "model_kwargs": kwargs}
        compare(
            diffusion,
            lambda d: d.ddim_sample(model, x, t, cond_fn=cond_fn, eta=eta, **common),  # noqa: B023
            TOLERANCE[dtype],
        )
    compare(diffusion, lambda d: d.ddim_reverse_sample(model, x, t, **common), TOLERANCE[dtype])
    common["clip_denoised"], common["denoised_fn"] = True, None
    compare(diffusion, lambda d: d.ddim_reverse_sample(model, x, t, **common), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spaced", [None, "ddim10", "3,5,2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_loops(rescale, spaced, dtype):
    diffusion, model = make(spaced=spaced, rescale=rescale), Model()
    for eta, cond_fn, shape in (
        (0.0, None, SHAPE),
        (0.6, gradient, SHAPE),
        (1.0, None, (1, 1, 33)),
    ):
        noise = draw(dtype, shape)
        arguments = {"cond_fn": cond_fn, "model_kwargs": {"shift": 0.1}, "eta": eta}
        progressive = compare(
            diffusion,
            lambda d: in_scale(
                diffusion,
                d.ddim_sample_loop_progressive(model, shape, noise=noise, **arguments),  # noqa: B023
            ),
            TOLERANCE[dtype],
        )
        last = compare(
            diffusion,
            lambda d: d.ddim_sample_loop(model, shape, noise=noise, **arguments),  # noqa: B023
            TOLERANCE[dtype],
        )
        assert torch.equal(progressive[-1]["sample"], last)
        assert not last.requires_grad
    drawn = lambda d: d.ddim_sample_loop(model, [2, 1, 4], clip_denoised=False, progress=True)  # noqa: E731
    compare(diffusion, drawn, 1e-5)
    x = draw(torch.float64)
    compare(diffusion, lambda d: up_and_down(d, model, x), 1e-10)


def in_scale(diffusion, outputs):
    """x_0 times √ᾱ, as it is in the state: x_0 itself has the state's rounding over √ᾱ."""
    return [
        {**out, "pred_xstart": out["pred_xstart"] * a**0.5}
        for out, a in zip(outputs, diffusion.alphas_cumprod[::-1], strict=True)
    ]


@torch.no_grad()
def up_and_down(diffusion, model, x):
    indices = range(diffusion.num_timesteps - 1)
    for i in indices:
        t = torch.full(x.shape[:1], i)
        x = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=False)["sample"]
    for i in reversed(indices):
        t = torch.full(x.shape[:1], i)
        x = diffusion.ddim_sample(model, x, t, clip_denoised=False)["sample"]
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    """As in the original, the state becomes float32."""
    diffusion, x, t = make(), draw(torch.float32).to(dtype), torch.tensor([0, 19, 7])
    for cond_fn in (None, gradient):
        out = compare(
            diffusion,
            lambda d: d.ddim_sample(Model(), x, t, cond_fn=cond_fn, model_kwargs={}, eta=0.5),  # noqa: B023
            1e-5,
        )
        assert out["sample"].dtype == out["pred_xstart"].dtype == torch.float32


def test_gradients():
    diffusion, model, t = make(), Model(), torch.tensor([3, 19, 7])
    weights = draw(torch.float64), draw(torch.float64)
    for denoised_fn, cond_fn in itertools.product((None, torch.tanh), (None, gradient)):
        x = draw(torch.float64).requires_grad_()

        def gradients(d):
            out = d.ddim_sample(
                model,
                x,  # noqa: B023
                t,
                denoised_fn=denoised_fn,  # noqa: B023
                cond_fn=cond_fn,  # noqa: B023
                model_kwargs={},
                eta=0.4,
            )
            loss = (out["sample"] * weights[0] + out["pred_xstart"] * weights[1]).sum()
            return torch.autograd.grad(loss, [x, *model.parameters()])  # noqa: B023

        compare(diffusion, gradients, 1e-8)


def test_assigned_one_by_one():
    peer = load_peer()

    class Own(peer.SpacedDiffusion):
        ddim_sample = guided_diffusion.ddim_sample

    diffusion, x = make(), draw(torch.float64)
    own = copy.copy(diffusion)
    own.__class__ = Own
    run = lambda d: d.ddim_sample_loop(Model(), SHAPE, noise=x, eta=0.5)  # noqa: E731
    assert_same(*same_draws(lambda: run(own), lambda: run(diffusion)), 1e-10)


def test_timesteps_of_any_layout():
    diffusion, x = make(), draw(torch.float64)
    for t in (torch.tensor(4).expand(3), torch.tensor([1, 9, 4], dtype=torch.int32)):
        compare(diffusion, lambda d, t=t: d.ddim_sample(Model(), x, t), 1e-10)
    with pytest.raises((IndexError, RuntimeError)):
        fast(diffusion).ddim_sample(Model(), x, torch.tensor([1, 9, 20]))


def test_nothing_waits_for_the_device():
    """Nothing waits for the device from the second call on; the first call copies coefficients and
    timesteps there.
    """
    diffusion, model, x = fast(make()), Model(), draw(torch.float32)
    t = torch.tensor([0, 19, 7])
    options = itertools.product((None, torch.tanh), (None, gradient), (0.0, 0.5))
    for denoised_fn, cond_fn, eta in options:
        arguments = {"denoised_fn": denoised_fn, "cond_fn": cond_fn, "model_kwargs": {}}
        with torch.no_grad():
            diffusion.ddim_sample(model, x, t, eta=eta, **arguments)
            with NoSync() as probe:
                diffusion.ddim_sample(model, x, t, eta=eta, **arguments)
            assert probe.calls > 0


def test_tables_follow_the_object():
    """Tables follow other ᾱ in the same object, and many η."""
    diffusion, x, t = make(), draw(torch.float64), torch.tensor([0, 19, 7])
    own, other = fast(diffusion), make(T=60)
    run = lambda d, eta=0.5: d.ddim_sample(Model(), x, t, eta=eta)  # noqa: E731
    for eta in torch.linspace(0, 1, 40).tolist():
        draws = same_draws(lambda: run(own, eta), lambda: run(diffusion, eta))  # noqa: B023
        assert_same(*draws, 1e-10)
    assert len(guided_diffusion._tables[own]) == 16
    own.__dict__.update(other.__dict__)
    assert_same(*same_draws(lambda: run(own), lambda: run(other)), 1e-10)


def test_tables_are_no_part_of_the_object():
    own = fast(make())
    own.ddim_sample(Model(), draw(torch.float64), torch.tensor([0, 19, 7]))
    assert own in guided_diffusion._tables
    assert not [v for v in vars(own).values() if isinstance(v, StepTable)]
    copy.deepcopy(own)
    kept, alive = len(guided_diffusion._tables), weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None
    assert len(guided_diffusion._tables) < kept


def test_refused():
    diffusion, x, t = fast(make()), draw(torch.float32), torch.tensor([0, 19, 7])
    with pytest.raises(AssertionError, match=r"eta: expected 0 .* got 0\.5"):
        diffusion.ddim_reverse_sample(Model(), x, t, eta=0.5)


@pytest.mark.parametrize("spaced", [None, "ddim20"])
def test_conditioning_free(spaced):
    """Conditioning-free guidance is that of the port in Tortoise, which calls the model twice."""

    class Free(Model):
        def forward(self, x, t, shift=0.0, conditioning_free=False):
            return super().forward(x, t, 0.0 if conditioning_free else shift + 0.4)

    diffusion, x = make(spaced=spaced), draw(torch.float64)
    t, model = torch.tensor([0, 19, 7]), Free(learned=True)
    diffusion.model_var_type = load_peer().ModelVarType.LEARNED_RANGE
    diffusion.conditioning_free, diffusion.conditioning_free_k = True, 1.5
    diffusion.ramp_conditioning_free = False
    kwargs = {"model_kwargs": {"shift": 0.1}}
    for eta in (0.0, 0.7):
        compare(diffusion, lambda d: d.ddim_sample(model, x, t, eta=eta, **kwargs), 1e-10)  # noqa: B023
    compare(diffusion, lambda d: d.ddim_reverse_sample(model, x, t, **kwargs), 1e-10)


def test_example():
    peer = load_peer()

    class GaussianDiffusion(peer.GaussianDiffusion):
        pass

    diffusion, model = make(spaced=None), Model()
    diffusion.__class__ = GaussianDiffusion
    modules = {
        "guided_diffusion": types.SimpleNamespace(__path__=[]),
        "guided_diffusion.gaussian_diffusion": types.SimpleNamespace(
            GaussianDiffusion=GaussianDiffusion
        ),
    }
    names = run_example(guided_diffusion, modules, diffusion=diffusion, model=model)
    assert GaussianDiffusion.ddim_sample_loop is guided_diffusion.ddim_sample_loop
    assert names["x"].shape == names["y"].shape == (2, 3, 16, 16)
    assert names["x"].isfinite().all()
    assert (names["x"].abs() <= 1).all()
