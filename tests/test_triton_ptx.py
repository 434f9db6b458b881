"""The Triton kernels executed: their code for NVIDIA GPUs, through the real launcher, on the
interpreter of PTX, bit for bit against the C++ kernel on the CPU.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends, philox
from fastddim.plan import Row

from .support.environment import needs_extension
from .support.special_values import FACTS
from .support.updates import (
    DTYPES,
    LAYOUTS,
    Case,
    make_case,
    poisoned_like,
    run,
    written_only_inside,
)

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from fastddim.kernels import noise
from gpucheck import triton_jit

from .support.gpuless import ptx
from .support.gpuless.cases import (
    DIGITS,
    UPDATES,
    assert_bits_of_cpu,
    recorded_digits,
    run_bare,
    same_bits,
    update_case,
)
from .support.gpuless.triton_on_ptx import Interpreter, changed_kernels, interpreter

__all__ = ["interpreter"]

pytestmark = needs_extension
OTHER_TARGETS = [target for target in triton_jit.CUDA_TARGETS if target != triton_jit.SM_90]


# Triton compiles a kernel for each kind of update, which takes longer than to run it.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if i % 5 == 0 else pytest.mark.deep)
        for i, name in enumerate(UPDATES)
    ],
)
def test_updates(interpreter: Interpreter, name: str) -> None:
    in_place = list(UPDATES).index(name) % 2 == 1
    assert_bits_of_cpu(triton_jit.LAUNCHERS.update_out, update_case(name), in_place=in_place)
    assert all(launch.bytes_written for launch in interpreter.launches)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[] if target.arch == 100 else pytest.mark.deep)
        for target in OTHER_TARGETS
    ],
    ids=lambda target: f"sm_{target.arch}",
)
def test_other_targets(target: Any) -> None:
    """The input of ptxas for other GPUs gives the same bits, with operations on pairs from sm_100
    on.
    """
    interpreter = Interpreter()
    with triton_jit.compiled_for(target, interpreter):
        for name in list(UPDATES)[::23]:
            assert_bits_of_cpu(triton_jit.LAUNCHERS.update_out, update_case(name))
        for dtype in DTYPES:
            assert_bits_of_cpu(triton_jit.LAUNCHERS.update_out, aligned_case(dtype))
    pairs = sum(n for launch in interpreter.launches for n in paired(launch.executed))
    assert (pairs > 0) == (target.arch >= 100)


def paired(executed: Counter[str]) -> list[int]:
    return [n for opcode, n in executed.items() if opcode.endswith("f32x2")]


def aligned_case(dtype: torch.dtype, **arguments: Any) -> Case:
    """A case with several tiles a sample, the last of them not full, with a multiple of 16 bytes
    everywhere.
    """
    kind = {"noise": "keyed", "guided": True, "model_input": dtype, **arguments}
    return make_case(torch.Generator().manual_seed(7), (2, 3, 720), dtype=dtype, **kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["none", "given", "keyed"])
def test_vectors(interpreter: Interpreter, dtype: torch.dtype, noise: str) -> None:
    """Every tensor is moved 16 bytes at a time if all are aligned."""
    case = aligned_case(dtype, noise=noise, clip=0.5, per_sample=True)
    for got, expected in zip(
        run_bare(triton_jit.LAUNCHERS.update_out, case),
        run_bare(backends.BACKENDS["cpu"].update_out, case),
        strict=True,
    ):
        assert same_bits(got, expected)
    (launch,) = interpreter.launches
    accesses = {"ld": 3 + (noise == "given"), "st": 3}
    for kind, tensors in accesses.items():
        wide = sum(
            n
            for opcode, n in launch.executed.items()
            if opcode.startswith(f"{kind}.global") and (".v4.b32" in opcode or ".v2.b64" in opcode)
        )
        assert wide == tensors * case.x.nbytes // 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments(interpreter: Interpreter, dtype: torch.dtype) -> None:
    """Views may begin at any element, and nothing outside of them is touched."""
    case = aligned_case(dtype, model_input=None)
    expected = run(backends.BACKENDS["cpu"].update_out, case).out
    for offset in range(16 // dtype.itemsize + 1):
        buffer = torch.full((case.x.numel() + 32,), 12345.0).to(dtype)
        view = buffer[offset : offset + case.x.numel()].view(case.x.shape)
        view.copy_(case.x)
        triton_jit.LAUNCHERS.update_out(
            *(view, case.model_output, case.table, case.row),
            **{"noise": None, "keys": case.keys, "out": view, "x_0": None, "model_input": None},
        )
        assert same_bits(view, expected)
        assert written_only_inside(view, buffer)


@pytest.mark.parametrize("hold", FACTS, ids=lambda fact: fact.__name__)
def test_special_values(interpreter: Interpreter, hold: Callable[..., None]) -> None:
    hold(triton_jit.LAUNCHERS, torch.Generator().manual_seed(20))


def test_no_noise_is_read_in_vain(interpreter: Interpreter) -> None:
    case = aligned_case(torch.float32, noise="given")
    case.rows[:, Row._fields.index("pn")] = 0
    run_bare(triton_jit.LAUNCHERS.update_out, case)
    (launch,) = interpreter.launches
    assert "noise" not in launch.bytes_read


def test_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many samples: more than the second axis of a grid may have programs, which is limited to few
    here.
    """
    monkeypatch.setattr(triton_jit.launch, "_MOST_PROGRAMS", 1)
    interpreter, grids = Interpreter(), set()

    def execute(binary: triton_jit.Binary) -> None:
        grids.add(binary.grid)
        interpreter(binary)

    with triton_jit.compiled_for(triton_jit.SM_90, execute):
        assert_bits_of_cpu(triton_jit.LAUNCHERS.update_out, aligned_case(torch.bfloat16))
    assert grids == {(2, 3), (2, 5)}


