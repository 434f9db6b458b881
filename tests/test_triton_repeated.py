"""Launches of Triton that are repeated, and steps of loops that hold them.

Triton's own runtime runs, on a stand-in for its driver: kernels are compiled, found and called as
on a GPU, and what reaches the driver is executed on CPU tensors by the interpreter of PTX.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastddim
from fastddim import backends

from .support.environment import needs_extension
from .support.updates import DTYPES, LAYOUTS, make_case

pytest.importorskip("triton", reason="Triton is not installed")

from fastddim.kernels import loop_step, repeated
from gpucheck import triton_jit
from triton import knobs

from .support.gpuless.cases import assert_bare_bits_of_cpu
from .support.gpuless.triton_driver import Driver, driven
from .support.gpuless.triton_on_ptx import Interpreter

pytestmark = needs_extension
TRITON = backends.BACKENDS["triton"]


@pytest.fixture
def driver() -> Driver:
    return Driver(Interpreter())


def ignore(binary: triton_jit.Binary) -> None:
    """Ignores launches, in tests that count them and do not read what they write."""


@pytest.fixture
def own(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that Triton's own launch was called for."""
    monkeypatch.setattr(TRITON, "unavailable", lambda device: None)
    with driven(driver) as own:
        yield own


def deep(cases: Iterable[str], *quick: str) -> list[Any]:
    """All of the cases; those that are not quick are deep tests."""
    return [pytest.param(case, marks=[] if case in quick else pytest.mark.deep) for case in cases]


UPDATES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    **{f"{dtype}": ((2, 3, 16), {"dtype": dtype, "noise": "keyed"}) for dtype in DTYPES},
    **{layout: ((2, 3, 5, 8), {"layout": layout, "noise": "given"}) for layout in LAYOUTS[1:3]},
    "odd": ((3, 37), {"noise": "keyed", "per_sample": True}),
    "guided": (
        (2, 4, 16),
        {"guided": True, "model_input": torch.float16, "model_dtype": torch.float16, "mask": True},
    ),
}


@pytest.mark.parametrize("name", deep(UPDATES, "guided", "torch.bfloat16"))
def test_updates_alike(name: str, driver: Driver, own: list[str]) -> None:
    """Updates alike use the kernel that was found for the first ones, with other tensors."""
    shape, kind = UPDATES[name]
    cases = [make_case(torch.Generator().manual_seed(seed), shape, **kind) for seed in range(3)]
    for case in cases:
        assert_bare_bits_of_cpu(triton_jit.LAUNCHERS.update_out, case)
    assert len(driver.streams) == 3
    assert own == ["update_kernel"]


def model(x: Tensor, t: Tensor) -> Tensor:
    return (x.double().sin() * 0.9 + t.view(-1, *[1] * (x.ndim - 1)) * 1e-3).to(x.dtype)


def offset(output: Tensor) -> Tensor:
    """The same output, not aligned."""
    memory = output.new_empty(output.numel() + 1)
    return memory[1:].view(output.shape).copy_(output)


def draw(own_model: Callable[..., Any], impl: str, **arguments: Any) -> Tensor:
    arguments = {"shape": (2, 4, 4, 4), "seed": 3, **arguments}
    result = fastddim.sample(own_model, 7, impl=impl, **arguments)
    assert isinstance(result, Tensor)
    return result


LOOPS: dict[str, dict[str, Any]] = {
    "eta 0": {},
    "eta 1": {"eta": 1.0},
    "odd sizes": {"eta": 0.5, "shape": (3, 37)},
    "eta of each sample": {"eta": torch.tensor([0.0, 0.5])},
    "guided": {"guidance_scale": 3.0, "eta": 0.3},
    "order 2": {"order": 2},
    "clip": {"clip": 0.7, "rederive_eps": True},
    "float64": {"dtype": torch.float64, "eta": 1.0},
    "bfloat16": {"dtype": torch.bfloat16, "eta": 1.0},
}


