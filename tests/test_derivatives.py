"""A step inside autograd, forward-mode differentiation and `torch.func`, against a formula by hand.

The formula is eager float64 PyTorch, whose derivatives are PyTorch's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastddim
from fastddim import ops, philox, process
from fastddim.plan import Row, Update, mixing_row, stack_row, unchecked_row
from fastddim.steptable import StepTable

from .support.environment import CPU_IMPLS

A, P = 0.3, 0.6
Function = Callable[..., Tensor]


def formula(
    x: Tensor,
    m: Tensor,
    a: Any,
    p: Any,
    *,
    eta: Any = 0.0,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive_eps: bool = False,
    guidance_scale: Any = None,
    temperature: Any = 1.0,
    guidance_rescale: float = 0.0,
    dynamic_thresholding_ratio: float | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_prev, x_0) of arXiv 2010.02502, eq. 9, 12 and 16; coefficients broadcast against x."""
    a, p, eta = (torch.as_tensor(value, dtype=torch.float64) for value in (a, p, eta))
    m = m if x.ndim == 1 else m[:, : x.shape[1]]
    if guidance_scale is not None:
        unconditional, conditional = m.chunk(2)
        m = unconditional + guidance_scale * (conditional - unconditional)
        if guidance_rescale:
            ratio = (conditional.flatten(1).std(1) / m.flatten(1).std(1)).reshape(-1, 1, 1)
            m = m * (guidance_rescale * ratio + 1 - guidance_rescale)
    if prediction == "epsilon":
        eps = m
    elif prediction == "sample":
        eps = (x - a.sqrt() * m) / (1 - a).sqrt()
    elif prediction == "v_prediction":
        eps = a.sqrt() * m + (1 - a).sqrt() * x
    else:
        eps = -(1 - a).sqrt() * m
    x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    if dynamic_thresholding_ratio is not None:
        s = quantile(x_0.abs().flatten(1), dynamic_thresholding_ratio).clamp(min=1)
        s = s.reshape(-1, *[1] * (x.ndim - 1))
        x_0 = torch.minimum(torch.maximum(x_0, -s), s) / s
    if rederive_eps:
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
    sigma = eta * ((1 - p) / (1 - a)).sqrt() * (1 - a / p).sqrt()
    x_prev = p.sqrt() * x_0 + (1 - p - sigma * sigma).sqrt() * eps
    if noise is not None:
        x_prev = x_prev + temperature * sigma * noise
    return x_prev, x_0


def quantile(values: Tensor, ratio: float) -> Tensor:
    """`torch.quantile`, which forward-mode differentiation of a batch does not take."""
    ordered = values.sort(dim=1).values
    position = ratio * (values.shape[1] - 1)
    low, part = int(position), position - int(position)
    return ordered[:, low] + part * (ordered[:, low + 1] - ordered[:, low])


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X = 1.5 * draws(2, 2, 3)
V, W = draws(2, 2, 3, seed=1), draws(24, seed=2)
XS = torch.stack([X, X.flip(0), 0.5 * X])


def plain_model(x: Tensor) -> Tensor:
    return 0.6 * x.square() + x.sin()


def guided_model(x: Tensor) -> Tensor:
    return torch.cat([plain_model(x), 0.5 * x.cos() - x])


def learned_model(x: Tensor) -> Tensor:
    return torch.cat([plain_model(x), x.exp()], dim=1)


KINDS: dict[str, tuple[Function, dict[str, Any]]] = {
    "epsilon": (plain_model, {"clip": 1.0}),
    "sample": (plain_model, {"prediction": "sample", "clip": 0.8}),
    "v": (plain_model, {"prediction": "v_prediction", "clip": 0.7}),
    "score": (plain_model, {"prediction": "score", "clip": 1.5}),
    "unclipped": (plain_model, {}),
    "rederived": (plain_model, {"clip": 1.0, "rederive_eps": True, "eta": 0.4, "seed": 3}),
    "noise given": (plain_model, {"eta": 0.8, "noise": draws(2, 2, 3, seed=5), "clip": 2.0}),
    "noise drawn": (plain_model, {"eta": 0.8, "seed": 7, "step_index": 2, "temperature": 0.5}),
    "guided": (guided_model, {"guidance_scale": 2.5, "clip": 1.2}),
    "learned": (learned_model, {"clip": 1.0}),
    "rescaled": (guided_model, {"guidance_scale": 3.0, "guidance_rescale": 0.7}),
    "thresholded": (plain_model, {"dynamic_thresholding_ratio": 0.8}),
    "all": (
        guided_model,
        {
            "guidance_scale": 3.0,
            "guidance_rescale": 0.5,
            "dynamic_thresholding_ratio": 0.7,
            "rederive_eps": True,
            "prediction": "v_prediction",
            "eta": 0.6,
            "seed": 1,
        },
    ),
}


