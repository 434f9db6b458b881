"""The reference update against the paper's formulas in NumPy float64, with derived error bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastddim import reference
from fastddim.plan import PREDICTIONS, Update, coefficient_row, stack_row

from .support.paper import UNIT, ddim_step, guided

HALVES = [torch.float16, torch.bfloat16]
B, C, H, W = 3, 2, 4, 5
SHAPE = (B, C, H, W)
ALPHAS = [(0.9999, 1.0), (0.6, 0.8), (0.02, 0.3), (0.0005, 0.01)]


def rows(a, p, **kwargs):
    """Rows `[1 or B, K]` of one step."""
    update = Update(**kwargs).checked(B)
    return torch.atleast_2d(stack_row(coefficient_row(a, p, update)))


def tensors(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def wide(tensor):
    return tensor.double().numpy()


def per_sample(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guidance", [None, 1.0, 7.5, 0.0])
@pytest.mark.parametrize("learned", [False, True])
def test_float64(prediction, guidance, learned):
    """Every combination of a step's options is right to 1e-12 of the size of the terms."""
    output = ((2 if guidance is not None else 1) * B, (2 if learned else 1) * C, H, W)
    x, m, z = tensors(torch.float64, SHAPE, output, SHAPE)
    m_64 = wide(m)[:, :C]
    if guidance is not None:
        m_64 = guided(m_64, guidance)
    options = itertools.product(
        ALPHAS, (0.0, 0.4, 1.0), ("small", "large"), (None, 0.8), (False, True), (None, z)
    )
    for (a, p), eta, variance, clip, rederive_eps, noise in options:
        kind = {
            "eta": eta,
            "variance": variance,
            "prediction": prediction,
            "clip": clip,
            "rederive_eps": rederive_eps,
        }
        own, own_x_0 = reference.update(x, m, rows(a, p, guidance_scale=guidance, **kind), noise)
        expected, x_0 = ddim_step(
            wide(x), m_64, a, p, z=0.0 if noise is None else wide(noise), **kind
        )
        assert own.dtype == own_x_0.dtype == torch.float64
        divided = prediction in ("epsilon", "score")
        scale = (1 / math.sqrt(a) if divided else 1.0) * (1 + np.abs(m_64).max())
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-13 * scale)
        np.testing.assert_allclose(own_x_0.numpy(), x_0, rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_coefficients_per_sample(prediction):
    """Each of ᾱ_t, ᾱ_prev, η and g may be a number or `[B]`."""
    x, m, z = tensors(torch.float64, SHAPE, (2 * B, C, H, W), SHAPE)
    choices = {
        "a": (0.3, [0.5, 0.02, 0.3]),
        "p": (0.55, [0.6, 1.0, 0.9]),
        "eta": (0.5, [0.0, 1.0, 0.7]),
        "g": (2.0, [1.0, 7.5, -1.0]),
    }
    for chosen in itertools.product(*choices.values()):
        a, p, eta, g = (per_sample(v) if isinstance(v, list) else v for v in chosen)
        table = rows(a, p, eta=eta, guidance_scale=g, prediction=prediction)
        own, own_x_0 = reference.update(x, m, table, z)
        expected, x_0 = ddim_step(
            wide(x), guided(wide(m), g), a, p, eta=eta, prediction=prediction, z=wide(z)
        )
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-11)
        np.testing.assert_allclose(own_x_0.numpy(), x_0, rtol=1e-12, atol=1e-11)


# (cx, cm, ex, em): x_0 = cx·x + cm·m and ε = ex·x + em·m.
PREDICTION = {
    "epsilon": lambda a: (1 / a**0.5, (1 - a) ** 0.5 / a**0.5, 0.0, 1.0),
    "sample": lambda a: (0.0, 1.0, 1 / (1 - a) ** 0.5, (a / (1 - a)) ** 0.5),
    "v_prediction": lambda a: (a**0.5, (1 - a) ** 0.5, (1 - a) ** 0.5, a**0.5),
    "score": lambda a: (1 / a**0.5, (1 - a) / a**0.5, 0.0, (1 - a) ** 0.5),
}