@pytest.mark.parametrize("kind", deep(LOOPS, "eta 1", "order 2"))
def test_a_loop(kind: str, driver: Driver, own: list[str]) -> None:
    """A loop has the bits of the CPU; Triton's own launch is called only for the first step."""
    got = draw(model, "triton", **LOOPS[kind])
    assert torch.equal(got, draw(model, "cpu", **LOOPS[kind]))
    steps = [name for name in own if name != "normal_kernel"]
    assert steps == ["update_kernel", "advance_kernel"]
    assert len(driver.streams) == 7 * 2 + own.count("normal_kernel")


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "unaligned": offset,
    "channels_last": lambda e: e.contiguous(memory_format=torch.channels_last),
    "cut out": lambda e: torch.cat([e, e], -1)[..., : e.shape[-1]],
    "negated in passing": lambda e: torch.complex(e, -e).conj().imag,
    "a parameter": nn.Parameter,
    "zeros without memory": lambda e: torch._efficientzerotensor(e.shape),
}


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.deep)])
@pytest.mark.parametrize("kind", deep(OUTPUTS, "unaligned", "negated in passing"))
def test_outputs_that_lie_otherwise(kind: str, first: int, own: list[str]) -> None:
    """Every other output lies in another way, beginning with the first or the second."""
    calls = 0

    def changing(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output = model(x, t)
        return OUTPUTS[kind](output) if calls % 2 == first else output

    got = draw(changing, "triton", eta=1.0)
    calls = 0
    assert torch.equal(got, draw(changing, "cpu", eta=1.0))
    assert own.count("update_kernel") <= 2
    assert own.count("advance_kernel") == 1


@pytest.mark.parametrize("guided", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_what_the_model_reads_as_output(guided: bool, own: list[str]) -> None:
    kind = {"eta": 1.0, "guidance_scale": 2.0 if guided else None}
    for returned in (lambda x, t: x, lambda x, t: x.flip(1), lambda x, t: x.mul_(0.5)):
        assert torch.equal(draw(returned, "triton", **kind), draw(returned, "cpu", **kind))


def test_memory_of_outputs_is_let_go(driver: Driver, own: list[str]) -> None:
    driver.then = ignore
    seen: list[weakref.ref[Tensor]] = []

    def recording(x: Tensor, t: Tensor) -> Tensor:
        assert not any(output() is not None for output in seen)
        output = model(x, t)
        seen.append(weakref.ref(output))
        return output

    draw(recording, "triton")
    assert len(seen) == 7


def test_the_current_stream(driver: Driver, own: list[str]) -> None:
    def switching(x: Tensor, t: Tensor) -> Tensor:
        driver.stream += 1
        return model(x, t)

    driver.stream, driver.then = 0, ignore
    draw(switching, "triton")
    assert driver.streams[-14:] == [stream for stream in range(1, 8) for _ in range(2)]


def test_the_device_of_the_tensors(
    driver: Driver, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is launched while the tensors' device is the current one."""
    driver.then = ignore
    entered: list[torch.device] = []

    @contextmanager
    def guard(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor.device)
        yield

    monkeypatch.setattr(loop_step, "_device_of", guard)
    draw(model, "triton")
    assert entered == [torch.device("cpu")] * 7


def test_hooks_of_profilers(driver: Driver, own: list[str]) -> None:
    """Hooks of profilers are called for each launch, from their addition to their removal."""
    driver.then = ignore
    begun: list[str] = []
    ended: list[str] = []

    def begin(metadata: Any) -> None:
        begun.append(metadata.get()["name"])

    def end(metadata: Any) -> None:
        ended.append(metadata.get()["name"])

    def hooking(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            knobs.runtime.launch_enter_hook.add(begin)
            knobs.runtime.launch_exit_hook.add(end)
        if calls == 6:
            knobs.runtime.launch_enter_hook.remove(begin)
            knobs.runtime.launch_exit_hook.remove(end)
        return model(x, t)

    calls = 0
    draw(hooking, "triton")
    assert begun == ended == ["update_kernel", "advance_kernel"] * 3


class Functions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += "triton_update_out" in str(func)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += "triton_update_out" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_modes_see_operators(
    mode: type[Functions | Operators], driver: Driver, own: list[str]
) -> None:
    driver.then = ignore
    with mode() as seeing:
        draw(model, "triton")
    assert seeing.seen == 7


def test_profilers_see_operators(driver: Driver, own: list[str]) -> None:
    driver.then = ignore
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        draw(model, "triton")
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fastddim::triton_update_out"] == 7


def test_a_default_device_is_no_such_mode(driver: Driver, own: list[str]) -> None:
    driver.then = ignore
    with torch.device("cpu"), mock.patch.object(TRITON, "update_out") as operator:
        draw(model, "triton")
    assert not operator.called


@pytest.fixture(params=["another version", "another name", "hooks before"])
def ordinary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves each launch to Triton, for one of three reasons."""
    update = triton_jit.launch.update_kernel
    if request.param == "another version":
        monkeypatch.setattr(repeated, "VERSIONS", ("2.",))
    elif request.param == "another name":
        monkeypatch.setattr(repeated, "driver", SimpleNamespace(active=None))
    else:
        monkeypatch.setattr(update, "pre_run_hooks", [lambda *args, **kwargs: None])


@pytest.mark.usefixtures("ordinary")
def test_launches_of_triton_alone(own: list[str]) -> None:
    assert torch.equal(draw(model, "triton"), draw(model, "cpu"))
    assert own.count("update_kernel") == 7


def test_settings_of_triton(
    driver: Driver, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is looked for again when a setting of Triton would compile another one."""
    driver.then = ignore
    for debug, found in ((False, 1), (True, 1), (True, 0), (False, 1)):
        own.clear()
        monkeypatch.setattr(knobs.runtime, "debug", debug)
        draw(model, "triton")
        assert own.count("update_kernel") == found
