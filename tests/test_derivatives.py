"""Derivatives of a step inside autograd, forward-mode differentiation and `torch.func`, against a
formula by hand.

The formula is eager float64 PyTorch, whose derivatives are PyTorch's own.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastddim
from fastddim import backends, ops, philox, process
from fastddim.plan import Update, mixing_row, stack_row, unchecked_row
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
    """Raises on warnings about slow fallbacks, and about gradients that a backend does not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(batching rule|autograd kernel).*")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_acts_on_some_elements(kind: str) -> None:
    """The clip acts on some elements, so that its derivative counts, of both kinds."""
    clip = KINDS[kind][1].get("clip")
    if clip is None:
        return
    x_0 = by_hand(kind)(X)[X.numel() :]
    assert 0 < int((x_0.abs() == clip).sum()) < x_0.numel()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("kind", "impl"),
    [
        pytest.param(
            *(kind, impl),
            # Most transforms take the formula of the reference whatever the backend.
            marks=() if impl == CPU_IMPLS[0] or kind in ("guided", "all") else pytest.mark.deep,
        )
        for kind, impl in itertools.product(KINDS, CPU_IMPLS)
    ],
)
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


# --- the operator -----------------------------------------------------------------------------

ADDED = ("x", "model_output", "noise", "history", "known", "mask", "table")


def operands(**options: Any) -> dict[str, Any]:
    """Arguments of `ops.update`, all float64 and with a clip that acts."""
    guided, learned = options.get("guided", False), options.get("learned", False)
    update = Update(eta=0.7, clip=0.8, guidance_scale=2.5 if guided else None)
    alphas = (torch.tensor([0.3, 0.4]).double(), torch.tensor([0.5, 0.9]).double())
    keyed = options.get("keyed", False)
    return {
        "x": draws(2, 2, 3),
        "model_output": draws(4 if guided else 2, 4 if learned else 2, 3, seed=1),
        "table": stack_row(unchecked_row(*alphas, update)._replace(ph=0.2)),
        "row": None if options.get("alone", False) else torch.tensor([1, 0]),
        "noise": None if keyed else draws(2, 2, 3, seed=2),
        "keys": philox.make_keys(5, 2, step_index=4) if keyed else None,
        "history": draws(2, 2, 3, seed=3),
        "mask": draws(2, 2, 3, seed=4).sigmoid(),
        "known": draws(2, 2, 3, seed=5),
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"alone": True}, {"guided": True, "learned": True, "keyed": True}],
    ids=str,
)
def test_gradients_of_all_operands(options: dict[str, Any]) -> None:
    """Gradients of all operands are right to second order, in reverse and in forward mode, one by
    one and in batches.
    """
    arguments = operands(**options)
    names = [name for name in ADDED if arguments[name] is not None]

    def update(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.update(**{**arguments, **dict(zip(names, tensors, strict=True))})

    given = tuple(arguments[name].clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        update, given, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        update, given, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_second_derivatives_in_other_dtypes(dtype: torch.dtype) -> None:
    """Second derivatives of operands in three dtypes; each gradient is in the dtype of
    its operand.
    """

    def second(dtype: torch.dtype, other: torch.dtype) -> list[Tensor]:
        arguments = operands(guided=True)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        arguments["table"] = arguments["table"].to(compute)
        names = ("x", "model_output", "noise", "history", "known")
        dtypes = dict.fromkeys(names, other) | {"x": dtype}
        for name in names:
            # Rounded to the narrowest first, so that all have the same values.
            narrow = arguments[name].to(torch.bfloat16)
            arguments[name] = narrow.to(dtypes[name]).requires_grad_()
        leaves = [arguments[name] for name in names]
        x_prev, x_0 = ops.update(**arguments)
        loss = (x_prev.double().pow(3) + x_0.double().square()).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        total = sum(g.double().square().sum() for g in first)
        grads = torch.autograd.grad(total, leaves)
        assert [g.dtype for g in (*first, *grads)] == [leaf.dtype for leaf in leaves] * 2
        return [g.double() for g in grads]

    tolerance = 8 * torch.finfo(torch.float16 if dtype == torch.float32 else torch.bfloat16).eps
    expected = second(torch.float64, torch.float64)
    for got, exact in zip(second(dtype, torch.float16), expected, strict=True):
        assert (got - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_at_the_bound_of_the_clip_the_derivative_is_that_inside(impl: str) -> None:
    """The derivative at the bound of the clip is that inside, in every order and mode.
    `torch.clamp` has another one in each version of PyTorch.
    """
    x = torch.tensor([[0.5, -0.5, 0.5000001, 0.2]], dtype=torch.float64)

    def cube(x: Tensor) -> Tensor:
        made = fastddim.step(x, 0 * x, 0.25, 1.0, clip=1.0, impl=impl)
        assert isinstance(made, Tensor)
        return made.pow(3).sum()

    # Of (x/0.5)³, and of a number.
    first = torch.tensor([[6.0, 6.0, 0.0, 0.96]]).double()
    second = torch.diag(torch.tensor([24.0, -24.0, 0.0, 9.6]).double())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(cube(leaf), leaf)[0], first)
    (again,) = torch.autograd.grad(cube(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), leaf)[0][0], second.diag())
    for transform in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transform(cube)(x), first)
    for transform in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))):
        torch.testing.assert_close(transform(cube)(x)[0, :, 0], second)


