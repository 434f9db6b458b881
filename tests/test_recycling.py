"""The memory that large results use again."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

from fastddim import ops, recycling
from fastddim.plan import mixing_row, stack_row
from fastddim.recycling import KEPT, LARGE, Recycler
from fastddim.steptable import StepTable

NEEDS_EXTENSION = pytest.mark.skipif(
    ops.EXTENSION_ERROR is not None, reason="needs the compiled extension"
)


def make_table() -> StepTable:
    a = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    return StepTable(stack_row(mixing_row(a, -a)))


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@NEEDS_EXTENSION
class TestInSteps:
    @pytest.fixture(autouse=True)
    def no_idle_blocks(self) -> None:
        recycling.RECYCLER.clear()

    def test_results_are_right_and_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recycled, plain, held = make_table(), make_table(), []
        for i in range(20):
            x, m, z = (draws(3, 4, 5, seed=3 * i + k) for k in range(3))
            expected = plain(x, m, i % 4, noise=z)
            with monkeypatch.context() as patch:
                patch.setattr("fastddim.steptable.LARGE", 1)
                got = recycled(x, m, i % 4, noise=z)
            assert all(map(torch.equal, got, expected))
            if i % 3 == 0:
                held.append((got, expected))
        for got, expected in held:
            assert all(map(torch.equal, got, expected))

    def test_a_loop_uses_the_same_memory_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastddim.steptable.LARGE", 1)
        table, x, seen = make_table(), draws(3, 5), set()
        for _ in range(50):
            x, x_0 = table(x, x, 1)
            seen |= {x.data_ptr(), x_0.data_ptr()}
        assert len(seen) <= KEPT

    @pytest.mark.parametrize(("size", "idle"), [(LARGE // 8 - 1, 0), (LARGE // 8, 2)])
    def test_only_large_results_are_recycled(self, size: int, idle: int) -> None:
        x = torch.from_numpy(np.zeros((1, size)))
        make_table()(x, x, 1)
        assert len(recycling.RECYCLER._idle) == idle
        recycling.RECYCLER.clear()
        assert not recycling.RECYCLER._idle

    def test_under_torch_compile(self) -> None:
        table, x = make_table(), torch.from_numpy(np.ones((1, LARGE // 8)))
        expected = table(x, x, 1)[0] * 2
        compiled = torch.compile(lambda x: table(x, x, 1)[0] * 2, backend="aot_eager")
        assert torch.equal(compiled(x), expected)


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
        del others, held
        assert recycler.empty_like(self.LIKE).data_ptr() == address

    def test_no_more_is_kept_than_a_few_blocks(self) -> None:
        recycler = Recycler()
        held = [recycler.empty_like(self.LIKE) for _ in range(KEPT + 5)]
        assert len({t.data_ptr() for t in held}) == KEPT + 5
        held.clear()
        assert len(recycler._idle) == KEPT
        assert not recycler._lent

    def test_blocks_of_another_size_are_dropped(self) -> None:
        recycler = Recycler()
        held = [recycler.empty_like(self.LIKE) for _ in range(KEPT)]
        held.clear()
        other = recycler.empty_like(torch.zeros(7))
        assert other.untyped_storage().nbytes() == 28
        assert not recycler._idle

    def test_tensors_outlive_their_recycler(self) -> None:
        recycler = Recycler()
        made = recycler.empty_like(self.LIKE).fill_(3)
        del recycler
        assert bool((made == 3).all())
        del made

    def test_results_are_ordinary_tensors(self) -> None:
        made = Recycler().empty_like(self.LIKE).fill_(2)
        assert made.is_leaf
        assert not made._is_view()
        made.requires_grad_().sum().backward()
        assert torch.equal(made.grad, torch.ones_like(made))
        assert torch.equal(copy.deepcopy(made.detach()), made)
        with pytest.raises(RuntimeError, match="not resizable"):
            made.detach().resize_(1000)

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
