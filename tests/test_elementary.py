"""Roots, exponentials and cosines against exact arithmetic, and coefficients of tensors against
those of numbers, to the bit.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import Schedule, elementary
from fastddim.plan import (
    PREDICTIONS,
    VARIANCES,
    Update,
    coefficient_row,
    known_rows,
    make_plan,
    mixing_row,
    stack_row,
    unchecked_row,
)

from .support.probes import OtherProcessor


def is_rounded_root(value: float, root: float) -> bool:
    """True if the root of a value lies within half a unit of the last place of `root`."""
    half = Fraction(math.ulp(root)) / 2
    return (Fraction(root) - half) ** 2 <= Fraction(value) <= (Fraction(root) + half) ** 2


def test_roots_are_rounded_correctly() -> None:
    generator = np.random.default_rng(0)
    near_one, of_any_size = generator.random(50_000), 2.0 ** generator.uniform(-300, 300, 50_000)
    values = np.concatenate([near_one, of_any_size]).tolist()
    roots = elementary.sqrt(torch.tensor(values, dtype=torch.float64)).tolist()
    assert all(map(is_rounded_root, values, roots))
    assert [elementary.sqrt(value) for value in values] == roots


def test_the_root_of_this_torch_may_not_be() -> None:
    """On some processors torch's root rounds differently, but this module's root is the same."""
    values = torch.rand(1000, dtype=torch.float64)
    expected = elementary.sqrt(values)
    with OtherProcessor():
        assert torch.equal(elementary.sqrt(values), expected)
        assert not torch.equal(values.sqrt(), expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)], ids=str)
def test_roots_of_tensors(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, dtype=torch.float64)
    roots = elementary.sqrt(values)
    assert roots.shape == shape
    assert roots.dtype == torch.float64
    torch.testing.assert_close(roots * roots, values)


def test_roots_at_the_ends() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, math.inf, -1e-300, math.nan], dtype=torch.float64)
    roots = elementary.sqrt(values)
    assert roots[:4].tolist() == [0.0, 0.0, 1.0, math.inf]
    assert roots[4:].isnan().all()
    with pytest.raises(ValueError, match="math domain error"):
        elementary.sqrt(-1.0)


def test_a_root_under_tracing_is_torchs() -> None:
    compiled = torch.compile(elementary.sqrt, backend="aot_eager", fullgraph=True)
    values = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(compiled(values), elementary.sqrt(values), rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["exp", "cos"])
def test_others_are_rounded_correctly(name: str) -> None:
    generator = np.random.default_rng(1)
    values = np.concatenate([generator.uniform(-7, 7, 5000), [0.0, 1e-30, -700.0, 1e-8]])
    results = getattr(elementary, name)(values.reshape(2, -1))
    assert results.shape == (2, len(values) // 2)
    with mpmath.workprec(400):
        exact = [getattr(mpmath, name)(value) for value in values.tolist()]
        assert results.ravel().tolist() == [float(value) for value in exact]
    np.testing.assert_allclose(results.ravel(), getattr(np, name)(values), rtol=1e-14, atol=1e-16)


def test_exponentials_out_of_range() -> None:
    values = np.array([1e300, 1000.0, -1000.0, -math.inf, math.inf])
    assert elementary.exp(values).tolist() == [math.inf, math.inf, 0.0, 0.0, math.inf]


def test_a_root_by_way_of_float64_is_that_of_float32() -> None:
    """`philox.box_muller` may round a root twice: the root of a float32 number is at least 4 units
    of the last place of float64 from where rounding to float32 changes.
    """
    generator = np.random.default_rng(2)
    # Every second significand, and both parities of the exponent.
    values = (np.arange(2**23, 2**25, 2) * np.float64(2.0**-20)).astype(np.float32)
    values = generator.choice(values, 200_000, replace=False)
    expected, wide = np.sqrt(values), np.sqrt(values.astype(np.float64))
    for units in (-3, -1, 0, 1, 3):
        moved = (wide.view(np.int64) + units).view(np.float64)
        assert np.array_equal(moved.astype(np.float32), expected)


def some_steps(count: int, prediction: str, seed: int) -> tuple[list[float], list[float]]:
    """(ᾱ_t, ᾱ_prev) of steps down, the ends of the schedule among them."""
    generator = np.random.default_rng(seed)
    a = generator.random(count) * 0.999
    p = a + (1 - a) * generator.random(count)
    a[0], p[1] = (1e-7 if prediction in ("epsilon", "score") else 0.0), 1.0
    return a.tolist(), p.tolist()


UPDATES = [
    Update(eta=eta, variance=variance, clip=clip, rederive_eps=rederive, prediction=prediction)
    for prediction, variance, (eta, clip, rederive) in itertools.product(
        PREDICTIONS,
        VARIANCES,
        [(0.0, None, False), (0.37, None, False), (1.0, 0.9, True), (0.37, None, True)],
    )
]


def bits(row: Any) -> Tensor:
    return stack_row(row).view(torch.int64)


def vector(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("update", UPDATES, ids=range(len(UPDATES)))
def test_rows_of_tensors_are_those_of_numbers(update: Update) -> None:
    count = 300
    a, p = some_steps(count, update.prediction, 3)
    generator = np.random.default_rng(4)
    each = {
        # Some are 0, where noise is still asked for.
        "eta": (generator.random(count) * (generator.random(count) < 0.9)).tolist(),
        "temperature": generator.random(count).tolist(),
        "guidance_scale": generator.uniform(-2, 9, count).tolist(),
    }
    singles = [
        Update(**{**vars(update), **{name: values[i] for name, values in each.items()}})
        for i in range(count)
    ]
    tensors = Update(**{**vars(update), **{name: vector(v) for name, v in each.items()}})
    if update.eta == 0:
        singles, tensors = [update] * count, update
    numbers = torch.stack([bits(coefficient_row(*v)) for v in zip(a, p, singles, strict=True)])
    assert torch.equal(bits(coefficient_row(vector(a), vector(p), tensors)), numbers)
    # Of two arguments one may be a number, and tensors may be of only some of the options.
    for i in range(0, count, 50):
        one = [a[i]] * 2, [p[i]] * 2
        for mixed in ((vector(one[0]), p[i]), (a[i], vector(one[1]))):
            assert torch.equal(bits(coefficient_row(*mixed, singles[i])), numbers[[i, i]])
        if update.eta == 0:
            continue
        for name in each:
            value = vector([getattr(singles[i], name)] * 2)
            some = Update(**{**vars(singles[i]), name: value})
            assert torch.equal(bits(coefficient_row(a[i], p[i], some)), numbers[[i, i]])


@pytest.mark.parametrize("update", UPDATES, ids=range(len(UPDATES)))
def test_table_rows_are_those_of_numbers(update: Update) -> None:
    a, p = some_steps(100, update.prediction, 5)
    rows = stack_row(unchecked_row(vector(a), vector(p), update))
    expected = [bits(coefficient_row(*step, update)) for step in zip(a, p, strict=True)]
    assert torch.equal(rows.view(torch.int64), torch.stack(expected))


@pytest.mark.parametrize("update", UPDATES, ids=range(len(UPDATES)))
def test_steps_of_tensors_are_those_of_numbers(update: Update) -> None:
    """Steps of tensors are those of numbers, through `fastddim.step`, with its states."""
    a, p = some_steps(40, update.prediction, 6)
    options = {
        name: getattr(update, name)
        for name in ("eta", "variance", "prediction", "clip", "rederive_eps")
    }
    x, m = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    z = torch.randn(40, 5, dtype=torch.float64)
    got = fastddim.step(x, m, vector(a), vector(p), noise=z, **options)
    for i in range(40):
        alone = (v[i : i + 1] for v in (x, m))
        expected = fastddim.step(*alone, a[i], p[i], noise=z[i : i + 1], **options)
        assert torch.equal(got[i : i + 1], expected)


def test_plans_of_each_sample() -> None:
    values = {"eta": [0.0, 0.5, 1.0], "temperature": [0.0, 0.9, 1.0], "guidance_scale": [0, 1, 7]}
    update = Update(**{name: vector(v) for name, v in values.items()}).checked(3)
    plan = make_plan(Schedule.cosine(), 30, update)
    for i in range(3):
        single = Update(**{name: v[i] for name, v in values.items()}).checked(None)
        assert torch.equal(plan.table[i], make_plan(Schedule.cosine(), 30, single).table)


def test_known_rows_are_those_of_numbers() -> None:
    alphas = make_plan(Schedule.cosine(), 50, Update()).alphas_cumprod
    first, *rest = alphas.tolist()
    expected = []
    for a in rest:
        of_x_T = math.sqrt((1 - a) / (1 - first))
        expected.append(bits(mixing_row(math.sqrt(a) - of_x_T * math.sqrt(first), of_x_T)))
    assert torch.equal(known_rows(alphas).view(torch.int64), torch.stack(expected))