@triton.jit
def some_normals(out, keys, first, TILE: tl.constexpr, VECTOR: tl.constexpr):
    z = noise.normals(keys, 1, tl.cast(first, tl.int64), 1, TILE, VECTOR, True)
    tl.store(out + tl.arange(0, TILE), z)


@pytest.mark.parametrize("vector", [2, 4, 8])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63, 2**64 - 1])
def test_the_last_quads(vector: int, seed: int) -> None:
    """The last quads are right: every bit of the key and of the counter counts, with seeds from 2⁶³
    on and the last quad 2³² − 1.
    """
    largest = 2**32 - 1
    keys = philox.make_keys([0, seed], 2)._replace(
        step=torch.tensor([0, largest]), sample=torch.tensor([0, largest - 1])
    )
    first, out = 2**34 - 1024, torch.empty(1024)
    compiler = triton_jit.Compiler(some_normals, triton_jit.SM_90, Interpreter())
    compiler[(1,)](out, keys, first, TILE=1024, VECTOR=vector, num_warps=4, enable_fp_fusion=False)
    quads = torch.arange(first // 4, 2**32)
    counter = [quads, *(torch.full_like(quads, n) for n in (largest, largest - 1, 1))]
    key = [torch.full_like(quads, word) for word in (seed & largest, seed >> 32)]
    u = [philox.uniform(word) for word in philox.philox4x32(counter, key)]
    expected = torch.stack([*philox.box_muller(*u[:2]), *philox.box_muller(*u[2:])], dim=1)
    assert torch.equal(out, expected.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals(interpreter: Interpreter, dtype: torch.dtype) -> None:
    for layout, shape in itertools.product(LAYOUTS[:-1], ((3, 5, 7, 3), (1, 1501))):
        generator = torch.Generator().manual_seed(1)
        case = make_case(generator, shape, dtype=dtype, layout=layout, noise="keyed")
        assert case.keys is not None
        out, buffer = poisoned_like(case.x)
        triton_jit.LAUNCHERS.normal_out(case.keys, philox.LATENTS, out)
        assert torch.equal(out, philox.normal(case.keys, shape[1:], philox.LATENTS).to(dtype))
        assert written_only_inside(out, buffer)


@pytest.mark.parametrize("count", [1, 31, 256, 700])
def test_advance(interpreter: Interpreter, count: int) -> None:
    timesteps = torch.randint(0, 1000, (9,))
    counters = torch.randint(0, 8, (count + 3,))
    before, t = counters.clone(), torch.zeros(count, dtype=torch.int64)
    triton_jit.LAUNCHERS.advance(counters, timesteps, t)
    assert torch.equal(counters, before + 1)
    assert torch.equal(t, timesteps[counters[:count]])
    assert len(interpreter.launches) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", ["none", "keyed"])
def test_bytes_moved_are_the_floor(
    interpreter: Interpreter, dtype: torch.dtype, noise: str
) -> None:
    """Each input is read once, each output written once; coefficients are not part of it."""
    case = aligned_case(dtype, noise=noise)
    _, model_input = run_bare(triton_jit.LAUNCHERS.update_out, case)
    (launch,) = interpreter.launches
    assert launch.bytes_read["x"] == case.x.nbytes
    assert launch.bytes_read["model_output"] == case.model_output.nbytes
    written = {"out": case.x.nbytes, "model_input": model_input.nbytes}
    assert dict(launch.bytes_written) == written


def test_the_same_digits(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, updates and counters give the images of the CPU, from its recorded model outputs."""
    outputs, images = recorded_digits()
    answers = iter(outputs)
    monkeypatch.setattr(backends, "choose", lambda impl, where: triton_jit.LAUNCHERS)
    again = fastddim.sample(
        lambda x, t: next(answers), 50, **DIGITS, schedule=fastddim.models.load("digits").schedule
    )
    assert isinstance(again, Tensor)
    assert same_bits(again, images)


BROKEN = {
    "an index off by one": ("views", "element = first + lane", "element = first + lane + 1"),
    "no mask for the tail": ("views", "element < count)", "element >= 0)"),
    "coefficients swapped": ("update", "tl.load(fields + 3),", "tl.load(fields + 4),"),
    "the row of the first sample": ("update", "        row += sample\n", "        row += 0\n"),
    "the noise of the next quad": (
        "noise",
        "r_2, r_3 = words(keys, position, quad",
        "r_2, r_3 = words(keys, position, quad + 1",
    ),
    "the noise of the next vector": ("noise", "first_quad + lane", "first_quad + lane + 1"),
    "strides of the wrong dimension": ("views", "rest * view.strides[0]", "rest * view.strides[1]"),
    "a product rounded": ("update", "tl.fma(row.cx, x, row.cm * m)", "row.cx * x + row.cm * m"),
    "noise where there is none": (
        "update",
        "tl.where(row.pn != 0, tl.fma(row.pn, z.to(compute), x_prev), x_prev)",
        "tl.fma(row.pn, z.to(compute), x_prev)",
    ),
    "an outer sign of zero lost": ("update", "(x_0, limit * -1.0,", "(x_0, 0.0 - limit,"),
    "one half of the model input": (
        "update",
        "write(further(tensors.model_input, second_input), state, span, WIDE)",
        "write(tensors.model_input, state, span, WIDE)",
    ),
}


def revealing_cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(5)
    yield aligned_case(torch.float32, per_sample=True)
    yield make_case(generator, (3, 1021), noise="keyed", per_sample=True)
    yield make_case(generator, (2, 3, 4, 6), layout="sliced")
    silent = make_case(generator, (2, 50), noise="given")
    silent.rows[:, Row._fields.index("pn")] = 0
    yield replace(silent, noise=torch.full_like(silent.x, float("nan")))
    ones = torch.ones_like(silent.rows)
    ones[:, Row._fields.index("pn")] = 0
    zeros = torch.full_like(silent.x, -0.0)
    yield replace(silent, x=zeros, model_output=zeros, rows=ones)
    clipped = make_case(generator, (2, 50))
    clipped.rows[:, Row._fields.index("r")] = 0
    yield clipped


def is_right(update_out: Callable[..., None], case: Case) -> bool:
    try:
        assert_bits_of_cpu(update_out, case)
    except (AssertionError, ptx.PtxError):
        return False
    return True


def test_the_kernels_are_right_where_faults_show(interpreter: Interpreter) -> None:
    assert all(is_right(triton_jit.LAUNCHERS.update_out, case) for case in revealing_cases())


# One that the checks of memory see, and one that the comparison of bits does.
QUICK = ("no mask for the tail", "coefficients swapped")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[] if fault in QUICK else pytest.mark.deep) for fault in BROKEN],
)
def test_a_broken_kernel_is_caught(fault: str, tmp_path: Path) -> None:
    """Each fault in the source is seen by the comparison of bits or by the checks of memory."""
    broken = changed_kernels(tmp_path, *BROKEN[fault])
    with triton_jit.compiled_for(triton_jit.SM_90, Interpreter(), broken):
        assert not all(
            is_right(triton_jit.backend(broken).update_out, case) for case in revealing_cases()
        )


CHECKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"x": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "x: expected a dtype of"),
    "dimension": ({"x": torch.zeros(())}, ValueError, "x: expected at least one dimension"),
    "shape": ({"noise": torch.zeros(2, 5)}, ValueError, "noise: expected shape (2, 4), got (2, 5)"),
    "model": (
        {"model_output": torch.zeros(3, 4)},
        ValueError,
        "model_output: expected shape (2, 4) or (4, 4) or (2, 8) or (4, 8), got (3, 4)",
    ),
    "input": (
        {"model_input": torch.zeros(2, 8)},
        ValueError,
        "model_input: expected shape (2, 4) or (4, 4), got (2, 8)",
    ),
    "device": (
        {"out": torch.zeros(2, 4, device="meta")},
        ValueError,
        "out: expected device cpu, got meta",
    ),
    "out": ({"out": torch.zeros(2, 4).half()}, TypeError, "out: expected the dtype of x"),
    "mask": ({"mask": torch.zeros(2, 4)}, ValueError, "mask, known: expected both or neither"),
    "table": (
        {"table": torch.zeros(3, 12).double()},
        TypeError,
        "table: expected dtype",
    ),
    "columns": (
        {"table": torch.zeros(3, 8)},
        ValueError,
        "table: expected a contiguous tensor [R, 12], got shape (3, 8) with strides (8, 1)",
    ),
    "row": (
        {"row": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "row: expected [1] or [B] = [2], got [3]",
    ),
    "no row": (
        {"table": torch.zeros(0, 12), "row": None},
        ValueError,
        "table: expected at least one row, got none",
    ),
    "row's dtype": (
        {"row": torch.zeros(1, dtype=torch.int32)},
        TypeError,
        "row: expected dtype torch.int64, got torch.int32",
    ),
    "keys": ({"keys": philox.make_keys(1, 3)}, ValueError, "seed: expected [B] = [2], got [3]"),
    "two noises": (
        {"keys": philox.make_keys(1, 2), "noise": torch.zeros(2, 4)},
        ValueError,
        "noise, keys: expected at most one of them",
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_tensor_that_does_not_fit(name: str, interpreter: Interpreter) -> None:
    changed, error, message = CHECKS[name]
    arguments = {
        **{name: torch.zeros(2, 4) for name in ("x", "model_output", "out")},
        **{"table": torch.zeros(3, 12), "row": torch.zeros(1, dtype=torch.int64)},
        **dict.fromkeys(("noise", "keys", "x_0", "model_input")),
    }
    with pytest.raises(error, match=re.escape(message)):
        triton_jit.LAUNCHERS.update_out(**{**arguments, **changed})
    assert not interpreter.launches
