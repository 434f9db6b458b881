"""The interpreter of PTX: whole kernels that nvcc and Triton compiled.

Each check of memory and barriers has a kernel that breaks its rule.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gpucheck.machine_code import nvcc

from .support.environment import ROOT
from .support.gpuless import ptx
from .support.gpuless.toolchain import compile_ptx, needs_nvcc

KERNELS = ROOT / "tests/support/gpuless/kernels.cu"
LAUNCHERS = ROOT / "tests/support/gpuless/launchers.cu"


@pytest.fixture(scope="module")
def module() -> ptx.Module:
    if nvcc() is None:
        pytest.skip("there is no nvcc")
    return ptx.parse(compile_ptx(KERNELS, "sm_90", "-fmad=false"))


@pytest.fixture(scope="module")
def launched_text() -> str:
    if nvcc() is None:
        pytest.skip("there is no nvcc")
    return compile_ptx(LAUNCHERS, "sm_90", "-fmad=false")


@pytest.fixture(scope="module")
def launched(launched_text: str) -> ptx.Module:
    return ptx.parse(launched_text)


def start(
    module: ptx.Module,
    name: str,
    *tensors: torch.Tensor,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (64, 1, 1),
    shared_bytes: int = 0,
) -> ptx.Launch:
    """Starts a kernel on tensors, the last of which it may write."""
    memory = ptx.Memory()
    for i, tensor in enumerate(tensors):
        memory.add_tensor(tensor, f"tensor {i}", writable=i == len(tensors) - 1)
    pointers = [tensor.data_ptr() for tensor in tensors]
    return ptx.run(module, name, grid, block, pointers, memory, shared_bytes)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two_writers", r"race: thread \d+ overwrites what thread \d+ wrote"),
        ("read_after_write", "reads what thread"),
        ("write_after_read", "overwrites what"),
        ("a_byte_of_a_word", "overwrites what thread"),
        ("a_byte_of_what_was_read", "overwrites what thread 0 read"),
        ("written_by_the_last_reader", "overwrites what others read"),
        ("reads_back_through_nc", "non-coherent"),
        ("divergent_barrier", "divergent barrier"),
        ("barrier_after_exit", "divergent barrier"),
        ("two_barriers", "divergent barrier"),
        ("shared_without_barrier", "reads what thread"),
        ("counted_and_read", "reads what others wrote"),
        ("counted_before_the_barrier", "changes what thread 63 wrote"),
        ("read_and_counted", "changes what others read"),
        ("counted_beyond_shared", "out of bounds of 256 bytes of shared memory"),
        ("beyond_shared", "out of bounds of 256 bytes of shared memory"),
    ],
)
def test_broken_rules(module: ptx.Module, name: str, reason: str) -> None:
    with pytest.raises(ptx.PtxError, match=reason):
        start(module, name, torch.zeros(65))


def test_races_between_blocks(module: ptx.Module) -> None:
    """Races between blocks are found, also if the blocks do not run in the same wave."""
    assert start(module, "two_blocks_write", torch.zeros(64)).executed["ret"] == 64
    for blocks in (2, 1000):
        with pytest.raises(ptx.PtxError, match="race"):
            start(module, "two_blocks_write", torch.zeros(64), grid=(blocks, 1, 1))


def test_what_is_no_race(module: ptx.Module) -> None:
    out = torch.zeros(64, dtype=torch.uint8)
    start(module, "neighbouring_bytes", out)
    assert out.tolist() == list(range(64))
    values = torch.arange(64.0)
    start(module, "in_place", values)
    assert values.tolist() == [i + 1.0 for i in range(64)]


def test_store_into_read_only_memory(module: ptx.Module) -> None:
    values = torch.zeros(64)
    memory = ptx.Memory()
    memory.add_tensor(values, "values", writable=False)
    with pytest.raises(ptx.PtxError, match="store into values, which is read-only"):
        ptx.run(module, "in_place", (1, 1, 1), (64, 1, 1), [values.data_ptr()], memory)
    assert values.tolist() == [0.0] * 64


@pytest.mark.parametrize("short", ["in", "out"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_bounds_are_exact_to_the_byte(module: ptx.Module, short: str, end: str) -> None:
    """Bounds are exact to the byte, also with another region right next to them, whose bytes are no
    part of this one.
    """
    block = torch.arange(640, dtype=torch.uint8)
    regions = {"in": block[64:192], "out": block[320:448]}
    before = block.clone()

    def run(cut: str | None) -> ptx.Launch:
        memory = ptx.Memory()
        for name, view in regions.items():
            shift = (1 if end == "first" else 0) if name == cut else 0
            size = len(view) - (name == cut)
            memory.add(view.data_ptr() + shift, size, name, writable=name == "out")
        pointers = [view.data_ptr() for view in regions.values()]
        return ptx.run(module, "copy_bytes", (2, 1, 1), (64, 1, 1), pointers, memory)

    assert run(None).bytes_read == {"in": 128}
    assert torch.equal(block[320:448], before[64:192])
    assert torch.equal(block[448:], before[448:])
    deed = "load" if short == "in" else "store"
    with pytest.raises(ptx.PtxError, match=rf"{deed} of 1 bytes at .* out of bounds.*of {short}"):
        run(short)


def test_a_wide_access_is_not_split_between_regions(module: ptx.Module) -> None:
    source, out = torch.arange(256.0), torch.zeros(256)
    memory = ptx.Memory()
    memory.add(source.data_ptr(), 1000, "first", writable=False)
    memory.add(source.data_ptr() + 1000, 24, "second", writable=False)
    memory.add_tensor(out, "out")
    pointers = [source.data_ptr(), out.data_ptr()]
    with pytest.raises(ptx.PtxError, match=r"load of 16 bytes .* out of bounds"):
        ptx.run(module, "copy_wide", (1, 1, 1), (64, 1, 1), pointers, memory)


def test_accesses_from_several_regions_at_once(module: ptx.Module) -> None:
    source, out = torch.arange(256.0), torch.zeros(256)
    memory = ptx.Memory()
    memory.add(source.data_ptr(), 512, "low", writable=False)
    memory.add(source.data_ptr() + 512, 512, "high", writable=False)
    memory.add_tensor(out, "out")
    pointers = [source.data_ptr(), out.data_ptr()]
    launch = ptx.run(module, "copy_wide", (1, 1, 1), (64, 1, 1), pointers, memory)
    assert torch.equal(out, source)
    assert launch.bytes_read == {"low": 512, "high": 512}
    assert launch.bytes_written == {"out": 1024}


@pytest.mark.parametrize("place", [0, 1])
def test_misaligned_vectors(module: ptx.Module, place: int) -> None:
    tensors = [torch.zeros(260), torch.zeros(260)]
    assert all(t.data_ptr() % 16 == 0 for t in tensors)
    start(module, "copy_wide", *tensors)
    tensors[place] = tensors[place][1:]
    with pytest.raises(ptx.PtxError, match="misaligned access of 16 bytes"):
        start(module, "copy_wide", *tensors)


def test_wild_pointers(module: ptx.Module) -> None:
    """Wild pointers are refused, also those whose end wraps around the address space."""
    out = torch.zeros(64)
    memory = ptx.Memory()
    memory.add_tensor(out, "out")
    for pointer in (0, 2**64 - 64, 2**63, out.data_ptr() - 4, out.data_ptr() + 4096):
        with pytest.raises(ptx.PtxError, match="out of bounds"):
            ptx.run(module, "in_place", (1, 1, 1), (64, 1, 1), [pointer], memory)


def test_regions_must_not_overlap() -> None:
    memory = ptx.Memory()
    values = torch.zeros(8)
    memory.add_tensor(values[:4], "left")
    memory.add_tensor(values[4:], "right")
    with pytest.raises(ValueError, match="middle: expected a region of its own, overlaps left"):
        memory.add_tensor(values[3:5], "middle")


def test_strided_views_span_their_extent() -> None:
    base = torch.zeros(6, 10)
    view = base[1:4, 2:5]
    memory = ptx.Memory()
    memory.add_tensor(view, "view")
    (region,) = memory
    assert region.address == base.data_ptr() + 12 * 4
    assert region.size == (2 * 10 + 3) * 4
    memory.add_tensor(base[4, 6:6], "empty")
    assert len(list(memory)) == 1


def test_shared_memory_and_barriers(module: ptx.Module) -> None:
    """Shared memory and barriers work in blocks of several waves, each with rows of its own."""
    values = torch.randn(64 * 600)
    before = values.clone()
    start(module, "reverse", values, grid=(600, 1, 1))
    assert torch.equal(values.view(600, 64), before.view(600, 64).flip(1))


def test_barriers_in_loops(module: ptx.Module) -> None:
    values = torch.randint(-1000, 1000, (300 * 128,), dtype=torch.int32)
    sums = torch.zeros(300, dtype=torch.int32)
    start(module, "sum_of_block", values, sums, grid=(300, 1, 1), block=(128, 1, 1),
          shared_bytes=512)  # fmt: skip
    assert torch.equal(sums.long(), values.view(300, 128).long().sum(1))
    with pytest.raises(ptx.PtxError, match="out of bounds of 511 bytes"):
        start(module, "sum_of_block", values, sums, block=(128, 1, 1), shared_bytes=511)


def test_atomic_additions(module: ptx.Module) -> None:
    """Several threads add to one number; its value before an addition depends on their order."""
    values = torch.randint(0, 9, (40, 64), dtype=torch.int32)
    counts = torch.zeros(40, 64, dtype=torch.int32)
    start(module, "histogram_of_block", values, counts, grid=(40, 1, 1))
    expected = torch.stack([row.bincount(minlength=64) for row in values.long()])
    expected[:, 63] += 2 * len(range(0, 64, 3))
    assert torch.equal(counts.long(), expected)
    out = torch.zeros(64)
    start(module, "order_of_atomics", out)
    assert out.tolist() == [2.0**32] * 64


def test_divergent_loops(module: ptx.Module) -> None:
    """Each thread leaves its loop at another time."""
    values = torch.arange(1, 513, dtype=torch.int32)
    out = torch.zeros(512, dtype=torch.int32)
    start(module, "steps_to_one", values, out, grid=(8, 1, 1))

    def steps(value: int) -> int:
        count = 0
        while value != 1:
            value, count = 3 * value + 1 if value % 2 else value // 2, count + 1
        return count

    assert out.tolist() == [steps(i) for i in range(1, 513)]


def test_variables_and_local_memory(module: ptx.Module) -> None:
    out = torch.zeros(6, dtype=torch.int32)
    start(module, "variables", out, block=(6, 1, 1))
    assert out.tolist() == [42, 43, 45, 47, 51, 53]
    index = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6], dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int32)
    launch = start(module, "local_array", index, out, block=(8, 1, 1))
    assert any(".local" in opcode for opcode in launch.executed)
    assert out.tolist() == [int(index[v]) + i for i, v in enumerate(index.tolist())]


def test_coordinates(launched: ptx.Module) -> None:
    grid, block = (3, 4, 2), (5, 2, 3)
    out = torch.full((3 * 4 * 2 * 5 * 2 * 3,), -1, dtype=torch.int32)
    start(launched, "coordinates", out, grid=grid, block=block)
    expected = [
        bx + 10 * by + 100 * bz + 1000 * tx + 10000 * ty + 100000 * tz
        for bz, by, bx, tz, ty, tx in itertools.product(
            *map(range, (grid[2], grid[1], grid[0], block[2], block[1], block[0]))
        )
    ]
    assert out.tolist() == expected


def test_shuffles(module: ptx.Module) -> None:
    values = torch.randint(-(2**31), 2**31, (128,), dtype=torch.int32)
    out = torch.zeros(6, 128, dtype=torch.int32)
    start(module, "shuffles", values, out, grid=(2, 1, 1))
    warps, lane = values.view(4, 32), torch.arange(32)
    sources = [
        torch.full((32,), 5),
        (lane * 7) % 32,
        lane ^ 9,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane + 4 < 32, lane + 4, lane),
        lane // 8 * 8 + (lane + 1) % 8,
    ]
    for got, source in zip(out.view(6, 4, 32), sources, strict=True):
        assert torch.equal(got, warps[:, source])
    with pytest.raises(ptx.PtxError, match="divergent warp"):
        start(module, "shuffles_of_some", values, out)
    with pytest.raises(ptx.PtxError, match="all threads of the warp"):
        start(module, "shuffles_by_mask", values, out)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 16), (128, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exchanges_of_triton(capability: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Exchanges of Triton change layouts through shared memory, by vectors or by matrices."""
    pytest.importorskip("triton", reason="there is no Triton")
    from .support.gpuless.transpose import compiled

    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
    text, shared_bytes = compiled(capability, name, rows, columns)
    values = torch.randn(3, rows, columns, dtype=torch.float64).to(dtype)
    out = torch.zeros(3, columns, rows, dtype=dtype)
    memory = ptx.Memory()
    memory.add_tensor(values, "values", writable=False)
    memory.add_tensor(out, "out")
    module = ptx.parse(text)
    arguments = [values.data_ptr(), out.data_ptr()]
    arguments += [0] * (len(module.kernels["transpose"].parameters) - 2)
    launch = ptx.run(module, "transpose", (3, 1, 1), (128, 1, 1), arguments, memory, shared_bytes)
    assert torch.equal(out, values.mT)
    assert any("shared" in opcode for opcode in launch.executed)
    # The barrier between writing and reading is needed.
    broken = ptx.parse(text.replace("bar.sync", "// bar.sync"))
    with pytest.raises(ptx.PtxError, match="race"):
        ptx.run(broken, "transpose", (3, 1, 1), (128, 1, 1), arguments, memory, shared_bytes)


