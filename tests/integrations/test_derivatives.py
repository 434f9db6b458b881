"""The steps of drop-ins inside autograd, forward-mode differentiation and `torch.func`.

They are compared with the derivatives that PyTorch has of the originals, and finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap

from ..support.dropins.diffusers import CLASSES, pair

Function = Callable[..., Tensor]


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X, V = 1.5 * draws(2, 2, 3), draws(2, 2, 3, seed=1)
XS = torch.stack([X, X.flip(0), 0.5 * X])


def loss(f: Function) -> Function:
    return lambda x: f(x).sin().sum()


def twice(f: Function) -> Tensor:
    leaf = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(leaf), leaf, create_graph=True)
    return torch.autograd.grad((first * V).sum(), leaf)[0]


def dual(f: Function) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(X, V))).tangent
    assert tangent is not None
    return tangent


# One after the other with the same objects, so that what they keep serves all.
TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: grad(loss(f))(X),
    "vmap": lambda f: vmap(f)(XS),
    "jvp": lambda f: jvp(f, (X,), (V,))[1],
    "vmap of grad": lambda f: vmap(grad(loss(f)))(XS),
    "hessian": lambda f: hessian(loss(f))(X),
    "backward twice": twice,
    "jacfwd": lambda f: jacfwd(f)(X),
    "dual": dual,
    "grad of vmap": lambda f: grad(lambda xs: vmap(f)(xs).sin().sum())(XS),
    "no transform": lambda f: f(X),
}


def model(x: Tensor) -> Tensor:
    return 0.6 * x.square() + x.sin()


def steps(scheduler: Any, **options: Any) -> Function:
    """x ↦ the results of a step in the middle."""
    t = int(scheduler.timesteps[len(scheduler.timesteps) // 2])

    def step(x: Tensor) -> Tensor:
        made = scheduler.step(model(x), t, x, **options)
        return torch.cat([made.prev_sample.flatten(), made.pred_original_sample.flatten()])

    return step


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [
        {},
        {"use_clipped_model_output": True, "eta": 0.7, "variance_noise": draws(2, 2, 3, seed=4)},
    ],
    "DDIMParallelScheduler": [{}],
    "DDIMInverseScheduler": [{}],
    "DDPMScheduler": [{}],
}
CASES = [(name, options) for name in CLASSES for options in OPTIONS[name]]
CONFIGS: list[dict[str, Any]] = [
    {"clip_sample_range": 0.9},
    {"prediction_type": "v_prediction", "clip_sample": False},
    {"thresholding": True, "clip_sample": False, "dynamic_thresholding_ratio": 0.8},
]


# Without torch.vmap: DDPMScheduler draws its noise itself, and torch.quantile has no rule for it.
UNBATCHED = ("grad", "jvp", "backward twice", "dual", "no transform")


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_schedulers(name: str, options: dict[str, Any], config: dict[str, Any]) -> None:
    if name == "DDIMInverseScheduler":
        config = {k: v for k, v in config.items() if "threshold" not in k}
    theirs, own = pair(name, **config)
    unbatched = name == "DDPMScheduler" or "thresholding" in config
    for transform in UNBATCHED if unbatched else TRANSFORMS:
        results = []
        for scheduler in (theirs, own):
            torch.manual_seed(3)
            results.append(TRANSFORMS[transform](steps(scheduler, **options)))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
        assert bool(results[0].any())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_schedulers_against_finite_differences(name: str, options: dict[str, Any]) -> None:
    _, own = pair(name, clip_sample_range=0.9)
    if name == "DDPMScheduler":
        own.set_noise("philox", 5)
    x = X.clone().requires_grad_()
    step = steps(own, **options)
    assert torch.autograd.gradcheck(step, x, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(step, x, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_noising(method: str) -> None:
    theirs, own = pair("DDIMScheduler")
    t = torch.tensor([3, 700])

    def mixed(scheduler: Any) -> Function:
        return lambda x: getattr(scheduler, method)(x, model(x), t)

    for transform in ("grad", "hessian", "jvp", "vmap", "vmap of grad", "backward twice", "dual"):
        differentiate = TRANSFORMS[transform]
        got, expected = differentiate(mixed(own)), differentiate(mixed(theirs))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    got = vmap(lambda x, t: getattr(own, method)(x[None], x[None].cos(), t)[0])(X, t)
    torch.testing.assert_close(got, getattr(own, method)(X, X.cos(), t))


def test_keys_of_philox_noise_serve_all_transforms() -> None:
    _, own = pair("DDIMScheduler")
    own.set_noise("philox", 5)
    step = steps(own, eta=1.0)
    alone = torch.stack([step(x) for x in XS])
    _, own = pair("DDIMScheduler")
    own.set_noise("philox", 5)
    step = steps(own, eta=1.0)
    for transform, differentiate in TRANSFORMS.items():
        got = differentiate(step)
        assert bool(got.any()), transform
        assert torch.equal(step(XS[1]), alone[1])
        if transform == "vmap":
            assert torch.equal(got, alone)


class TestGuidedDiffusion:
    @pytest.mark.parametrize("kind", ["EPSILON", "START_X", "PREVIOUS_X"])
    @pytest.mark.parametrize("method", ["ddim_sample", "ddim_reverse_sample"])
    def test_steps(self, method: str, kind: str) -> None:
        guided = pytest.importorskip("tests.support.dropins.guided_diffusion")
        theirs = guided.make(kind)
        own, t = guided.fast(theirs), torch.tensor([4, 9])

        def stepped(diffusion: Any) -> Function:
            def step(x: Tensor) -> Tensor:
                made = getattr(diffusion, method)(lambda x, t: model(x), x, t)
                return torch.cat([made["sample"].flatten(), made["pred_xstart"].flatten()])

            return step

        for transform in UNBATCHED:
            differentiate = TRANSFORMS[transform]
            results = []
            for diffusion in (theirs, own):
                torch.manual_seed(3)
                results.append(differentiate(stepped(diffusion)))
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
            assert bool(results[0].any())
        x = X.clone().requires_grad_()
        assert torch.autograd.gradcheck(stepped(own), x, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(stepped(own), x, fast_mode=True)
