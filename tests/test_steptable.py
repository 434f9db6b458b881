"""Steps by row of a table."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import ops, philox
from fastddim.plan import Update, mixing_row, stack_row, unchecked_row
from fastddim.steptable import StepTable

from .support.environment import CPU_IMPLS
from .support.probes import NoSync

A = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
P = torch.tensor([0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
KINDS = [
    {},
    {"eta": 1.0, "variance": "large"},
    {"prediction": "v_prediction", "clip": 0.7, "rederive_eps": True, "eta": 0.5},
    {"prediction": "sample", "temperature": 0.5, "eta": 1.0},
    {"prediction": "score", "eta": 0.5},
    {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"guidance_scale": 3.0, "guidance_rescale": 0.7},
]


def table_of(a: Tensor, p: Tensor, update: Update, impl: str = "auto") -> StepTable:
    """Row i steps from ᾱ = a[i] to p[i]."""
    return StepTable(stack_row(unchecked_row(a, p, update)), rescaling=update.rescaling, impl=impl)


def draws(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("impl", ["auto", *CPU_IMPLS])
@pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_steps(impl: str, kind: dict, dtype: torch.dtype) -> None:
    table = table_of(A, P, Update(**kind).checked(None), impl)
    x, m = draws(4, 3, 7, dtype=dtype), draws(8 if "guidance_scale" in kind else 4, 3, 7, seed=1)
    noise = draws(4, 3, 7, seed=2) if kind.get("eta") else None
    for row in (0, 2, 3, -2):
        expected = fastddim.step(
            x, m, A[row].item(), P[row].item(), noise=noise, return_x0=True, impl=impl, **kind
        )
        for got in (
            table(x, m, row, noise=noise),
            table(x, m, torch.tensor([row % 4]), noise=noise),
            table(x, m, torch.full((4,), row % 4), noise=noise),
        ):
            assert all(map(torch.equal, got, expected))
        got = table(x, m, row, noise=noise, return_x0=False)
        assert got[1] is None
        assert torch.equal(got[0], expected[0])


def test_a_row_for_each_sample() -> None:
    table = table_of(A, P, Update(eta=1.0))
    x, m, z = (draws(4, 5, seed=s) for s in range(3))
    rows = torch.tensor([3, 0, 0, 2])
    got = table(x, m, rows, noise=z)[0]
    for i, row in enumerate(rows.tolist()):
        alone = table(x[i : i + 1], m[i : i + 1], row, noise=z[i : i + 1])[0]
        assert torch.equal(got[i : i + 1], alone)


def test_noise_by_keys() -> None:
    table = table_of(A, P, Update(eta=1.0))
    x, m = draws(2, 5), draws(2, 5, seed=1)
    keys = philox.make_keys(7, 2, step_index=3)
    expected = fastddim.step(x, m, 0.3, 0.5, eta=1.0, seed=7, step_index=3)
    assert torch.equal(table(x, m, 1, keys=keys)[0], expected)


def test_mixing() -> None:
    table = StepTable(stack_row(mixing_row(A, -P)))
    x, m = draws(4, 5), draws(4, 5, seed=1)
    expected = A[:, None] * x - P[:, None] * m
    torch.testing.assert_close(table(x, m, torch.arange(4))[0], expected)


@pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
def test_gradients(kind: dict) -> None:
    table = table_of(A, P, Update(**kind).checked(None))
    x, m = draws(2, 5), draws(4 if "guidance_scale" in kind else 2, 5, seed=1)
    x.requires_grad_()
    m.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: table(x, m, 1), (x, m))
    with torch.no_grad():
        assert not table(x, m, 1)[0].requires_grad


def test_impossible_rows_harm_no_other() -> None:
    """Impossible rows harm no other: ᾱ = 0 for epsilon, and more noise than possible, give NaN or
    infinity if they are used.
    """
    a, p = torch.tensor([0.0, 0.1, 0.5]).double(), torch.tensor([0.1, 0.2, 0.9]).double()
    table = table_of(a, p, Update(eta=1.2))
    x, m = draws(1, 5), draws(1, 5, seed=1)
    assert not table(x, m, 0, noise=x)[0].isfinite().any()
    assert table(x, m, 2, noise=x)[0].isnan().all()
    assert table(x, m, 1, noise=x)[0].isfinite().all()


def test_rows_that_are_not_there() -> None:
    table = table_of(A, P, Update())
    x = draws(1, 5)
    for row in (4, -5):
        with pytest.raises(IndexError):
            table(x, x, row)
    if ops.EXTENSION_ERROR is None:
        with pytest.raises(RuntimeError, match="row: expected values in"):
            table(x, x, torch.tensor([4]))


def test_nothing_waits() -> None:
    table = table_of(A, P, Update(eta=1.0))
    x, m, row = draws(2, 5), draws(2, 5), torch.tensor([1])
    table(x, m, 0, noise=x)
    with NoSync() as probe:
        for r in (0, 1, 2, row):
            table(x, m, r, noise=x)
    assert probe.calls > 0


def test_first_used_in_inference_mode() -> None:
    """A table first used in inference mode keeps no inference tensor, through which no later call
    could have a gradient.
    """
    table = StepTable(stack_row(mixing_row(A, -P)))
    x, m = draws(2, 5), draws(2, 5, seed=1)
    with torch.inference_mode():
        table(x, m, 1)
        table(x, m, 2)
    for row in (1, 2, 3):
        leaf = x.clone().requires_grad_()
        table(leaf, m, row)[0].sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(x, A[row].item()))


def test_under_torch_compile() -> None:
    table = table_of(A, P, Update())
    x, m = draws(2, 5), draws(2, 5, seed=1)
    table(x, m, 1)
    compiled = torch.compile(lambda x, m: table(x, m, 1)[0] * 2, backend="aot_eager")
    assert torch.equal(compiled(x, m), table(x, m, 1)[0] * 2)


def test_threads_with_states_of_different_dtypes() -> None:
    table, wrong = table_of(A, P, Update(eta=0.25)), []

    def work(dtype: torch.dtype) -> None:
        x, m = draws(2, 9, dtype=dtype), draws(2, 9, dtype=dtype, seed=1)
        expected = fastddim.step(x, m, 0.3, 0.5, eta=0.25, noise=x)
        for _ in range(300):
            got = table(x, m, 1, noise=x)[0]
            if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2):
                wrong.append(dtype)

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in dtypes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_table_that_is_let_go_takes_its_memory_along() -> None:
    """A table that is released frees its memory at once, without the garbage collector."""
    table = table_of(A, P, Update())
    x = draws(2, 5)
    table(x, x, 1)
    prepared = table._prepared.get((x.device, x.dtype))
    assert prepared is not None
    alive = weakref.ref(prepared.table)
    del prepared
    gc.disable()
    try:
        del table
        assert alive() is None
    finally:
        gc.enable()