# --- vmap -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_each_call_alone(kind: str, impl: str) -> None:
    """`vmap` gives what each call gives alone: to the bit, the noise too, or to rounding if rows
    come from the data.
    """
    f = of_fastddim(kind, impl)
    got, expected = vmap(f)(XS), torch.stack([f(x) for x in XS])
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(got, expected) or kind in ("rescaled", "thresholded", "all")


@pytest.mark.parametrize("alone", [False, True], ids=["rows", "one row"])
def test_vmap_over_any_operand_and_any_dimension(alone: bool) -> None:
    every: dict[str, Any] = {**operands(guided=True, learned=True, alone=alone)}
    names = [name for name in every if every[name] is not None]

    def update(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.update(**{**every, **dict(zip(names, tensors, strict=True))})

    given = [every[name] for name in names]
    mapped = {
        name: torch.stack([value, value.flip(0), value])
        for name, value in zip(names, given, strict=True)
    }
    rows = [["table"]] if alone else [["row"], ["table"], ["table", "row"]]
    for subset in (names, ["x"], ["model_output"], *rows, ["mask"]):
        for dim in (0, -1):
            dims = [dim if name in subset else None for name in names]
            tensors = [
                mapped[name].movedim(0, dim) if name in subset else every[name] for name in names
            ]
            got = vmap(update, in_dims=tuple(dims))(*tensors)
            for i in range(3):
                alone = [mapped[name][i] if name in subset else every[name] for name in names]
                for a, b in zip(got, update(*alone), strict=True):
                    assert torch.equal(a[i], b), (subset, dim, i)


def test_vmap_over_keys_and_coefficients() -> None:
    """`vmap` goes over the seed of a step, its index, and numbers that differ between calls."""
    m = plain_model(X)

    def step(seed: Any, index: Any, a: Any, eta: Any) -> Any:
        return fastddim.step(X, m, a, P, eta=eta, seed=seed, step_index=index, sample_offset=3)

    seeds, indices = torch.tensor([3, -5, 2**40]), torch.tensor([0, 7, 2])
    alphas, etas = torch.tensor([0.1, 0.3, 0.5]).double(), torch.tensor([0.0, 0.5, 0.9]).double()
    got = vmap(step)(seeds, indices, alphas, etas)
    for i in range(3):
        seed = int(seeds[i]) % 2**64
        alone = step(seed, int(indices[i]), alphas[i].item(), etas[i].item())
        torch.testing.assert_close(got[i], alone, rtol=1e-12, atol=1e-12)

    def by_sample(seed: Tensor, index: Tensor) -> Any:
        return fastddim.step(X, m, A, P, eta=1.0, seed=seed, step_index=index)

    each = torch.arange(6).reshape(3, 2)
    got = vmap(by_sample)(each, each + 1)
    assert torch.equal(got, torch.stack([by_sample(s, s + 1) for s in each]))


def test_vmap_of_nothing() -> None:
    x = torch.zeros(3, 0, 4)
    assert vmap(lambda x: fastddim.step(x, x, A, P))(x).shape == (3, 0, 4)


# --- coefficients, networks, other functions --------------------------------------------------


@pytest.mark.parametrize("scalar", [False, True])
def test_derivatives_of_coefficients(scalar: bool) -> None:
    m, z = guided_model(X), draws(2, 2, 3, seed=5)
    values = [torch.tensor(v).double() for v in ([0.3, 0.4], [0.5, 0.9], [0.5, 0.8], [2.0, 3.0])]
    given = tuple(v[0] for v in values) if scalar else tuple(values)

    def ours(a: Tensor, p: Tensor, eta: Tensor, g: Tensor) -> Any:
        options = {"eta": eta, "guidance_scale": g, "temperature": g, "noise": z, "clip": 1.0}
        return fastddim.step(X, m, a, p, **options).sin().sum()

    def expected(*coefficients: Tensor) -> Tensor:
        a, p, eta, g = (c if scalar else c.reshape(2, 1, 1) for c in coefficients)
        options = {"eta": eta, "guidance_scale": g, "temperature": g, "noise": z, "clip": 1.0}
        return formula(X, m, a, p, **options)[0].sin().sum()

    every = (0, 1, 2, 3)
    for transform in (grad, hessian, jacfwd):
        got, right = (transform(f, every)(*given) for f in (ours, expected))
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)
    leaves = [v.clone().requires_grad_() for v in given]
    torch.testing.assert_close(
        torch.autograd.grad(ours(*leaves), leaves), grad(expected, every)(*given)
    )
    with pytest.raises(RuntimeError, match=r"out: expected None under torch\.func"):
        grad(lambda a: fastddim.step(X, X, a, P, out=X.clone()).sum())(given[0])
    with pytest.raises(ValueError, match=r"alpha_t.*: expected a number in \[0, 1\], got 1[.]5"):
        fastddim.step(X, X, (values[0] * 0 + 1.5).requires_grad_(), P)


