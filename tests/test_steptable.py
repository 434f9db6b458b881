"""Steps by row of a table, and the memory that large ones use again."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import ops, philox, recycling
from fastddim.plan import Update, mixing_row, stack_row
from fastddim.recycling import KEPT, Recycler
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
    {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"guidance_scale": 3.0, "guidance_rescale": 0.7},
]


def draws(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("impl", ["auto", *CPU_IMPLS])
@pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_steps(impl: str, kind: dict, dtype: torch.dtype) -> None:
    table = StepTable.of(A, P, Update(**kind).checked(None))
    table = StepTable(table.rows, fit=Update(**kind).fit, impl=impl)
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
    table = StepTable.of(A, P, Update(eta=1.0))
    x, m, z = (draws(4, 5, seed=s) for s in range(3))
    rows = torch.tensor([3, 0, 0, 2])
    got = table(x, m, rows, noise=z)[0]
    for i, row in enumerate(rows.tolist()):
        alone = table(x[i : i + 1], m[i : i + 1], row, noise=z[i : i + 1])[0]
        assert torch.equal(got[i : i + 1], alone)


def test_noise_by_keys() -> None:
    table = StepTable.of(A, P, Update(eta=1.0))
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
    table = StepTable.of(A, P, Update(**kind).checked(None))
    x, m = draws(2, 5), draws(4 if "guidance_scale" in kind else 2, 5, seed=1)
    x.requires_grad_()
    m.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: table(x, m, 1), (x, m))
    with torch.no_grad():
        assert not table(x, m, 1)[0].requires_grad


def test_impossible_rows_harm_no_other() -> None:
    """ᾱ = 0 for epsilon, and more noise than there is: NaN or infinity, where they are used."""
    a, p = torch.tensor([0.0, 0.1, 0.5]).double(), torch.tensor([0.1, 0.2, 0.9]).double()
    table = StepTable.of(a, p, Update(eta=1.2))
    x, m = draws(1, 5), draws(1, 5, seed=1)
    assert not table(x, m, 0, noise=x)[0].isfinite().any()
    assert table(x, m, 2, noise=x)[0].isnan().all()
    assert table(x, m, 1, noise=x)[0].isfinite().all()


def test_rows_that_are_not_there() -> None:
    table = StepTable.of(A, P, Update())
    x = draws(1, 5)
    for row in (4, -5):
        with pytest.raises(IndexError):
            table(x, x, row)
    if ops.EXTENSION_ERROR is None:
        with pytest.raises(RuntimeError, match="row: expected values in"):
            table(x, x, torch.tensor([4]))


def test_nothing_waits() -> None:
    table = StepTable.of(A, P, Update(eta=1.0))
    x, m, row = draws(2, 5), draws(2, 5), torch.tensor([1])
    table(x, m, 0, noise=x)
    with NoSync() as probe:
        for r in (0, 1, 2, row):
            table(x, m, r, noise=x)
    assert probe.calls > 0


def test_first_used_in_inference_mode() -> None:
    """Nothing that is kept is an inference tensor, which no later call could have a gradient by."""
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
    table = StepTable.of(A, P, Update())
    x, m = draws(2, 5), draws(2, 5, seed=1)
    table(x, m, 1)
    compiled = torch.compile(lambda x, m: table(x, m, 1)[0] * 2, backend="aot_eager")
    assert torch.equal(compiled(x, m), table(x, m, 1)[0] * 2)


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddim.steptable.LARGE", 1)


@pytest.mark.usefixtures("small_is_large")
class TestRecycling:
    def test_results_are_right_and_stay(self) -> None:
        table = StepTable.of(A, P, Update(eta=1.0))
        plain = StepTable.of(
            A,
            P,
            Update(eta=1.0),
        )
        held = []
        for i in range(20):
            x, m, z = (draws(3, 4, 5, seed=3 * i + k) for k in range(3))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastddim.steptable.LARGE", 1 << 40)
                expected = plain(x, m, i % 4, noise=z)
            got = table(x, m, i % 4, noise=z)
            assert all(map(torch.equal, got, expected))
            if i % 3 == 0:
                held.append((got, expected))
        for got, expected in held:
            assert all(map(torch.equal, got, expected))

    def test_a_loop_uses_the_same_memory_again(self) -> None:
        table = StepTable.of(A, P, Update())
        x, seen = draws(3, 5), set()
        for _ in range(50):
            x, x_0 = table(x, x, 1)
            seen |= {x.data_ptr(), x_0.data_ptr()}
        assert len(seen) <= KEPT


class TestRecycler:
    LIKE = torch.zeros(3, 4, 5)

    def test_layouts(self) -> None:
        recycler = Recycler()
        for like in (
            self.LIKE,
            self.LIKE.transpose(1, 2),
            self.LIKE[:, ::2],
            self.LIKE[:, :1].expand(3, 4, 5),
            torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            torch.zeros(7, dtype=torch.bfloat16),
            torch.zeros(0, 3),
        ):
            made, expected = recycler.empty_like(like), torch.empty_like(like)
            assert made.shape == expected.shape
            assert made.stride() == expected.stride()
            assert made.dtype == expected.dtype
            made.fill_(1)

    @pytest.mark.parametrize(
        "hold",
        [
            lambda t: t,
            lambda t: t[1],
            lambda t: t.detach(),
            lambda t: t.numpy(),
            lambda t: t.untyped_storage(),
            torch.from_dlpack,
            lambda t: memoryview(t.numpy()),
            lambda t: t.view(torch.int32),
            lambda t: [t.mT],
            lambda t: (t * torch.ones((), requires_grad=True)).grad_fn,
        ],
        ids=range(10),
    )
    def test_what_is_held_is_not_used_again(self, hold) -> None:
        recycler = Recycler()
        made = recycler.empty_like(self.LIKE).fill_(1)
        address = made.data_ptr()
        held = hold(made)
        del made
        others = [recycler.empty_like(self.LIKE) for _ in range(KEPT + 2)]
        assert address not in {other.data_ptr() for other in others}
        del held, others
        assert address in {recycler.empty_like(self.LIKE).data_ptr() for _ in range(3)}

    def test_no_more_is_kept_than_a_few_of_one_size(self) -> None:
        recycler = Recycler()
        held = [recycler.empty_like(self.LIKE) for _ in range(KEPT + 5)]
        assert len({t.data_ptr() for t in held}) == KEPT + 5
        assert len(recycler._kept) == KEPT
        recycler.empty_like(torch.zeros(7))
        assert len(recycler._kept) == 1

    def test_threads(self) -> None:
        recycler, wrong = Recycler(), []

        def work(value: int) -> None:
            for _ in range(300):
                made = recycler.empty_like(self.LIKE).fill_(value)
                other = recycler.empty_like(self.LIKE).fill_(-value)
                if not bool((made == value).all() and (other == -value).all()):
                    wrong.append(value)

        threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_only_large_results_are_recycled(self) -> None:
        table = StepTable.of(A, P, Update())
        for size, kept in ((recycling.LARGE // 8 - 1, 0), (recycling.LARGE // 8, 2)):
            recycling.RECYCLER.clear()
            x = torch.from_numpy(np.zeros((1, size)))
            table(x, x, 1)
            own = recycling.RECYCLER._kept
            assert len(own) == (kept if ops.EXTENSION_ERROR is None else 0)
        recycling.RECYCLER.clear()
        assert not recycling.RECYCLER._kept


def test_tables_are_kept_by_their_values() -> None:
    table = StepTable.of(A, P, Update(eta=0.5))
    assert StepTable.of(A.clone(), P.clone(), Update(eta=0.5)) is table
    assert StepTable.of(A, P, Update(eta=0.6)) is not table
    assert StepTable.of(A * 0.99, P, Update(eta=0.5)) is not table
    etas = torch.tensor([0.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    first = StepTable.of(A, P, Update(eta=etas))
    etas += 0.5
    assert not torch.equal(StepTable.of(A, P, Update(eta=etas)).rows, first.rows)


def test_threads_with_states_of_different_dtypes() -> None:
    table, wrong = StepTable.of(A, P, Update(eta=0.25)), []

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