@needs_nvcc
def test_conversions_of_nvcc() -> None:
    """Old targets convert by other instructions than new ones."""
    values = torch.cat([torch.randn(60), torch.tensor([65504.0, 1e-7, math.inf, -0.0])])
    for arch in ("sm_80", "sm_90", "sm_120"):
        module = ptx.parse(compile_ptx(KERNELS, arch, "-fmad=false"))
        half, brain = torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.bfloat16)
        wide = torch.zeros(64, dtype=torch.float64)
        memory = ptx.Memory()
        for name, tensor in (("in", values), ("half", half), ("brain", brain), ("wide", wide)):
            memory.add_tensor(tensor, name, writable=name != "in")
        pointers = [t.data_ptr() for t in (values, half, brain, wide)]
        ptx.run(module, "narrow", (1, 1, 1), (64, 1, 1), pointers, memory)
        assert torch.equal(half, values.half())
        assert torch.equal(brain, values.bfloat16())
        assert torch.equal(wide, values.half().double() + values.bfloat16().double())


def test_executed_counts(launched: ptx.Module) -> None:
    values, out = torch.randn(96), torch.zeros(96)
    launch = start(launched, "fused", values, out, grid=(3, 1, 1), block=(32, 1, 1))
    assert launch.executed["fma.rn.f32"] == 96
    assert launch.executed["ret"] == 96
    assert launch.executed["st.global.f32"] == 96
    assert launch.bytes_read == {"tensor 0": 384}
    assert launch.bytes_written == {"tensor 1": 384}


def test_launch_bounds(module: ptx.Module) -> None:
    start(module, "at_most_64", torch.zeros(64))
    with pytest.raises(ptx.PtxError, match="expected at most 64 threads, got 65"):
        start(module, "at_most_64", torch.zeros(65), block=(65, 1, 1))


def test_arguments_are_checked(launched: ptx.Module) -> None:
    with pytest.raises(ptx.PtxError, match="expected 2 arguments, got 1"):
        start(launched, "fused", torch.zeros(64))
    sizes = [size for _, size in launched.kernels["large_parameter"].parameters]
    assert sizes == [4016, 8]
    with pytest.raises(ptx.PtxError, match="expected 4016 bytes, got 12"):
        ptx.run(launched, "large_parameter", (1, 1, 1), (64, 1, 1), [bytes(12), 0], ptx.Memory())
    with pytest.raises(ptx.PtxError, match="no such kernel"):
        start(launched, "missing", torch.zeros(64))
