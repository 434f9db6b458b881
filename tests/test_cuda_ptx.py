"""The CUDA kernels executed: launchers and PTX of nvcc on an interpreter, bit for bit against the
C++ kernel on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends

from .support.environment import needs_compiler, needs_extension
from .support.gpuless import launcher, ptx
from .support.gpuless.cases import (
    DIGITS,
    EACH_WAY,
    LONG,
    UPDATES,
    assert_advance,
    assert_bare_bits_of_cpu,
    assert_bits_of_cpu,
    assert_normals,
    recorded_digits,
    run_bare,
    same_bits,
    update_case,
)
from .support.gpuless.cuda_on_ptx import NAMESPACE, Device, device, idle, ptx_of
from .support.gpuless.toolchain import changed_cuda_source, needs_nvcc
from .support.updates import DTYPES, Case, make_case, run, written_only_inside

__all__ = ["device", "idle"]

pytestmark = [needs_compiler, needs_extension, needs_nvcc]


@pytest.mark.parametrize(("name", "in_place"), EACH_WAY)
def test_updates(device: Device, name: str, in_place: bool) -> None:
    assert_bits_of_cpu(device.update_out, update_case(name), in_place=in_place)


def test_every_kernel_was_launched(idle: Device) -> None:
    """The cases reach all kinds of update."""
    names = set()
    runs = [(run, name) for name in UPDATES] + [(run_bare, name) for name in (*UPDATES, *LONG)]
    for run_case, name in runs:
        run_case(idle.update_out, update_case(name))
        names |= {launch.name for launch in idle.gpu.launches}
    assert idle.gpu.module is not None
    updates = {name for name in idle.gpu.module.kernels if "update" in name}
    assert names == updates


@pytest.mark.parametrize(
    "arch",
    ["sm_80", *(pytest.param(arch, marks=pytest.mark.deep) for arch in ("sm_100", "sm_120"))],
)
def test_other_targets(device: Device, arch: str) -> None:
    """The output of nvcc for other GPUs gives the same bits."""
    before = device.gpu.module
    device.gpu.module = ptx.parse(ptx_of(arch))
    try:
        for name in list(UPDATES)[::7]:
            assert_bits_of_cpu(device.update_out, update_case(name))
    finally:
        device.gpu.module = before


def test_words_of_32_bytes(device: Device) -> None:
    """Newer GPUs move a chunk of 32 bytes by one instruction, if every tensor allows it."""
    before = device.gpu.module
    device.gpu.module = ptx.parse(ptx_of("sm_100"))
    try:
        for offset in range(9):
            case = make_case(
                torch.Generator().manual_seed(3),
                (2, 3, 8),
                dtype=torch.float64,
                noise="keyed",
                clip=0.8,
            )
            expected, x = case.x.clone(), case.x
            case.x, buffer = poisoned_at(x, offset)
            case.x.copy_(x)
            assert_bare_bits_of_cpu(device.update_out, case)
            executed = device.gpu.launches[0].stats.executed
            words = executed["ld.global.cs.v8.b32"]
            assert words == (2 * x.numel() // 4 if case.x.data_ptr() % 32 == 0 else 0)
            assert same_bits(case.x, expected)
            assert written_only_inside(case.x, buffer)
        assert_bare_bits_of_cpu(device.update_out, update_case(next(iter(LONG))))
        assert device.gpu.launches[0].stats.executed["ld.global.cs.v8.b32"] == 2 * 2**21 // 16
    finally:
        device.gpu.module = before


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments(device: Device, dtype: torch.dtype) -> None:
    """Views may begin at any element: no wide access goes to an address that is not aligned for it,
    and nothing outside of the view is touched.
    """
    case = make_case(torch.Generator().manual_seed(3), (2, 3, 8), dtype=dtype, noise="keyed")
    expected = assert_bits_of_cpu(device.update_out, case).out
    for offset in range(9):
        view, buffer = poisoned_at(case.x, offset)
        view.copy_(case.x)
        device.update_out(
            *(view, case.model_output, case.table, case.row),
            **{"noise": None, "keys": case.keys, "out": view, "x_0": None, "model_input": None},
        )
        assert same_bits(view, expected)
        assert written_only_inside(view, buffer)


def poisoned_at(like: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    buffer = torch.full((like.numel() + offset + 7,), 12345.0, dtype=like.dtype)
    return buffer[offset : offset + like.numel()].view(like.shape), buffer


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals(device: Device, dtype: torch.dtype) -> None:
    assert_normals(device.normal_out, dtype)


@pytest.mark.parametrize("count", [1, 31, 256, 700])
def test_advance(device: Device, count: int) -> None:
    """`advance` runs in one block."""
    assert_advance(device.advance, count)
    (launch,) = device.gpu.launches
    assert launch.grid == (1, 1, 1)


def test_one_launch_on_the_given_stream(idle: Device) -> None:
    """A step is one update and one advance on the given stream, and the launchers do
    nothing else.
    """
    for name, case in ((name, update_case(name)) for name in UPDATES):
        run_bare(idle.update_out, case)
        expected = 1 if case.x.numel() else 0
        assert len(idle.gpu.launches) == expected, name
        assert all(launch.stream == 0x51 for launch in idle.gpu.launches)
        assert all(launch.shared_bytes == 0 for launch in idle.gpu.launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_chunks_move_the_floor(device: Device, dtype: torch.dtype) -> None:
    """Long chunks move the floor, with two words of each tensor per thread."""
    case = make_case(
        torch.Generator().manual_seed(4), (2, 2**20), dtype=dtype, noise="keyed", model_input=dtype
    )
    run_bare(device.update_out, case)
    (launch,) = device.gpu.launches
    stats, size = launch.stats, case.x.nbytes
    assert (stats.bytes_read["x"], stats.bytes_read["model_output"]) == (size, size)
    assert sorted(stats.bytes_written.values()) == [size, size]
    loads = sum(n for name, n in stats.executed.items() if name.startswith("ld.global.cs.v4"))
    assert loads == size // 16 * 2


@pytest.mark.parametrize("noise", ["none", "keyed"])
@pytest.mark.parametrize(
    ("state", "model"),
    [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_bytes_moved_are_the_floor(
    device: Device, noise: str, state: torch.dtype, model: torch.dtype
) -> None:
    """Each input is read once and each output written once, by as few accesses as there can be."""
    case = make_case(
        torch.Generator().manual_seed(4),
        (2, 4, 1024),
        dtype=state,
        model_dtype=model,
        noise=noise,
        guided=True,
        model_input=model,
    )
    out, inputs = torch.empty_like(case.x), torch.empty((4, 4, 1024), dtype=model)
    device.update_out(
        *(case.x, case.model_output, case.table, case.row),
        **{"noise": None, "keys": case.keys, "out": out, "x_0": None, "model_input": inputs},
    )
    (launch,) = device.gpu.launches
    for name, tensor in (("x", case.x), ("model_output", case.model_output)):
        assert launch.stats.bytes_read[name] == tensor.nbytes
    for name, tensor in (("out", out), ("model_input", inputs)):
        assert launch.stats.bytes_written[name] == tensor.nbytes
    assert set(launch.stats.bytes_written) == {"out", "model_input"}
    elements = case.x.numel()
    chunk = max(4, 16 // case.x.element_size())
    threads = elements // chunk
    wide = min(16, chunk * case.model_output.element_size()) // 4
    loads = sum(n for name, n in launch.stats.executed.items() if name.startswith("ld.global.cs.v"))
    words = chunk * case.x.element_size() // 16 + 2 * max(
        1, chunk * case.model_output.element_size() // 16
    )
    assert loads == threads * words
    assert launch.stats.executed[f"ld.global.cs.v{wide}.u32"] > 0


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pixels_move_the_floor(device: Device, channels: int, dtype: torch.dtype) -> None:
    """Pixels move each element once, in the largest words that a quad of pixels has in either
    order.
    """
    case = make_case(
        torch.Generator().manual_seed(4),
        (2, channels, 16, 16),
        dtype=dtype,
        layout="channels_last",
        model_layout="contiguous",
        noise="keyed",
    )
    run_bare(device.update_out, case)
    (launch,) = device.gpu.launches
    assert "update_pixels" in launch.name
    stats, size = launch.stats, case.x.nbytes
    assert (stats.bytes_read["x"], stats.bytes_read["model_output"]) == (size, size)
    assert list(stats.bytes_written.values()) == [size]
    interleaved, plane = 4 * channels * case.x.itemsize, 4 * case.x.itemsize
    word = 8 if interleaved % 16 else 16
    expected = size // word + size // min(plane, 16)
    loads = sum(n for name, n in stats.executed.items() if name.startswith("ld.global.cs.v"))
    assert loads == expected


def test_an_update_beyond_the_end_is_caught(device: Device) -> None:
    """An update beyond the end is caught; a tensor registered one element short stands in for it,
    since the check is exact.
    """
    case = make_case(torch.Generator().manual_seed(5), (1, 1024))
    out, table = torch.empty_like(case.x), case.table
    for short, written in (("x", False), ("out", True)):
        device.gpu.reset()
        tensors = {
            "x": case.x,
            "model_output": case.model_output,
            "table": table,
            "row": case.row,
            "out": out,
        }
        for name, tensor in tensors.items():
            size = tensor.nbytes - (4 if name == short else 0)
            device.gpu.memory.add(tensor.data_ptr(), size, name, writable=name == "out")
        with pytest.raises(RuntimeError, match="CUDA error 700"):
            launcher.backend(NAMESPACE).update_out(
                *(case.x, case.model_output, table, case.row),
                **{"noise": None, "keys": None, "out": out, "x_0": None, "model_input": None},
            )
        assert device.gpu.error is not None
        assert ("store" if written else "load") in str(device.gpu.error)


def test_a_large_sample(device: Device) -> None:
    """A large sample takes several waves of blocks; a sample of several tiles lies next
    to another.
    """
    assert_bits_of_cpu(
        device.update_out,
        make_case(torch.Generator().manual_seed(6), (2, 3, 128, 129), noise="keyed"),
    )


@pytest.mark.parametrize("name", LONG)
def test_long_chunks(device: Device, name: str) -> None:
    assert_bare_bits_of_cpu(device.update_out, update_case(name), alone="bfloat16" in name)
    # A chunk has sixteen elements where they divide a sample and lie at whole words.
    (launch,) = device.gpu.launches
    divides = "(1, 2097152)" in name or "(3, 1048576)" in name
    assert ("ELi16E" in launch.name) == (divides and "offset" not in name)


BROKEN = {
    "an index off by one": (
        "(uint64_t)chunk.index * (SIZE * sizeof(T))",
        "(uint64_t)(chunk.index + (chunk.index > 0)) * (SIZE * sizeof(T))",
    ),
    "no mask for the tail": (
        "return rest < SIZE ? (int)rest : SIZE;",
        "return SIZE;",
    ),
    "no bounds check": ("chunk.sample < grid.batch && ", ""),
    "the channels of another pixel": (
        "values[p * CHANNELS + c] = plane[p];",
        "values[c * PIXELS<CHANNELS> + p] = plane[p];",
    ),
    "noise keyed pixel by pixel": (
        "philox(key, chunk.index * QUADS + quad, words, (uint32_t)(grid.count / 4));",
        "philox(key, chunk.index * QUADS + quad, words);",
    ),
    "coefficients swapped": ("at[3], at[4], at[5]", "at[4], at[3], at[5]"),
    "the noise of the next quad": (
        "philox(key, chunk.index * QUADS, words);",
        "philox(key, chunk.index * QUADS + 1, words);",
    ),
    "wide accesses whatever the alignment": (
        "chunk.wide = chunk.index < grid.wide;",
        "chunk.wide = chunk.index < grid.count / SIZE;",
    ),
    "an index where there is none": ("rows.row_stride != NO_INDEX", "true"),
    "the row of the first sample": (
        "low_word(rows.row + sample * rows.row_stride)",
        "low_word(rows.row)",
    ),
}


# One that the checks of memory see, and one that the comparison of bits does.
QUICK = ("no mask for the tail", "coefficients swapped")


@pytest.mark.parametrize(
    "fault",
    [
        *QUICK,
        *(pytest.param(fault, marks=pytest.mark.deep) for fault in BROKEN if fault not in QUICK),
    ],
)
def test_a_broken_kernel_is_caught(device: Device, tmp_path: Path, fault: str) -> None:
    """Each fault in the source is seen by the comparison of bits or by the checks of memory."""
    source = changed_cuda_source(tmp_path, *BROKEN[fault])
    before = device.gpu.module
    device.gpu.module = ptx.parse(ptx_of("sm_90", source))
    try:
        caught = not aligned_right(device) or any(
            not right_bits(device, update_case(name))
            for name in [
                *list(UPDATES)[:90],
                *(name for name in UPDATES if name.startswith("turned")),
            ]
        )
    finally:
        device.gpu.module = before
    assert caught


def right_bits(device: Device, case: Case) -> bool:
    try:
        assert_bits_of_cpu(device.update_out, case)
    except (AssertionError, ptx.PtxError):
        return False
    return True


def aligned_right(device: Device) -> bool:
    try:
        test_alignments(device, torch.float32)
    except (AssertionError, ptx.PtxError):
        return False
    return True


def test_the_same_digits(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, 50 updates with noise, and the counters give the same digits, all on the
    interpreter.
    """
    outputs, images = recorded_digits()
    answers = iter(outputs)
    monkeypatch.setattr(backends, "choose", lambda impl, where: device)
    again = fastddim.sample(
        lambda x, t: next(answers), 50, **DIGITS, schedule=fastddim.models.load("digits").schedule
    )
    assert isinstance(again, Tensor)
    assert same_bits(again, images)
    assert images.std() > 0.3
