"""The Triton kernels executed: what Triton compiles for NVIDIA GPUs, through the real launcher, on
the interpreter of PTX, bit for bit against the C++ kernel on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends, philox

from .test_native import needs_extension
from .test_update import DTYPES, LAYOUTS, make_case, poisoned_like, run, written_only_inside

pytest.importorskip("triton", reason="Triton is not installed")

from .gpuless import ptx, triton_jit
from .gpuless.cases import UPDATES, assert_bits_of_cpu, run_bare, same_bits, update_case
from .test_cuda_ptx import DIGITS, recorded_digits

pytestmark = needs_extension


@pytest.fixture
def interpreter() -> Iterator[triton_jit.Interpreter]:
    interpreter = triton_jit.Interpreter()
    with triton_jit.compiled_for(triton_jit.SM_90, interpreter):
        yield interpreter


@pytest.mark.parametrize("name", UPDATES)
def test_updates(interpreter: triton_jit.Interpreter, name: str) -> None:
    case = update_case(name)
    assert_bits_of_cpu(triton_jit.update.update_out, case)
    assert_bits_of_cpu(triton_jit.update.update_out, case, in_place=True)


@pytest.mark.parametrize("target", triton_jit.CUDA_TARGETS, ids=lambda target: f"sm_{target.arch}")
def test_other_targets(target: Any) -> None:
    with triton_jit.compiled_for(target, triton_jit.Interpreter()):
        for name in list(UPDATES)[::23]:
            assert_bits_of_cpu(triton_jit.update.update_out, update_case(name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals(interpreter: triton_jit.Interpreter, dtype: torch.dtype) -> None:
    for layout, shape in itertools.product(LAYOUTS[:-1], ((3, 5, 7, 3), (1, 1501))):
        generator = torch.Generator().manual_seed(1)
        case = make_case(generator, shape, dtype=dtype, layout=layout, noise="keyed")
        assert case.keys is not None
        out, buffer = poisoned_like(case.x)
        triton_jit.update.normal_out(case.keys, philox.LATENTS, out)
        assert torch.equal(out, philox.normal(case.keys, shape[1:], philox.LATENTS).to(dtype))
        assert written_only_inside(out, buffer)


@pytest.mark.parametrize("count", [1, 31, 256, 700])
def test_advance(interpreter: triton_jit.Interpreter, count: int) -> None:
    timesteps = torch.randint(0, 1000, (9,))
    counters = torch.randint(0, 8, (count + 3,))
    before, t = counters.clone(), torch.zeros(count, dtype=torch.int64)
    triton_jit.update.advance(counters, timesteps, t)
    assert torch.equal(counters, before + 1)
    assert torch.equal(t, timesteps[counters[:count]])
    assert len(interpreter.launches) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", ["none", "keyed"])
def test_bytes_moved_are_the_floor(
    interpreter: triton_jit.Interpreter, dtype: torch.dtype, noise: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    case = make_case(generator, (2, 4, 1024), dtype=dtype, noise=noise)
    run_bare(triton_jit.update.update_out, case)
    (launch,) = interpreter.launches
    assert launch.bytes_read["x"] == launch.bytes_read["model_output"] == case.x.nbytes
    assert dict(launch.bytes_written) == {"out": case.x.nbytes}


def test_the_same_digits(
    interpreter: triton_jit.Interpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of the CPU, from its recorded model outputs: latents, updates and counters."""
    outputs, images = recorded_digits()
    answers = iter(outputs)
    monkeypatch.setattr(backends, "choose", lambda impl, where: triton_jit.update)
    again = fastddim.sample(
        lambda x, t: next(answers), 50, **DIGITS, schedule=fastddim.models.load("digits").schedule
    )
    assert isinstance(again, Tensor)
    assert same_bits(again, images)


def replaced(right: str, wrong: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert right in text
        return text.replace(right, wrong, 1)

    return edit


BROKEN = {
    "an index off by one": replaced("add.s64", "sub.s64"),
    "no mask for the tail": lambda text: text.replace("setp.lt.s64", "setp.ne.s64"),
    "a comparison turned": replaced("setp.lt.f32", "setp.gt.f32"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_caught(fault: str) -> None:
    broken = triton_jit.Interpreter(edit=BROKEN[fault])
    generator = torch.Generator().manual_seed(5)
    case = make_case(generator, (3, 1021), noise="keyed", clip=0.5, per_sample=True)
    expected = run(backends.BACKENDS["cpu"].update_out, case)
    with triton_jit.compiled_for(triton_jit.SM_90, broken):
        try:
            got = run(triton_jit.update.update_out, case)
        except (ptx.PtxError, AssertionError):
            return
    assert not all(map(same_bits, got.tensors(), expected.tensors()))