def test_eta_has_a_derivative_of_0_at_the_last_step() -> None:
    eta = torch.tensor(0.5, requires_grad=True)
    fastddim.step(X, plain_model(X), A, 1.0, eta=eta).sum().backward()
    assert eta.grad is not None
    assert eta.grad.item() == 0


def test_a_loop_of_steps_around_a_network() -> None:
    """A loop of steps around a network has derivatives in the parameters, as for a policy or a
    guided sampler that is trained.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    alphas = [0.1, 0.4, 0.8, 1.0]

    def sampled(step: Function) -> Function:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            for a, p in itertools.pairwise(alphas):
                x = step(x, functional_call(net, parameters, x), a, p)
            return x.square().sum()

        return loss

    x = draws(2, 3, seed=8)
    ours = sampled(lambda *args: fastddim.step(*args, clip=1.5))
    expected = sampled(lambda *args: formula(*args, clip=1.5)[0])
    directions = {name: draws(*p.shape, seed=9) for name, p in parameters.items()}
    for transform in (
        lambda f: grad(f)(parameters, x),
        lambda f: jvp(lambda p: grad(f)(p, x), (parameters,), (directions,))[1],
        lambda f: vmap(grad(f), in_dims=(None, 0))(parameters, x[:, None]),
        lambda f: jacfwd(f)(parameters, x),
    ):
        torch.testing.assert_close(transform(ours), transform(expected))


def test_add_noise() -> None:
    schedule = fastddim.Schedule.linear()
    t = torch.tensor([3, 700])

    def ours(x: Tensor) -> Tensor:
        return schedule.add_noise(x, t, x.square()).sin().sum()

    def expected(x: Tensor) -> Tensor:
        a = schedule.alphas_cumprod[t].reshape(2, 1, 1)
        return (a.sqrt() * x + (1 - a).sqrt() * x.square()).sin().sum()

    for transform in (grad, hessian, jacfwd):
        torch.testing.assert_close(transform(ours)(X), transform(expected)(X))
    got = vmap(lambda x, t: schedule.add_noise(x[None], t, x[None].cos())[0])(X, t)
    torch.testing.assert_close(got, schedule.add_noise(X, t, X.cos()), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x, y, a, p, s: process.marginal(x, a), 1),
        (process.posterior, 3),
        (process.forward_kernel, 3),
        (process.generative, 3),
        (lambda x, y, a, p, s: process.predicted_x_0(x, y, a), 1),
        (lambda x, y, a, p, s: process.sigma(a, p, s), 3),
        (lambda x, y, a, p, s: process.sigma_hat(a, p), 2),
    ],
    ids=["marginal", "posterior", "kernel", "generative", "predicted", "sigma", "sigma_hat"],
)
def test_the_gaussians_of_the_paper(function: Function, count: int) -> None:
    """The Gaussians of the paper agree with finite differences, in the states and in the
    coefficients.
    """
    names = ([0.3, 0.4], [0.5, 0.9], [0.2, 0.1])
    numbers = [torch.tensor(v).double().requires_grad_() for v in names[:count]]
    rest = [torch.tensor(v).double() for v in names[count:]]
    states = (X.clone().requires_grad_(), draws(2, 2, 3, seed=1).requires_grad_())

    def tensors(*given: Tensor) -> tuple[Tensor, ...]:
        made = function(*given, *rest)
        return (made,) if isinstance(made, Tensor) else tuple(made)

    options = {"check_forward_ad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(tensors, (*states, *numbers), **options)
    assert torch.autograd.gradgradcheck(tensors, (*states, *numbers), fast_mode=True)
    batched = torch.stack([numbers[0].detach(), numbers[0].detach() * 0.9])
    got = vmap(lambda a: tensors(*states, a, *(n.detach() for n in numbers[1:])))(batched)
    for i, a in enumerate(batched):
        alone = tensors(*states, a, *(n.detach() for n in numbers[1:]))
        for made, one in zip(got, alone, strict=True):
            torch.testing.assert_close(made[i], one, rtol=1e-13, atol=1e-13)


# --- what cannot be followed ------------------------------------------------------------------

IN_PLACE: dict[str, Function] = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "vmap": lambda f: vmap(f)(XS),
    "dual": dual,
}


@pytest.mark.parametrize("transform", IN_PLACE)
def test_out_is_refused(transform: str) -> None:
    def step(x: Tensor) -> Any:
        return fastddim.step(x, x, A, P, out=torch.empty_like(x))

    with pytest.raises(RuntimeError, match=r"out: expected None under torch\.func or forward-mode"):
        IN_PLACE[transform](step)


@pytest.mark.parametrize("transform", IN_PLACE)
def test_epsilon_is_refused(transform: str) -> None:
    table = StepTable(stack_row(mixing_row(torch.tensor([0.5]).double(), 0.5)))
    table(X, X, 0)

    def step(x: Tensor) -> Tensor:
        return table(x, x, 0, epsilon=torch.empty_like(x))[0]

    with pytest.raises(RuntimeError, match=r"epsilon: expected None under torch\.func or forward-"):
        IN_PLACE[transform](step)


def plain(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


PREPARED = fastddim.Sampler(plain, 3, shape=(2, 2, 3), dtype=torch.float64)
STREAM = fastddim.Stream(plain, batch_size=2, shape=(2, 2, 3), dtype=torch.float64)
SAMPLERS: dict[str, Function] = {
    "sample": lambda x: fastddim.sample(plain, 3, x_T=x),
    "invert": lambda x: fastddim.invert(plain, x, 3),
    "Sampler": lambda x: fastddim.Sampler(plain, 3, shape=(2, 2, 3), dtype=torch.float64)(x_T=x),
    "prepared": lambda x: PREPARED(x_T=x),
    "Stream": lambda x: fastddim.Stream(plain, batch_size=2, shape=(2, 2, 3)).step(),
    "submit": lambda x: STREAM.submit(steps=3, x_T=x[:1]),
    "step": lambda x: STREAM.step(),
}


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_refused(sampler: str, transform: str) -> None:
    """Samplers are refused, since zeros would be silently wrong."""
    with pytest.raises(RuntimeError, match=r"model: expected to be sampled outside torch\.func"):
        IN_PLACE[transform](SAMPLERS[sampler])


def test_tangents_are_refused_by_samplers() -> None:
    with pytest.raises(RuntimeError, match="x_T: expected a tensor without a tangent"):
        dual(lambda x: PREPARED(x_T=x))
    scale = torch.tensor(0.5).double()

    def scaled(x: Tensor, t: Tensor) -> Tensor:
        return x * scale

    for finite in (False, True):
        sampler = fastddim.Sampler(
            scaled, 3, shape=(2, 2, 3), dtype=torch.float64, check_finite=finite
        )
        expected, plain_scale = sampler(x_T=X), scale
        with forward_ad.dual_level():
            assert torch.equal(sampler(x_T=X), expected)
            scale = forward_ad.make_dual(scale, torch.tensor(1.0).double())
            with pytest.raises(RuntimeError, match="model output: expected a tensor without a tan"):
                sampler(x_T=X)
        scale = plain_scale
        assert torch.equal(sampler(x_T=X), expected)


def test_forward_mode_in_another_thread_refuses_nothing() -> None:
    """Forward mode in another thread refuses nothing, although PyTorch's levels are those of the
    process.
    """
    inside, done = threading.Event(), threading.Event()

    def differentiate() -> None:
        with forward_ad.dual_level():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=differentiate)
    thread.start()
    try:
        assert inside.wait(60)
        out = torch.empty_like(X)
        assert torch.equal(fastddim.step(X, X, A, P, out=out), fastddim.step(X, X, A, P))
        assert torch.equal(PREPARED(x_T=X), fastddim.sample(plain, 3, x_T=X))
        table = StepTable(stack_row(mixing_row(torch.tensor([0.5]).double(), 0.25)))
        assert torch.equal(table(X, X, 0, epsilon=torch.empty_like(X))[0], 0.75 * X)
    finally:
        done.set()
        thread.join()


# --- what is kept -----------------------------------------------------------------------------


def test_what_a_transform_leaves_behind_serves_all_others() -> None:
    """Tables and keys are kept between calls, and serve all transforms, whichever came first."""
    orders = [["grad", "vmap", "jvp"], ["vmap", "hessian", "grad"], ["jvp of grad", "vmap of grad"]]
    for n, order in enumerate(orders):
        # Coefficients that no other test has, so that they are new.
        a, p = A + 0.01 * (n + 1), P + 0.01
        table = StepTable(stack_row(unchecked_row(a, p, Update(eta=0.5))))
        keys = philox.make_keys(7, 2, step_index=3)
        z = philox.step_noise((2, 2, 3), 3, 7).double()

        def kept(x: Tensor, a: float = a, p: float = p) -> Tensor:
            made = fastddim.step(x, plain_model(x), a, p, eta=0.5, seed=7, step_index=3)
            assert isinstance(made, Tensor)
            return made

        def tabled(x: Tensor, table: StepTable = table, keys: Any = keys) -> Tensor:
            return table(x, plain_model(x), 0, keys=keys)[0]

        def expected(x: Tensor, a: float = a, p: float = p, z: Tensor = z) -> Tensor:
            return formula(x, plain_model(x), a, p, eta=0.5, noise=z)[0].flatten()

        for f in (kept, tabled):
            for name in (*order, "backward", "dual", "vmap"):
                got, right = (
                    TRANSFORMS[name](lambda x, f=f: torch.cat([f(x).flatten()] * 2))
                    for f in (f, expected)
                )
                torch.testing.assert_close(got, right)
            torch.testing.assert_close(f(X).flatten(), expected(X))


# --- compilers and kernels of GPUs ------------------------------------------------------------


COMPILED: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: grad(loss(f)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (V,))[1],
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, -x])),
    "vmap of grad": lambda f: lambda x: vmap(grad(loss(f)))(torch.stack([x, -x])),
}


@pytest.mark.parametrize(
    ("kind", "transform"),
    [
        ("epsilon", "grad"),
        ("guided", "vmap"),
        *(
            pytest.param(kind, transform, marks=pytest.mark.deep)
            for kind, transform in itertools.product(("epsilon", "guided", "noise drawn"), COMPILED)
        ),
    ],
)
def test_transforms_in_a_compiled_graph(kind: str, transform: str) -> None:
    torch.compiler.reset()
    f = COMPILED[transform](of_fastddim(kind, "auto"))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), f(X), rtol=1e-12, atol=1e-12)


def test_the_operators_of_triton() -> None:
    """The operators of Triton have the derivatives and the batches of those of the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from gpucheck import triton_jit

    from .support.gpuless.triton_on_ptx import Interpreter

    every = operands(guided=True)
    floats = {name: every[name].float() for name in ADDED}

    def through(update: Function) -> Function:
        def f(x: Tensor) -> Tensor:
            results = update(**{**every, **floats, "x": x.float()})
            return torch.cat([result.flatten() for result in results]).double()

        return f

    triton, cpu = through(backends.BACKENDS["triton"].update), through(ops.update)
    with triton_jit.compiled_for(triton_jit.SM_90, Interpreter()):
        for transform in ("backward", "grad", "jvp", "hessian", "vmap", "vmap of grad", "dual"):
            got, expected = TRANSFORMS[transform](triton), TRANSFORMS[transform](cpu)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
