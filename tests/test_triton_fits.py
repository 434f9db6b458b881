"""Rows from the data, and gradients, by the Triton kernels, executed: what Triton compiles for
NVIDIA GPUs on the interpreter of PTX, bit for bit against the C++ kernels on the CPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.plan import Rescaling, Row

from .support.environment import needs_extension
from .support.updates import Case, make_case

pytest.importorskip("triton", reason="Triton is not installed")

from gpucheck import triton_jit

from .support.gpuless import ptx
from .support.gpuless.cases import same_bits
from .support.gpuless.fits import (
    BACKWARD_CASES,
    FIT_CASES,
    assert_backward_of_cpu,
    assert_fit_of_cpu,
    backward_case,
    fit_case,
)
from .support.gpuless.triton_on_ptx import Interpreter, changed_kernels, interpreter

__all__ = ["interpreter"]

pytestmark = needs_extension
LAUNCHERS = triton_jit.LAUNCHERS
OTHER_TARGETS = [target for target in triton_jit.CUDA_TARGETS if target != triton_jit.SM_90]


def some(names: Any, every: int) -> list[Any]:
    """Some of the kinds of kernels, since Triton takes longer to compile one than to run it."""
    return [
        pytest.param(name, marks=[] if i % every == 0 else pytest.mark.deep)
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", some(FIT_CASES, 25))
def test_rows(interpreter: Interpreter, name: str) -> None:
    case, rescaling = fit_case(name)
    assert_fit_of_cpu(LAUNCHERS.rescale_rows, case, rescaling)
    assert len(interpreter.launches) == (len(case.x) > 0)


@pytest.mark.parametrize("name", some(BACKWARD_CASES, 14))
def test_gradients(interpreter: Interpreter, name: str) -> None:
    case, *grads = backward_case(name)
    assert_backward_of_cpu(LAUNCHERS.backward_out, case, *grads)
    # Into views and into tensors.
    assert len(interpreter.launches) == 2 * (case.x.numel() > 0)


def test_the_first_row_without_indices(interpreter: Interpreter) -> None:
    case, rescaling = fit_case("1023-threshold")
    case.rows[0] = case.rows[2]
    given = (case.x, case.model_output, case.table)
    rows = [torch.empty(len(case.x), len(Row._fields)) for _ in range(2)]
    for row, out in zip((None, torch.zeros(1, dtype=torch.int64)), rows, strict=True):
        LAUNCHERS.rescale_rows(*given, row, rescaling, out)
    assert same_bits(*rows)
    assert not rows[0].isnan().any()


def many_of_one_value() -> tuple[Case, Rescaling]:
    """Many elements of one value: more than 2¹⁶ in a sample, the last of them in a second chunk."""
    case = make_case(torch.Generator().manual_seed(6), (1, 2**16 + 1001))
    case.x.fill_(2.5)
    case.x[0, 70:90] = torch.arange(20.0)
    case.model_output.zero_()
    return case, Rescaling(0.0, 0.9999, math.inf)


def test_more_elements_than_a_field_counts(interpreter: Interpreter) -> None:
    assert_fit_of_cpu(LAUNCHERS.rescale_rows, *many_of_one_value())


@pytest.mark.deep
@pytest.mark.parametrize("target", OTHER_TARGETS, ids=lambda target: f"sm_{target.arch}")
def test_other_targets(target: Any) -> None:
    with triton_jit.compiled_for(target, Interpreter()):
        for name in list(FIT_CASES)[::7]:
            assert_fit_of_cpu(LAUNCHERS.rescale_rows, *fit_case(name))
        for name in list(BACKWARD_CASES)[::7]:
            assert_backward_of_cpu(LAUNCHERS.backward_out, *backward_case(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_backward_pass_are_the_floor(
    interpreter: Interpreter, dtype: torch.dtype
) -> None:
    """Each input is read once and each output written once, 16 bytes at a time."""
    generator = torch.Generator().manual_seed(7)
    case = make_case(generator, (2, 3, 720), dtype=dtype, guided=True, mask=True)
    grads = (torch.randn(case.x.shape, generator=generator).to(dtype), case.x.flip(0).clone())
    given = (*grads, case.x, case.model_output, case.table, case.row, case.mask)
    LAUNCHERS.backward_out(*given, torch.empty_like(case.x), torch.empty_like(case.model_output))
    (launch,) = interpreter.launches
    each = case.x.nbytes
    read = {name: launch.bytes_read[name] for name in ("grad_x_prev", "grad_x_0", "x", "mask")}
    assert set(read.values()) == {each}
    assert launch.bytes_read["model_output"] == 2 * each
    assert dict(launch.bytes_written) == {"grad_x": each, "grad_model_output": 2 * each}
    for kind, tensors in (("ld", 6), ("st", 3)):
        wide = (n for opcode, n in launch.executed.items() if is_wide(opcode, kind))
        assert sum(wide) == tensors * each // 16


def is_wide(opcode: str, kind: str) -> bool:
    return opcode.startswith(f"{kind}.global") and ".v4.b32" in opcode


BROKEN = {
    "a sum in another order": (
        "rescaling",
        "first + i * _SUMS, _SUMS)",
        "first + (3 - i) * _SUMS, _SUMS)",
    ),
    "halves of neighbours": (
        "rescaling",
        "tl.reshape(sums, [2, _SUMS >> (halving + 1), 2, 2]), axis=0)",
        "tl.reshape(sums, [_SUMS >> (halving + 1), 2, 2, 2]), axis=1)",
    ),
    "no shift": ("rescaling", "(inside, values - shift, 0.0)", "(inside, values, 0.0)"),
    "elements beyond the last": ("rescaling", "element < samples.end)", "element >= 0)"),
    "a count that overflows": ("rescaling", "tl.constexpr(63 * 1024)", "tl.constexpr(80 * 1024)"),
    "the digit before": ("rescaling", "(counts, 0) <= rank", "(counts, 0) < rank"),
    "the same statistic twice": ("rescaling", "rank + 1 >= equal", "rank > equal"),
    "infinite taken for NaN": ("rescaling", "largest > infinite", "largest >= infinite"),
    "a factor forgotten": ("rescaling", "        em *= factor\n", ""),
    "at the limit": ("backward", "(x_0 <= row.r)", "(x_0 < row.r)"),
    "what is known added": ("backward", "of_x_prev -= read(", "of_x_prev += read("),
    "a fused sum": (
        "backward",
        "row.cx * of_x_0 + row.kx * of_x_prev",
        "tl.fma(row.cx, of_x_0, row.kx * of_x_prev)",
    ),
    "halves exchanged": ("backward", "of_m - of_conditional, span", "of_conditional, span"),
    "one row for all": ("backward", "row, sample, PER_SAMPLE)", "row, sample, False)"),
}


def revealing_rows() -> Iterator[tuple[Case, Rescaling]]:
    for name in ("1023-threshold", "nan-torch.float32", "infinite-torch.float64"):
        yield fit_case(name)
    # In float64, whose rows show in what order a sum was taken.
    generator = torch.Generator().manual_seed(9)
    case = make_case(generator, (8, 2049), dtype=torch.float64, guided=True)
    case.model_output.add_(10)
    yield case, Rescaling(1.0, 0.0, math.inf)
    yield many_of_one_value()


def revealing_gradients() -> Iterator[tuple[Case, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    kind = {"prediction": "v_prediction", "guided": True, "mask": True, "per_sample": True}
    for case in (
        make_case(generator, (3, 50), clip=0.8, **kind),
        make_case(generator, (2, 50)),
    ):
        yield case, *(torch.randn(case.x.shape, generator=generator) for _ in range(2))
    # x_0 at the limit, where the clip changes nothing.
    case.rows[:, Row._fields.index("r")] = 0
    zeros = torch.zeros_like(case.x)
    yield replace(case, x=zeros, model_output=zeros), zeros + 1, zeros + 1


def is_right(launchers: Any, module: str) -> bool:
    try:
        if module == "rescaling":
            for case in revealing_rows():
                assert_fit_of_cpu(launchers.rescale_rows, *case)
        else:
            for gradients in revealing_gradients():
                assert_backward_of_cpu(launchers.backward_out, *gradients)
    except (AssertionError, ptx.PtxError):
        return False
    return True


@pytest.mark.parametrize("module", [pytest.param("rescaling", marks=pytest.mark.deep), "backward"])
def test_the_kernels_are_right_where_faults_show(interpreter: Interpreter, module: str) -> None:
    assert is_right(LAUNCHERS, module)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[] if fault == "halves exchanged" else pytest.mark.deep)
        for fault in BROKEN
    ],
)
def test_a_broken_kernel_is_caught(fault: str, tmp_path: Path) -> None:
    broken = changed_kernels(tmp_path, *BROKEN[fault])
    with triton_jit.compiled_for(triton_jit.SM_90, Interpreter(), broken):
        assert not is_right(triton_jit.backend(broken), BROKEN[fault][0])


ZEROS, TABLE = torch.zeros(2, 4), torch.zeros(3, len(Row._fields))
FIT: dict[str, Any] = {
    **{"x": ZEROS, "model_output": torch.zeros(4, 4), "table": TABLE},
    **{"row": torch.zeros(1, dtype=torch.int64), "rescaling": Rescaling(0.5, 0.9, 2.0)},
    "out": TABLE[:2].clone(),
}
FIT_CHECKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x": ({"x": ZEROS.int()}, TypeError, "x: expected a dtype of"),
    "model output": ({"model_output": torch.zeros(3, 4)}, ValueError, "model_output: expected"),
    "table": ({"table": TABLE.double()}, TypeError, "table: expected dtype torch.float32, got"),
    "row": ({"row": torch.zeros(3, dtype=torch.int64)}, ValueError, "row: expected [1] or [B]"),
    "guidance": (
        {"model_output": ZEROS},
        ValueError,
        "rescale: expected 0 where the model output is not guided",
    ),
    "dtype": (
        {"out": TABLE[:2].double()},
        TypeError,
        "out: expected the dtype of table, torch.float32, got torch.float64",
    ),
    "shape": ({"out": TABLE.clone()}, ValueError, "out: expected a contiguous tensor [B, 12] = [2"),
    "strides": (
        {"out": torch.zeros(2, 24)[:, ::2]},
        ValueError,
        "out: expected a contiguous tensor [B, 12] = [2, 12], got shape (2, 12) with strides (24, ",
    ),
    "device": ({"out": TABLE[:2].to("meta")}, ValueError, "out: expected device cpu, got meta"),
}


@pytest.mark.parametrize("name", FIT_CHECKS)
def test_tensors_of_rows_that_do_not_fit(interpreter: Interpreter, name: str) -> None:
    changed, error, message = FIT_CHECKS[name]
    with pytest.raises(error, match=re.escape(message)):
        LAUNCHERS.rescale_rows(*{**FIT, **changed}.values())
    assert not interpreter.launches


GRADS: dict[str, Any] = {
    **{"grad_x_prev": ZEROS, "grad_x_0": None, "x": ZEROS, "model_output": torch.zeros(4, 8)},
    **{"table": TABLE, "row": torch.zeros(2, dtype=torch.int64), "mask": None},
    **{"grad_x": torch.zeros(2, 4), "grad_model_output": torch.zeros(4, 8)},
}
GRAD_CHECKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "grad_x_prev": (
        {"grad_x_prev": torch.zeros(2, 5)},
        ValueError,
        "grad_x_prev: expected shape (2, 4), got (2, 5)",
    ),
    "mask": ({"mask": ZEROS.int()}, TypeError, "mask: expected a dtype of"),
    "grad_x": ({"grad_x": ZEROS.to("meta")}, ValueError, "grad_x: expected device cpu, got meta"),
    "one half": (
        {"grad_model_output": torch.zeros(2, 8)},
        ValueError,
        "grad_model_output: expected the batch of model_output, 4, got 2",
    ),
    "model output": (
        {"grad_model_output": torch.zeros(4, 5)},
        ValueError,
        "grad_model_output: expected shape (2, 4) or (4, 4) or (2, 8) or (4, 8), got (4, 5)",
    ),
    "row": ({"row": TABLE}, TypeError, "row: expected dtype torch.int64, got torch.float32"),
}


@pytest.mark.parametrize("name", GRAD_CHECKS)
def test_tensors_of_gradients_that_do_not_fit(interpreter: Interpreter, name: str) -> None:
    changed, error, message = GRAD_CHECKS[name]
    with pytest.raises(error, match=re.escape(message)):
        LAUNCHERS.backward_out(*{**GRADS, **changed}.values())
    assert not interpreter.launches
