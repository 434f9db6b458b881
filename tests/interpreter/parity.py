"""The Triton kernels under Triton's interpreter, bit for bit against the C++ kernel on the CPU.

Run by tests/test_triton_interpreter.py in a process of its own: TRITON_INTERPRET is read where a
kernel is defined, and holds for the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from fastddim.kernels import launch, views
from gpucheck.triton_jit import LAUNCHERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddim import Schedule, backends, philox
from fastddim.plan import Update, make_plan, to_table

from ..support.gpuless.cases import UPDATES, assert_bits_of_cpu, update_case
from ..support.gpuless.fits import (
    BACKWARD_CASES,
    FIT_CASES,
    assert_backward_of_cpu,
    assert_fit_of_cpu,
    backward_case,
    fit_case,
)
from ..support.models import elementwise_model
from ..support.tuned import random_steps
from ..support.updates import DTYPES, any_case, make_case, poisoned_like, written_only_inside

# The interpreter takes milliseconds a program, however small; as PTX all of them run
# (tests/test_triton_ptx.py).
CASES = [name for name in UPDATES if not name.startswith("(300, 8)")][::2]
QUICK = CASES[::4]


@triton.jit
def fma_and_round(x, y, z, out, narrow, TILE: tl.constexpr):
    lane = tl.arange(0, TILE)
    value = tl.fma(tl.load(x + lane), tl.load(y + lane), tl.load(z + lane))
    tl.store(out + lane, value)
    tl.store(narrow + lane, value.to(tl.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_interpreter_is_corrected(dtype: torch.dtype) -> None:
    x = 1 + torch.rand(1024).to(dtype) * 2**-10
    y = 1 - torch.rand(1024).to(dtype) * 2**-10
    z = -(x * y)
    out, narrow = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    fma_and_round[(1,)](x, y, z, out, narrow, TILE=1024)
    assert out.count_nonzero() > 900, "the rounding error of the product, unless that is rounded"
    if dtype == torch.float32:
        assert torch.equal(out, (x.double() * y.double() + z.double()).float())
        assert torch.equal(narrow, out.bfloat16())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.deep) for name in CASES]
)
def test_updates(name: str) -> None:
    assert_bits_of_cpu(LAUNCHERS.update_out, update_case(name), in_place=CASES.index(name) % 2 == 1)


@pytest.fixture
def huge_tiles() -> Iterator[None]:
    """Tiles of 65,536 elements, with or without vectors."""

    def cut(layout: views.SampleLayout, *args: object, **kwargs: object) -> views.Tiles:
        tiles = views.cut(layout, *args, **kwargs)
        return tiles._replace(size=65536, per_sample=-(-layout.elements // 65536))

    with mock.patch.object(launch, "cut", cut):
        launch._found_update.cache_clear()
        yield
    launch._found_update.cache_clear()


@pytest.mark.deep
@pytest.mark.usefixtures("huge_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 320, 320), (1, 4, 401, 201)])
def test_large_samples(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(8)
    case = make_case(generator, shape, dtype=dtype, noise="keyed", guided=True)
    assert_bits_of_cpu(LAUNCHERS.update_out, case)


@pytest.mark.deep
@settings(max_examples=40)
@given(data=st.data())
def test_random_cases(data: st.DataObject) -> None:
    """Any combination of features agrees."""
    case = any_case(data, largest_batch=4)
    assert_bits_of_cpu(LAUNCHERS.update_out, case, in_place=data.draw(st.booleans()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if i % 20 == 0 else pytest.mark.deep)
        for i, n in enumerate(FIT_CASES)
    ],
)
def test_rows_from_data(name: str) -> None:
    assert_fit_of_cpu(LAUNCHERS.rescale_rows, *fit_case(name))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if i % 14 == 0 else pytest.mark.deep)
        for i, name in enumerate(BACKWARD_CASES)
        # Many programs.
        if name != "(300, 8)"
    ],
)
def test_gradients(name: str) -> None:
    assert_backward_of_cpu(LAUNCHERS.backward_out, *backward_case(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_normals(dtype: torch.dtype, layout: str) -> None:
    for shape in [(3, 5, 7, 9), (2, 0, 1, 1), (1, 4, 32, 32)]:
        case = make_case(
            torch.Generator().manual_seed(1), shape, dtype=dtype, layout=layout, noise="keyed"
        )
        assert case.keys is not None
        expected = philox.normal(case.keys, shape[1:], philox.LATENTS).to(dtype)
        framed, buffer = poisoned_like(case.x)
        for out in (framed, torch.full_like(case.x, float("nan"))):
            LAUNCHERS.normal_out(case.keys, philox.LATENTS, out)
            assert torch.equal(out, expected)
        assert written_only_inside(framed, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned_steps(dtype: torch.dtype) -> None:
    """Each tuned step starts from the state and the epsilon of the step before."""
    tuned = random_steps(4, clip=0.8)
    plan = make_plan(Schedule.linear(), tuned, Update(clip=0.8).checked(None))
    table = to_table(plan.table, torch.float32, torch.device("cpu"))
    runs = []
    for update_out in (LAUNCHERS.update_out, backends.BACKENDS["cpu"].update_out):
        x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
        history = torch.zeros_like(x)
        for s, t in enumerate(tuned.timesteps):
            m = elementwise_model(x, torch.full((3,), t))
            row = torch.tensor([s])
            given = {"noise": None, "keys": None, "history": history, "epsilon": history}
            update_out(x, m, table, row, **given, out=x, x_0=None, model_input=None)
        runs.append((x, history))
    assert all(map(torch.equal, *runs))
    assert runs[0][0].isfinite().all()


@pytest.mark.parametrize("count", [1, 31, 128, 300])
def test_advance(count: int) -> None:
    timesteps = torch.randint(0, 1000, (9,))
    counters = torch.randint(0, 8, (count + 3,))
    before, t = counters.clone(), torch.zeros(count, dtype=torch.int64)
    LAUNCHERS.advance(counters, timesteps, t)
    assert torch.equal(counters, before + 1)
    assert torch.equal(t, timesteps[counters[:count]])


def sparse(path: Path, elements: int) -> Tensor:
    """float16 in a file without a byte on the disk until it is written."""
    with path.open("wb") as file:
        file.truncate(2 * elements)
    return torch.from_file(str(path), shared=True, size=elements, dtype=torch.float16)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Rows 2³¹ + 48 elements apart."""
    distance, generator = 2**31 + 48, torch.Generator().manual_seed(2)
    memory = sparse(tmp_path / "memory", distance + 1200)
    case = make_case(generator, (2, 2, 80), dtype=torch.float16, noise="keyed")
    expected = torch.empty_like(case.x)
    arguments = {"noise": None, "keys": case.keys, "x_0": None, "model_input": None}
    LAUNCHERS.update_out(case.x, case.model_output, case.table, case.row, **arguments, out=expected)
    x, m, out = (
        memory[start:].as_strided(case.x.shape, (200, distance, 1)) for start in (0, 400, 800)
    )
    x.copy_(case.x)
    m.copy_(case.model_output)
    LAUNCHERS.update_out(x, m, case.table, case.row, **arguments, out=out)
    assert torch.equal(out, expected)


@triton.jit
def gather(view, out, first, count, TILE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    for i in tl.static_range(1 if VECTOR > 1 else 4):
        span = views.part((7, 2**31), 0, first, count, i, False, TILE, VECTOR)
        tl.store(out + (span.element - first), views.read(view, span, WIDE), mask=span.inside)


@pytest.mark.parametrize("vector", [1, 8])
def test_elements_beyond_32_bits(vector: int, tmp_path: Path) -> None:
    """A tile that begins at element 2³² + 16 of a run."""
    first = 2**32 + 16
    memory = sparse(tmp_path / "memory", first + 1000)
    memory[first : first + 200] = torch.arange(200)
    out = torch.full((256,), -1.0, dtype=torch.float16)
    gather[(1,)](
        views.View(memory, 0, ()), out, first, first + 200, TILE=256, VECTOR=vector, WIDE=False
    )
    assert torch.equal(out[:200], torch.arange(200).half())
    assert (out[200:] == -1).all()
