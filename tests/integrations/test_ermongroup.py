"""Comparison with `functions/denoising.py` of ermongroup/ddim, which no registry has: written out
here.
"""

from __future__ import annotations

import pytest
import torch

from fastddim.integrations import ermongroup

from ..support.dropins.ermongroup import LINEAR, model, peer_ddpm, peer_generalized
from ..support.dropins.peers import TOLERANCE, assert_same, run_example, same_draws

SHAPES = [(2, 3, 7, 5), (3,), (2, 5), (1, 2, 3, 4, 5)]
SEQUENCES = {
    "uniform": list(range(0, 1000, 62)),
    "quadratic": [int(s) for s in torch.linspace(0, 800**0.5, 40, dtype=torch.float64) ** 2],
    "not from 0": [7, 300, 999],
    "one": [500],
    "none": [],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seq", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops(shape, seq, dtype):
    x, b = torch.randn(shape, dtype=dtype), LINEAR.to(dtype)
    for kwargs in ({}, {"eta": 0.0}, {"eta": 0.5}, {"eta": 1, "unknown": None}, {"eta": 2.5}):
        own, expected = same_draws(
            lambda: ermongroup.generalized_steps(x, seq, model, b, **kwargs),  # noqa: B023
            lambda: peer_generalized(x, seq, model, b, **kwargs),  # noqa: B023
        )
        assert own[0][0] is x
        assert_same(own, expected, TOLERANCE[dtype])
    own, expected = same_draws(
        lambda: ermongroup.ddpm_steps(x, seq, model, b),
        lambda: peer_ddpm(x, seq, model, b),
    )
    assert_same(own, expected, TOLERANCE[dtype])


def test_seq_of_any_kind():
    x = torch.randn(2, 3)
    own, expected = same_draws(
        lambda: ermongroup.generalized_steps(x, range(0, 1000, 250), model, LINEAR, eta=1.0),
        lambda: peer_generalized(x, [0, 250, 500, 750], model, LINEAR, eta=1.0),
    )
    assert_same(own, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fast", "peer"), [
    (ermongroup.generalized_steps, peer_generalized), (ermongroup.ddpm_steps, peer_ddpm),
])  # fmt: skip
def test_half_precision(fast, peer, dtype):
    """As in the original, states get the dtype to which x and b promote."""
    x, b, seq = torch.randn(4, 3, 5, 5).to(dtype), LINEAR.float(), [0, 1]

    def exact_model(x, t):
        return (0.5 * x.double()).to(x.dtype)

    own, expected = same_draws(
        lambda: fast(x, seq, exact_model, b), lambda: peer(x, seq, exact_model, b)
    )
    assert own[0][1].dtype == expected[0][1].dtype == torch.float32
    assert_same(own, expected, 1e-5)


def test_no_gradients():
    x = torch.randn(2, 3, requires_grad=True)
    xs, x0_preds = ermongroup.generalized_steps(x, [0, 500], model, LINEAR)
    assert not any(tensor.requires_grad for tensor in xs[1:] + x0_preds)


def test_example():
    names = run_example(ermongroup)
    assert len(names["xs"]) == 11
    assert names["xs"][-1].shape == (2, 3, 32, 32)
    assert names["xs"][-1].isfinite().all()
