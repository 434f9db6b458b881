"""The Triton backend as PyTorch sees it: its users, operators, gradients,
`torch.compile`.

The kernels run on CPU tensors, as in tests/test_triton_ptx.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastddim import backends, ops, philox

from .support.environment import needs_extension
from .support.gpuless.cases import assert_bits_of_cpu, same_bits
from .support.updates import Case, make_case

pytest.importorskip("triton", reason="Triton is not installed")

from gpucheck import triton_jit

from .support.gpuless.fits import assert_fit_of_cpu, fit_case
from .support.gpuless.triton_on_ptx import Interpreter

TRITON = backends.BACKENDS["triton"]


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The names of the kernels that are launched and executed."""
    interpreter, names = Interpreter(), []

    def execute(binary: triton_jit.Binary) -> None:
        names.append(binary.name)
        interpreter(binary)

    with triton_jit.compiled_for(triton_jit.SM_90, execute):
        yield names


@pytest.fixture
def _on_ptx(launched: list[str]) -> None:
    """Launches are executed."""


def a_case(**arguments: Any) -> Case:
    kind = {"noise": "given", "history": True, "mask": True, "guided": True, **arguments}
    return make_case(torch.Generator().manual_seed(3), (2, 3, 16), **kind)


def test_only_gpus() -> None:
    assert TRITON.unavailable(torch.device("cpu")) == "it runs on GPUs only"
    assert TRITON.unavailable(torch.device("cuda")) is None
    with pytest.raises(ValueError, match="impl: 'triton' cannot be used on cpu: it runs on GPUs"):
        backends.choose("triton", torch.device("cpu"))


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
import torch
from fastddim import backends

print(backends.BACKENDS["triton"].unavailable(torch.device("cuda")))
"""


def test_without_triton(run_python: Any, tmp_path: Path) -> None:
    result = run_python("-c", WITHOUT_TRITON, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Triton cannot be imported (")


def test_it_comes_before_the_cpu_kernel_and_after_the_cuda_kernel() -> None:
    assert list(backends.BACKENDS) == ["cuda", "triton", "cpu", "reference"]


@needs_extension
@pytest.mark.usefixtures("_on_ptx")
def test_the_operators_launch_the_kernels() -> None:
    case = a_case(noise="keyed", model_input=torch.bfloat16)
    assert_bits_of_cpu(TRITON.update_out, case)
    assert case.keys is not None
    drawn = torch.empty_like(case.x)
    TRITON.normal_out(case.keys, philox.LATENTS, drawn)
    assert torch.equal(drawn, philox.normal(case.keys, case.x.shape[1:], philox.LATENTS))
    counters, t = torch.tensor([1, 2, 7]), torch.zeros(2, dtype=torch.int64)
    TRITON.advance(counters, torch.tensor([9, 5, 3, 1]), t)
    assert (counters.tolist(), t.tolist()) == ([2, 3, 8], [3, 1])


@pytest.mark.usefixtures("_on_ptx")
def test_keys_come_together() -> None:
    case = a_case(noise="keyed")
    assert case.keys is not None
    inputs = (case.x, case.model_output, case.table, case.row, None, case.keys.seed)
    with pytest.raises(ValueError, match="step, sample: expected both with seed"):
        torch.ops.fastddim.triton_update(*inputs, *(None,) * 5)


@pytest.mark.usefixtures("_on_ptx")
def test_writing_into_a_tensor_has_no_gradient() -> None:
    case = a_case()
    x = case.x.requires_grad_()
    with pytest.raises(RuntimeError, match="out: writing into a given tensor is not differentia"):
        TRITON.update_out(
            *(x, case.model_output, case.table, case.row),
            **{"noise": None, "keys": None, "out": case.x, "x_0": None, "model_input": None},
        )


@needs_extension
def test_rows_from_data(launched: list[str]) -> None:
    case, rescaling = fit_case("2049-both")
    assert_fit_of_cpu(TRITON.rescale_rows, case, rescaling)
    assert launched == ["rescaling_kernel"]


@needs_extension
def test_values_and_gradients(launched: list[str]) -> None:
    """Values and gradients are those of the operator that the C++ kernel implements."""
    case = a_case()
    names = ("x", "model_output", "noise", "history", "known")
    results = []
    for update in (TRITON.update, ops.update):
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in names}
        given = {name: leaves[name] for name in ("noise", "history", "known")}
        outputs = update(
            *(leaves["x"], leaves["model_output"], case.table, case.row),
            **{"keys": None, "mask": case.mask, **given},
        )
        (outputs[0].square().sum() + outputs[1].sum()).backward()
        results.append((outputs, [leaf.grad for leaf in leaves.values()]))
    assert launched == ["update_kernel", "backward_kernel"]
    (got, got_grads), (expected, expected_grads) = results
    assert all(map(same_bits, got, expected))
    for a, b in zip(got_grads, expected_grads, strict=True):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_on_ptx")
def test_the_operators_are_registered_as_they_should_be() -> None:
    case = a_case()
    inputs = (case.x.requires_grad_(), case.model_output, case.table, case.row, case.noise)
    rest = (None, None, None, case.history, case.mask, case.known)
    torch.library.opcheck(torch.ops.fastddim.triton_update.default, (*inputs, *rest))
    out = torch.empty_like(case.x)
    plain = (case.x.detach(), *inputs[1:], *rest, out, None, None, torch.empty_like(out))
    torch.library.opcheck(torch.ops.fastddim.triton_update_out.default, plain)
    counters = torch.tensor([1, 2, 7])
    advanced = (counters, torch.tensor([9, 5, 3, 1]), torch.zeros(2, dtype=torch.int64))
    torch.library.opcheck(torch.ops.fastddim.triton_advance.default, advanced)
    state = (case.x.detach(), *inputs[1:4])
    rows, grads = torch.empty(len(case.x), 12), (torch.empty_like(v) for v in state[:2])
    given = (torch.ones_like(state[0]), None, *state, case.mask)
    # They have no gradients of their own, and compiled graphs take them as they take the others.
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    ops_of_triton = torch.ops.fastddim
    torch.library.opcheck(
        ops_of_triton.triton_fit_rows.default, (*state, 0.5, 0.9, 2.0, rows), **checks
    )
    torch.library.opcheck(ops_of_triton.triton_backward_out.default, (*given, *grads), **checks)
    torch.library.opcheck(ops_of_triton.triton_backward.default, given, **checks)


@needs_extension
@pytest.mark.usefixtures("_on_ptx")
def test_torch_compile_without_a_graph_break() -> None:
    """`torch.compile` makes no graph break, forwards and backwards."""
    case = a_case()

    def step(x: Tensor, m: Tensor) -> Tensor:
        return 2 * TRITON.update(x, m, case.table, case.row, noise=case.noise, keys=None)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.model_output)]
        result = function(*leaves)
        results.append((result.detach(), *torch.autograd.grad(result.square().sum(), leaves)))
    assert all(map(torch.equal, *results))


def test_another_device_becomes_current_for_the_launch() -> None:
    """Another device becomes current for the launch, since Triton launches on the current device;
    nothing changes if that is the tensors' own.
    """
    tensor = mock.Mock(device=torch.device("cuda", 1))
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "device") as guard,
    ):
        assert triton_jit.launch._device_of(tensor) is guard.return_value
        guard.assert_called_once_with(torch.device("cuda", 1))
        tensor.device = torch.device("cuda", 0)
        assert triton_jit.launch._device_of(tensor) is not guard.return_value
