"""Counters of a loop: positions that move, and positions that are known."""

from __future__ import annotations

import pytest
import torch

from fastddim import Schedule, backends, philox
from fastddim.loop.alignment import ALIGNMENT, aligned_rows
from fastddim.loop.counters import Counters, Position
from fastddim.plan import Plan, Update, make_plan

from .support.environment import CPU_IMPLS

CPU = torch.device("cpu")
KINDS = {
    "plain": {},
    "guided": {"guidance_scale": 2.0},
    "rows": {"eta": torch.tensor([0.0, 0.5, 1.0])},
    "guided rows": {"guidance_scale": torch.tensor([1.0, 2.0, 3.0])},
}


def make(kind: str, steps: int, *, unrolled: bool = True) -> tuple[Plan, Counters]:
    plan = make_plan(Schedule.linear(), steps, Update(**KINDS[kind]).checked(3))
    counters = Counters(plan, 3, CPU)
    counters.load(plan.timesteps)
    if unrolled:
        counters.unroll()
    counters.load_samples(philox.check_samples(7, 3, sample_offset=4), known=True)
    return plan, counters


def numbers(position: Position) -> list[list[int]]:
    places = torch.arange(100)[:, None]
    table, row = position.rows_in(places)
    rows = table[:1] if row is None else table[row]
    parts = (position.step, rows.flatten(), position.t, *position.keys)
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_each_position_is_where_counting_leads(kind, steps, impl):
    plan, counters = make(kind, steps)
    own_rows = plan.table.ndim == 3
    for _ in range(2):
        counters.rewind()
        for s, known in enumerate(counters.each):
            width = 6 if plan.kind.guided else 3
            assert numbers(counters.now) == [
                [s],
                [s, steps + s, 2 * steps + s] if own_rows else [s],
                [plan.timesteps[s]] * width,
                [7] * 3,
                [s] * 3,
                [4, 5, 6],
            ]
            assert numbers(known) == numbers(counters.now)
            counters.advance(backends.BACKENDS[impl])
    assert len(counters.each) == steps


@pytest.mark.parametrize("kind", KINDS)
def test_other_timesteps_reach_every_position(kind):
    _, counters = make(kind, 4)
    before = [position.t.data_ptr() for position in (counters.now, *counters.each)]
    counters.load(torch.tensor([900, 31, 7, 2]))
    counters.rewind()
    assert [int(position.t[-1]) for position in counters.each] == [900, 31, 7, 2]
    assert counters.now.t.tolist() == [900] * len(counters.now.t)
    assert before == [position.t.data_ptr() for position in (counters.now, *counters.each)]


@pytest.mark.parametrize("seed", [5, 2**64 - 1, [1, 2**63, 3]])
def test_keys_are_those_of_the_specification(seed):
    _, counters = make("plain", 3)
    counters.load_samples(philox.check_samples(seed, 3), known=True)
    for s, position in enumerate(counters.each):
        expected = philox.make_keys(seed, 3, step_index=s)
        assert all(torch.equal(a, b) for a, b in zip(position.keys, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_begins_aligned(kind):
    """Triton compiles a kernel of its own for a pointer that is not aligned."""
    _, counters = make(kind, 5)
    for position in (counters.now, *counters.each):
        for part in (position.t, position.keys.step, position.keys.seed, position.keys.sample):
            assert part.data_ptr() % ALIGNMENT == 0
            assert part.is_contiguous()
    for position in counters.each:
        for part in position.rows_in(torch.zeros(20, 12)):
            assert part is None or part.data_ptr() % ALIGNMENT == 0
    assert counters.counting.data_ptr() % ALIGNMENT == 0


def test_a_loop_that_counts_keeps_no_table():
    _, counters = make("plain", 5, unrolled=False)
    assert not counters.each
    assert sum(t.numel() for t in counters.tensors()) < 30


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (4, 4)])
def test_aligned_rows(shape, dtype):
    rows = aligned_rows(3, shape, dtype, CPU)
    assert rows.shape == (3, *shape)
    assert rows.dtype == dtype
    for row in rows:
        assert row.is_contiguous()
        assert row.data_ptr() % ALIGNMENT == 0
        assert not row.any()