def error_bound(x, m, z, a, p, eta, prediction, rederive_eps, dtype, guidance=None):
    """(bound of x_prev, bound of x_0): forward error of the float32 (float64) evaluation.

    Let u be the compute dtype's unit roundoff. Guidance takes three roundings of terms of size
    |u| + |g|(|c| + |u|). Every coefficient, product and sum is rounded once, so x_0 = cx·x + cm·m
    is off by at most (3 + 3)u of its terms' sizes (clamping only shrinks errors), ε by (4 + 6)u of
    its own, and x_prev by (4 + 10)u: 16 covers the terms of order u² as well. Collecting
    coefficients beforehand only saves roundings. One rounding to the state's dtype comes on top.
    """
    if guidance is None:
        m_size = np.abs(m)
    else:
        unconditional, conditional = np.split(np.abs(m), 2)
        m_size = unconditional + abs(guidance) * (conditional + unconditional)
    cx, cm, ex, em = PREDICTION[prediction](a)
    x_0 = cx * np.abs(x) + cm * m_size
    eps = ex * np.abs(x) + em * m_size
    if rederive_eps:
        eps = (np.abs(x) + a**0.5 * x_0) / (1 - a) ** 0.5
    sigma = eta * ((1 - p) / (1 - a) * (1 - a / p)) ** 0.5
    x_prev = p**0.5 * x_0 + (1 - p - sigma**2) ** 0.5 * eps + sigma * np.abs(z)
    compute = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    return 16 * compute * x_prev, 16 * compute * x_0