def of_fastddim(kind: str, impl: str) -> Function:
    """x ↦ x_prev and x_0 in one vector."""
    model, options = KINDS[kind]

    def function(x: Tensor) -> Tensor:
        results = fastddim.step(x, model(x), A, P, return_x0=True, impl=impl, **options)
        return torch.cat([result.flatten() for result in results])

    return function


def by_hand(kind: str) -> Function:
    model, options = KINDS[kind]
    options = dict(options)
    seed, step = options.pop("seed", None), options.pop("step_index", 0)
    if seed is not None:
        options["noise"] = philox.step_noise((2, 2, 3), step, seed).double()

    def function(x: Tensor) -> Tensor:
        return torch.cat([r.flatten() for r in formula(x, model(x), A, P, **options)])

    return function


def loss(f: Function) -> Function:
    return lambda x: (W * f(x).sin()).sum()


def higher(f: Function, order: int) -> Tensor:
    """The derivative of an order of the loss, along fixed directions."""
    leaf = X.clone().requires_grad_()
    value = loss(f)(leaf)
    for n in range(order):
        (value,) = torch.autograd.grad(value, leaf, create_graph=n + 1 < order)
        if n + 1 < order:
            value = (value * V.roll(n, 0)).sum()
    return value


def dual(f: Function, x: Tensor = X, v: Tensor = V) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    assert tangent is not None
    return tangent


def dual_of_backward(f: Function) -> Tensor:
    """A graph made before the level, walked backwards with a dual gradient."""
    leaf = X.clone().requires_grad_()
    out = f(leaf)
    return dual(lambda w: torch.autograd.grad(out, leaf, w)[0], W, W.cos())


def backward_of_dual(f: Function) -> Tensor:
    leaf = X.clone().requires_grad_()
    return torch.autograd.grad(dual(f, leaf).sin().sum(), leaf)[0]


def grads_of_a_batch(f: Function) -> Tensor:
    leaf = X.clone().requires_grad_()
    out = f(leaf)
    (grads,) = torch.autograd.grad(out, leaf, torch.eye(24).double(), is_grads_batched=True)
    return grads


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "backward": lambda f: higher(f, 1),
    "backward twice": lambda f: higher(f, 2),
    "backward three times": lambda f: higher(f, 3),
    "batched backward": grads_of_a_batch,
    "grad": lambda f: grad(loss(f))(X),
    "vjp": lambda f: vjp(f, X)[1](W),
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "jacrev": lambda f: jacrev(f)(X),
    "jacfwd": lambda f: jacfwd(f)(X),
    "hessian": lambda f: hessian(loss(f))(X),
    "jvp of grad": lambda f: jvp(grad(loss(f)), (X,), (V,))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (V,))[1].sin().sum())(X),
    "jvp of jvp": lambda f: jvp(lambda x: jvp(f, (x,), (V,))[1], (X,), (V,))[1],
    "vmap": lambda f: vmap(f)(XS),
    "vmap of grad": lambda f: vmap(grad(loss(f)))(XS),
    "vmap of jvp": lambda f: vmap(lambda x: jvp(f, (x,), (V,))[1])(XS),
    "grad of vmap": lambda f: grad(lambda xs: vmap(f)(xs).sin().sum())(XS),
    "jvp of vmap": lambda f: jvp(vmap(f), (XS,), (XS.cos(),))[1],
    "vmap of vmap": lambda f: vmap(vmap(f))(torch.stack([XS, -XS])),
    "dual": dual,
    "dual of backward": dual_of_backward,
    "backward of dual": backward_of_dual,
    "functional.jvp": lambda f: functional.jvp(f, X, V)[1],
    "functional.hvp": lambda f: functional.hvp(loss(f), X, V)[1],
    "functional.jacobian": lambda f: functional.jacobian(
        f, X, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """No fallback that is slow, and no gradient that a backend does not know."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(batching rule|autograd kernel).*")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_acts_on_some_elements(kind: str) -> None:
    """So that its derivative counts, of both kinds."""
    clip = KINDS[kind][1].get("clip")
    if clip is None:
        return
    x_0 = by_hand(kind)(X)[X.numel() :]
    assert 0 < int((x_0.abs() == clip).sum()) < x_0.numel()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, kind: str, impl: str) -> None:
    differentiate = TRANSFORMS[transform]
    got, expected = differentiate(of_fastddim(kind, impl)), differentiate(by_hand(kind))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert all(bool(t.any()) for t in (expected if isinstance(expected, tuple) else (expected,)))


def test_second_derivative_of_a_square() -> None:
    def square(x: Tensor) -> Tensor:
        step = fastddim.step(x, x.square(), 0.3, 0.6)
        assert isinstance(step, Tensor)
        return step.square().sum()

    x = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(square(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert second.item() == pytest.approx(0.2367, abs=5e-5)
    assert hessian(square)(x.detach()).item() == pytest.approx(0.2367, abs=5e-5)