def rounding(exact, dtype):
    """Half the spacing of `dtype` at the exact value, the error of one rounding."""
    return UNIT[dtype] * np.maximum(np.abs(exact), torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_one_output_rounding(dtype, prediction, guidance):
    output = SHAPE if guidance is None else (2 * B, C, H, W)
    x, m, z = tensors(dtype, SHAPE, output, SHAPE)
    for (a, p), eta, clip, rederive_eps in itertools.product(
        ALPHAS, (0.0, 1.0), (None, 0.8), (False, True)
    ):
        table = rows(
            a,
            p,
            eta=eta,
            prediction=prediction,
            clip=clip,
            rederive_eps=rederive_eps,
            guidance_scale=guidance,
        )
        own, own_x_0 = reference.update(x, m, table, z)
        assert own.dtype == own_x_0.dtype == dtype
        m_64 = wide(m) if guidance is None else guided(wide(m), guidance)
        exact, exact_x_0 = ddim_step(
            wide(x),
            m_64,
            a,
            p,
            eta=eta,
            prediction=prediction,
            clip=clip,
            rederive_eps=rederive_eps,
            z=wide(z),
        )
        bound, bound_x_0 = error_bound(
            wide(x), wide(m), wide(z), a, p, eta, prediction, rederive_eps, dtype, guidance
        )
        for value, truth, computed in ((own, exact, bound), (own_x_0, exact_x_0, bound_x_0)):
            excess = np.abs(wide(value) - truth) - rounding(truth, dtype) - computed
            assert excess.max() <= 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_better_than_rounding_every_operation(dtype, prediction):
    """The update is better than a scheduler in the tensors' dtype, which rounds each operation to
    half.
    """
    x, m = tensors(dtype, (1, 20_000), (1, 20_000))
    for a, p in ((0.6, 0.8), (0.02, 0.3)):
        signal, sigma = a**0.5, (1 - a) ** 0.5
        if prediction == "epsilon":
            x_0, eps = (x - sigma * m) / signal, m
        elif prediction == "sample":
            x_0, eps = m, (x - signal * m) / sigma
        elif prediction == "score":
            x_0, eps = (x + sigma**2 * m) / signal, -sigma * m
        else:
            x_0, eps = signal * x - sigma * m, signal * m + sigma * x
        rounded = p**0.5 * x_0 + (1 - p) ** 0.5 * eps
        assert rounded.dtype == dtype
        own, _ = reference.update(x, m, rows(a, p, prediction=prediction), None)
        exact, _ = ddim_step(wide(x), wide(m), a, p, prediction=prediction)
        error, rounded_error = (np.abs(wide(v) - exact) for v in (own, rounded))
        assert error.mean() < 0.75 * rounded_error.mean()
        assert error.max() < rounded_error.max()
        # Correctly rounded, but where the float32 arithmetic crosses a rounding boundary.
        assert (own == torch.from_numpy(exact).to(dtype)).double().mean() > 0.99


def test_model_output_of_another_dtype():
    """The output is widened or rounded to the compute dtype, the state decides the result's."""
    x, m = tensors(torch.float64, SHAPE, SHAPE)
    table = rows(0.5, 0.8)
    own, _ = reference.update(x, m.half(), table, None)
    expected, _ = ddim_step(wide(x), wide(m.half()), 0.5, 0.8)
    assert own.dtype == torch.float64
    np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12)
    own, _ = reference.update(x.half(), m.float(), table, None)
    expected, _ = ddim_step(wide(x.half()), wide(m.float()), 0.5, 0.8)
    assert own.dtype == torch.float16
    assert (np.abs(wide(own) - expected) <= 1.01 * rounding(expected, torch.float16) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("source", ["state", "output", "noise"])
@pytest.mark.parametrize("rederive_eps", [False, True])
def test_nan_is_not_clipped_away(dtype, source, rederive_eps):
    x, m, z = tensors(dtype, SHAPE, SHAPE, SHAPE)
    {"state": x, "output": m, "noise": z}[source][1, 1, 2, 3] = math.nan
    table = rows(0.5, 0.8, eta=1.0, clip=1.0, rederive_eps=rederive_eps)
    own, own_x_0 = reference.update(x, m, table, z)
    place = torch.zeros(SHAPE, dtype=torch.bool)
    place[1, 1, 2, 3] = True
    assert torch.equal(own.isnan(), place)
    assert torch.equal(own_x_0.isnan(), place & (source != "noise"))


def test_clipping_reaches_the_range_and_no_further():
    x, m = tensors(torch.float32, SHAPE, SHAPE)
    free = reference.update(x, m, rows(0.02, 0.3), None)[1]
    clipped = reference.update(x, m, rows(0.02, 0.3, clip=0.75), None)[1]
    assert torch.equal(clipped, free.clamp(-0.75, 0.75))
    assert (clipped == 0.75).any()
    assert (clipped == -0.75).any()
    assert (clipped.abs() < 0.75).any()


@pytest.mark.parametrize("z", [math.nan, math.inf])
def test_noise_is_unread_where_its_coefficient_is_zero(z):
    """Noise is not read if its coefficient is zero, per sample as well: no caller may have drawn
    the noise of the last step.
    """
    x, m = tensors(torch.float32, SHAPE, SHAPE)
    noise = torch.full(SHAPE, z)
    for table in (rows(0.9, 1.0, eta=1.0), rows(0.9, 1.0, eta=1.0, variance="large")):
        assert torch.equal(
            reference.update(x, m, table, noise)[0], reference.update(x, m, table, None)[0]
        )
    mixed, _ = reference.update(x, m, rows(0.5, 0.8, eta=per_sample([0.0, 1.0, 0.0])), noise)
    assert mixed.isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4), (2, 1, 2, 3, 2), (0, 3), (2, 0)])
def test_shapes(shape):
    x, m, z = tensors(torch.float64, shape, shape, shape)
    own, x_0 = reference.update(x, m, rows(0.5, 0.8, eta=1.0), z)
    expected, _ = ddim_step(wide(x), wide(m), 0.5, 0.8, eta=1.0, z=wide(z))
    assert own.shape == x_0.shape == shape
    np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12)


def test_inputs_are_not_modified():
    x, m, z = (torch.ones(SHAPE) for _ in range(3))
    table = rows(0.5, 0.8, eta=1.0, clip=0.1)
    reference.update(x, m, table, z)
    assert all((v == 1).all() for v in (x, m, z))
