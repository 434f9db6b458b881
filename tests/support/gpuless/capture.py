"""The loop on fake CUDA tensors, under a probe that refuses what a captured graph cannot hold.

Run by tests/test_graph.py in a process of its own, since the device guard that it loads stays:
`python capture.py GUARD`. Prints a JSON object: what the probe said of each case ("" for nothing).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

import fastddim
from fastddim import Schedule, api, backends, transfer
from fastddim.actions.chunks import Chunks
from fastddim.actions.warm import WarmStart
from fastddim.loop import capture as capturing
from fastddim.loop import loop as loop_module
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.counters import Position
from fastddim.loop.loop import Loop
from fastddim.loop.setup import Setup, make_setup, resolve_model_dtype
from fastddim.loop.step import Step
from fastddim.loop.stream_order import StreamOrder
from fastddim.options import CallOptions, Reporting, SamplerOptions
from fastddim.philox import Samples
from fastddim.plan import Update, make_inversion_plan, make_plan, to_table
from fastddim.stream import requests
from fastddim.stream import stream as stream_module

_spec = importlib.util.spec_from_file_location("probes", Path(__file__).parents[1] / "probes.py")
probes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(probes)

CUDA = torch.device("cuda", 0)
SHAPE = (2, 3, 8, 8)
STEPS = 4


class OnDevice(probes.NoSync):
    """A mode that also refuses results off the device: a graph would hold their values, not the
    work.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor) and value.device != CUDA:
                raise AssertionError(f"result on the {value.device.type} in the loop: {func}")
        return result


_pinned: Any = WeakIdKeyDictionary()


def pin_memory(tensor: Tensor) -> Tensor:
    """Stands in for `Tensor.pin_memory`, which needs a GPU."""
    pinned = tensor.clone()
    _pinned[pinned] = True
    return pinned


class Unwaiting(TorchDispatchMode):
    """A mode that refuses waits of the host for the device, and lets the host do anything else."""

    _COPIES = frozenset({torch.ops.aten._to_copy, torch.ops.aten.copy_})
    _SHAPE_ALONE = frozenset({torch.ops.aten.zeros_like, torch.ops.aten.empty_like})

    def __init__(self) -> None:
        super().__init__()
        self.launched = self.uploads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        made = [v for v in tree_flatten(result)[0] if isinstance(v, Tensor)]
        devices = {v.device for v in (*given, *made)}
        if func.overloadpacket in probes.NoSync._FORBIDDEN and CUDA in devices:
            raise AssertionError(f"waits for the device: {func}")
        if len(devices) > 1 and func.overloadpacket not in self._SHAPE_ALONE:
            self._check_copy(func, given, args, kwargs or {})
            self.uploads += 1
        self.launched += CUDA in devices
        return result

    def _check_copy(
        self, func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        source = given[-1]
        if func.overloadpacket not in self._COPIES or source.device == CUDA:
            raise AssertionError(f"waits for the device: {func}")
        if source not in _pinned or not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            raise AssertionError(f"waits for the device: {func} from memory of the host")


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, outputs: int = 3) -> None:
        super().__init__()
        make = {"device": CUDA, "dtype": dtype}
        self.inner = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, **make),
            nn.GroupNorm(2, 8, **make),
            nn.SiLU(),
            nn.Conv2d(8, outputs, 3, padding=1, **make),
        )

    def forward(self, x: Tensor, t: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.inner(x) + torch.sin(t.to(x.dtype) / 100)[:, None, None, None]
        return y if scale is None else y * scale


class Probed:
    """A graph whose capture runs under the probe; a replay runs the body once more."""

    nodes = None

    def __init__(self, body: Callable[[], None]) -> None:
        self.replay = body
        with OnDevice() as probe:
            body()
        self.calls = probe.calls


def capture(body, *, warm_up, device, generators=()):
    # No warm-up: it may read values, of which fakes have none.
    assert device == CUDA
    return Probed(body)


def setup(model: Any, mode: bool | str, model_kwargs: Any = None, **update: Any) -> Setup:
    dtype = update.pop("dtype", torch.float32)
    order, refine = update.pop("order", 1), update.pop("refine", 0)
    denoised_fn = update.pop("denoised_fn", None)
    update = Update(**update).checked(SHAPE[0], per_step=True)
    if refine:
        plan = make_inversion_plan(Schedule.linear(), STEPS, update, refine=refine)
    else:
        split = denoised_fn is not None
        plan = make_plan(Schedule.linear(), STEPS, update, order=order, split=split)
    options = SamplerOptions(model, STEPS, graph=mode, model_kwargs=model_kwargs)
    return make_setup(options, plan, SHAPE, device=CUDA, dtype=dtype, denoised_fn=denoised_fn)


def run(
    mode: bool | str,
    *,
    make_model: Callable[[], Any] = Net,
    make_noise: Callable[[], Any] = lambda: None,
    make_kwargs: Callable[[], Any] = lambda: None,
    make_uncond: Callable[[], Any] = lambda: None,
    make_weak: Callable[[], Any] = lambda: None,
    step_type: type[Step] = Step,
    watch: bool = True,
    masked: bool = False,
    **update: Any,
) -> str:
    """The probe's findings about the captured body, or about the whole loop if `mode` is False."""
    # Plans and coefficients are made on the host, from values; so are they here.
    prepared = setup(None, mode, **update)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, weak = make_model(), make_weak()
            apart = weak is not None
            plan = prepared.plan
            given = {
                "model": model,
                "uncond_model": weak,
                "plan": replace(plan, kind=plan.kind._replace(apart=apart)),
                "model_dtype": resolve_model_dtype(model, None, prepared.dtype),
                "arguments": ModelArguments.of(
                    make_kwargs(),
                    make_uncond(),
                    batch=SHAPE[0],
                    guided=plan.kind.guided,
                    apart=apart,
                ),
            }
            loop_module.Step = step_type
            loop = Loop(Setup(**{**vars(prepared), **given}))
            x = torch.zeros(SHAPE, dtype=prepared.dtype, device=CUDA)
            samples = Samples(torch.ones(SHAPE[0], dtype=torch.int64, device=CUDA), None)
            noise = make_noise()
            seen: list[Any] = []
            with OnDevice() if mode is False else nullcontext():
                result = loop.run(
                    x,
                    Reporting(
                        callback=None if mode == "loop" or not watch else lambda *a: seen.append(a),
                        return_trajectory=watch,
                    ),
                    samples=samples,
                    noise=noise,
                    mask=torch.ones(1, 1, 8, 8, device=CUDA) if masked else None,
                    known=torch.ones(SHAPE, device=CUDA) if masked else None,
                )
            assert result.device == CUDA
            assert result.shape == ((STEPS + 1, *SHAPE) if watch else SHAPE)
            assert len(seen) == (STEPS if watch and mode != "loop" else 0)
            if mode is not False:
                (program,) = loop._programs.values()
                assert program.graph.calls >= 2 * (STEPS if mode == "loop" else 1)
    except (AssertionError, ValueError) as error:
        return str(error) or "assertion"
    finally:
        loop_module.Step = Step
    return ""


CLEAN: dict[str, dict[str, Any]] = {
    "plain": {},
    "unwatched": {"watch": False},
    "noisy": {"eta": 1.0, "clip": 1.0, "rederive_eps": True},
    "sigma-hat": {"eta": 1.0, "variance": "large", "prediction": "v_prediction"},
    "rows": {"eta": torch.tensor([0.0, 1.0]), "clip": 1.0},
    "guided": {"guidance_scale": 2.0, "eta": 0.5},
    "guided rows": {"guidance_scale": torch.tensor([1.0, 3.0])},
    "learned variance": {"make_model": lambda: Net(outputs=6)},
    "half model": {"make_model": lambda: Net(torch.float16), "eta": 1.0},
    "half state": {"dtype": torch.bfloat16, "guidance_scale": 2.0},
    "float64": {"dtype": torch.float64, "eta": 1.0},
    "noise": {"eta": 1.0, "make_noise": lambda: torch.zeros((STEPS, *SHAPE), device=CUDA)},
    "order 2": {"order": 2, "clip": 1.0},
    "order 2, half model": {"order": 2, "make_model": lambda: Net(torch.float16)},
    "refined": {"refine": 2, "guidance_scale": 2.0},
    "thresholding": {"dynamic_thresholding_ratio": 0.9, "eta": 1.0},
    "rescaled": {"guidance_scale": [1.0, 2.0, 3.0, 2.0], "guidance_rescale": 0.7},
    "x_0 hook": {"denoised_fn": lambda x_0, t: x_0 * 0.9, "eta": 1.0},
    "x_0 hook, all": {
        "denoised_fn": lambda x_0, t: x_0 * (t[:, None, None, None] > 3),
        "rederive_eps": True,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.5,
        "dynamic_thresholding_ratio": 0.8,
    },
    "kwargs": {"make_kwargs": lambda: {"scale": torch.ones(2, 1, 1, 1, device=CUDA)}},
    "one row of kwargs": {"make_kwargs": lambda: {"scale": torch.ones(1, 1, 1, 1, device=CUDA)}},
    "kwargs of both halves": {
        "make_kwargs": lambda: {"scale": torch.ones(2, 1, 1, 1, device=CUDA)},
        "make_uncond": lambda: {"scale": 0.5},
        "guidance_scale": 2.0,
    },
    "two models": {
        "make_weak": Net,
        "make_kwargs": lambda: {"scale": torch.ones(1, 1, 1, 1, device=CUDA)},
        "make_uncond": lambda: {"scale": torch.ones(2, 1, 1, 1, device=CUDA)},
        "guidance_scale": 2.0,
    },
    "two models in half precision": {
        "make_model": lambda: Net(torch.float16, outputs=6),
        "make_weak": lambda: Net(torch.float16, outputs=6),
        "guidance_scale": 2.0,
        "guidance_rescale": 0.5,
    },
}

# Drawn or worked out on the host, so the eager run copies it; the captured body must not.
HOST_NOISE: dict[str, dict[str, Any]] = {
    "mask": {"masked": True, "order": 2},
    "mask, guided": {"masked": True, "guidance_scale": 2.0, "eta": 1.0},
    "host generator": {"eta": 1.0, "make_noise": torch.Generator},
    "host generators": {"eta": 1.0, "make_noise": lambda: [torch.Generator(), torch.Generator()]},
}


class Reads(Step):
    def take(self, at: Position, *args: Any, **kwargs: Any) -> None:
        super().take(at, *args, **kwargs)
        timesteps = self._counting.timesteps
        at.t.fill_(int(timesteps[min(int(at.step), STEPS - 1)]))


class Uploads(Step):
    def take(self, at: Position, *args: Any, **kwargs: Any) -> None:
        super().take(at, *args, **kwargs)
        at.t.add_(torch.tensor([0]).to(at.t.device))


class Zeroes(Step):
    def take(self, at: Position, *args: Any, **kwargs: Any) -> None:
        super().take(at, *args, **kwargs)
        at.t.add_(self._zero)

    _zero = torch.tensor(0)


def spoilt(defect: Callable[[Tensor, Tensor], Any]) -> Callable[[], Any]:
    def make() -> Any:
        net = Net()

        def model(x: Tensor, t: Tensor) -> Tensor:
            extra = defect(x, t)
            return net(x, t) + extra if isinstance(extra, Tensor) else net(x, t)

        return model

    return make


ZERO = torch.tensor(0.0)

DEFECTS: dict[str, dict[str, Any]] = {
    "item": {"make_model": spoilt(lambda x, t: x.mean().item())},
    "tolist": {"make_model": spoilt(lambda x, t: (x.mean().tolist(), None)[1])},
    "int of t": {"make_model": spoilt(lambda x, t: range(int(t[0])))},
    "branch on a value": {"make_model": spoilt(lambda x, t: 1 if x.isfinite().all() else 0)},
    "index by a 0-dim tensor": {"make_model": spoilt(lambda x, t: x[t[0] * 0])},
    "mask": {"make_model": spoilt(lambda x, t: x[x > 0].sum())},
    "nonzero": {"make_model": spoilt(lambda x, t: x.nonzero().sum())},
    "constant from the host": {"make_model": spoilt(lambda x, t: torch.tensor(1.0, device=CUDA))},
    "host to device": {"make_model": spoilt(lambda x, t: torch.zeros(1, device="cpu").to(CUDA))},
    "device to host": {"make_model": spoilt(lambda x, t: (x.cpu(), None)[1])},
    "0-dim host tensor": {"make_model": spoilt(lambda x, t: x * ZERO)},
    "tensor on the host": {"make_model": spoilt(lambda x, t: (torch.ones(1), None)[1])},
    "loop reads a counter": {"step_type": Reads},
    "loop uploads": {"step_type": Uploads},
    "loop adds a host tensor": {"step_type": Zeroes},
}

KEYS = {"seed": 2**64 - 1, "sample_offset": 5}
SEEDS = {"seed": [1, 2**64 - 1], "sample_offset": 0}


def made_loop(mode: bool | str, **update: Any) -> Callable[[], Loop]:
    prepared = setup(None, mode, **update)
    return lambda: Loop(Setup(**{**vars(prepared), "model": Net()}))


def a_call(mode: bool | str, keys: dict[str, Any]) -> Any:
    options = CallOptions(**keys, return_trajectory=True)
    return made_loop(mode, eta=1.0), lambda loop: loop.sample(options)


def a_call_with_conditions(mode: bool | str) -> Any:
    """A call with numbers, tensors and lists as arguments, a strength for each step, and two halves
    of guidance.
    """
    update: dict[str, Any] = {"guidance_scale": [1.0, 2.0, 3.0, 2.0], "eta": [1.0, 0.5, 0.0, 1.0]}
    prepared = setup(None, mode, **update)

    class Conditioned(Net):
        def forward(self, x: Tensor, t: Tensor, *, scale: Tensor, others: Any) -> Tensor:
            return super().forward(x, t, scale) * others["factor"] + others["shifts"][0]

    def arguments(value: float) -> ModelArguments:
        shifts = [torch.full((), value, device=CUDA), torch.ones((), device=CUDA)]
        kwargs = {
            "scale": torch.full((1, 1, 1, 1), value, device=CUDA),
            "others": {"factor": 0.5, "shifts": shifts, "name": "a"},
        }
        uncond = {"scale": 0.25}
        return ModelArguments.of(kwargs, uncond, batch=SHAPE[0], guided=True, apart=False)

    def make() -> Loop:
        given = {"model": Conditioned(), "arguments": arguments(1.0)}
        return Loop(Setup(**{**vars(prepared), **given}))

    def call(loop: Loop) -> None:
        for value in (1.0, 2.0):
            loop.sample(CallOptions(**KEYS), arguments(value))

    return make, call


def a_call_with_generators(mode: bool | str) -> Any:
    """A call with generators on the host, which draw x_T and the noise of each step."""
    options = CallOptions(noise=[torch.Generator(), torch.Generator()])
    return made_loop(mode, eta=1.0), lambda loop: loop.sample(options)


def a_masked_run(mode: bool | str) -> Any:
    def call(loop: Loop) -> None:
        mask, known = torch.ones(1, 1, 8, 8, device=CUDA), torch.ones(SHAPE, device=CUDA)
        loop.run(loop.buffers.state.clone(), mask=mask, known=known)

    return made_loop(mode), call


def a_loop_taken_over(mode: bool | str) -> Any:
    """A call with other coefficients, which takes over a loop."""
    other = setup(None, mode, eta=0.5, denoised_fn=lambda x_0, t: x_0)
    other = Setup(**{**vars(other), "model": same})
    return made_loop(mode, eta=1.0, denoised_fn=lambda x_0, t: x_0), lambda loop: loop.load(other)


def a_step(mode: bool | str, keys: dict[str, Any]) -> Any:
    def take(x: Tensor) -> None:
        fastddim.step(x, x, 0.5, 0.75, eta=1.0, **keys, step_index=3)

    return lambda: torch.zeros(SHAPE, device=CUDA), take


def steps_of_a_stream(mode: bool | str, guided: bool = False) -> Any:
    kind = {"shape": (3, *SHAPE[1:]), "schedule": Schedule.linear(), "graph": mode}

    def make() -> fastddim.Stream:
        return fastddim.Stream(Net(), guided=guided, **kind)

    def serve(stream: fastddim.Stream) -> None:
        done = [stream.step() for _ in range(2)][-1]
        assert [ticket.exception(0) for ticket in done] == [None, None]

    return make, serve


def submit(stream: fastddim.Stream) -> None:
    guidance_scale = 2.0 if stream._kind.guided else None
    for seed in (3, 2**64 - 1):
        stream.submit(2, eta=1.0, seed=seed, guidance_scale=guidance_scale)


def ticks(mode: bool | str) -> Any:
    """Ticks of a robot, each of which takes something over from the last chunk."""
    shape = (2, 6, 3)

    def make() -> tuple[Chunks, WarmStart]:
        warm = WarmStart(0.5, 3, shape, torch.float32, CUDA, backends.BACKENDS["cpu"])
        return Chunks(shape, torch.float32, CUDA), warm

    def call(made: tuple[Chunks, WarmStart]) -> None:
        chunks, warm = made
        for tick, (executed, frozen) in enumerate([(1, 2), (1, 2), (np.array([2, 0]), 3)]):
            chunks.shift(executed, frozen)
            assert warm.state(chunks.shifted, 2 * tick).device == CUDA
            chunks.keep_frozen()

    return make, call


def same(x: Tensor, t: Tensor) -> Tensor:
    return x


def a_new_loop(mode: bool | str) -> Any:
    make, call = a_call(mode, SEEDS)
    return lambda: None, lambda _: call(make())


CALLS: dict[str, Callable[[bool | str], Any]] = {
    "a call": lambda mode: a_call(mode, KEYS),
    "a call, seeds": lambda mode: a_call(mode, SEEDS),
    "a call with conditions": a_call_with_conditions,
    "a call with generators": a_call_with_generators,
    "a masked run": a_masked_run,
    "a new loop": a_new_loop,
    "a loop taken over": a_loop_taken_over,
    "a step": lambda mode: a_step(mode, KEYS),
    "a step, seeds": lambda mode: a_step(mode, SEEDS),
    "a stream": steps_of_a_stream,
    "a guided stream": lambda mode: steps_of_a_stream(mode, guided=True),
}


def whole(case: Callable[[bool | str], Any], mode: bool | str) -> str:
    """The probe's findings about a whole call, with all work of the host in it."""
    make, call = case(mode)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fakes:
            made = make()
        if isinstance(made, fastddim.Stream):
            # Plans are made on the host, from values.
            submit(made)
        with fakes, Unwaiting() as probe:
            call(made)
        assert probe.launched
        if transfer.captured(CUDA) and probe.uploads:
            return f"a graph would read memory of the host at {probe.uploads} copies"
    except (AssertionError, ValueError) as error:
        return str(error) or "assertion"
    return ""


WAITING: dict[str, Callable[..., Tensor]] = {
    "from memory of the host": lambda values, out: out.copy_(values),
    "without a stream's order": lambda values, out: out.copy_(pin_memory(values)),
}


# Refused before the capture, in words for the caller.
REFUSED: dict[str, dict[str, Any]] = {
    "kwargs on the host": {"make_kwargs": lambda: {"scale": torch.ones(2, 1, 1, 1)}},
}


def on_host(order: type[StreamOrder], device: torch.device) -> StreamOrder:
    return order(torch.device("cpu"))


def main() -> None:
    if sys.argv[1:]:
        ctypes.CDLL(sys.argv[1])
    # The operators themselves, for which fakes stand in; any other backend asks for a GPU.
    backends.choose = lambda impl, device: backends.BACKENDS["cpu"]
    capturing.capture = capture
    for module in (loop_module, stream_module, requests):
        module.StreamOrder = functools.partial(on_host, StreamOrder)
    transfer.captured = lambda device: False
    transfer.wait = lambda device: None
    Tensor.pin_memory = pin_memory
    # The values of fakes can be neither read nor checked.
    transfer._by_arguments = lambda values, device: torch.ones(
        values.shape, dtype=values.dtype, device=device
    )
    loop_module._values = lambda tensors: None
    api.to_table = lambda *rows: to_table(*rows, checked=False)
    results: dict[str, str] = {}
    for mode in (False, True, "loop"):
        groups = {"clean": CLEAN, "defect": DEFECTS}
        if mode is not False:
            groups |= {"clean on the host": HOST_NOISE, "refused": REFUSED}
        for group, cases in groups.items():
            for name, case in cases.items():
                results[f"{group}/{mode}/{name}"] = run(mode, **case)
        for name, case in CALLS.items():
            if mode != "loop" or "stream" not in name:
                results[f"whole/{mode}/{name}"] = whole(case, mode)
    results["ticks"] = whole(ticks, False)
    transfer.captured = lambda device: True
    for name, case in CALLS.items():
        if "generators" not in name:  # of the host, which are refused
            results[f"captured/{name}"] = whole(case, "auto")
    transfer.captured = lambda device: False
    for name, write in WAITING.items():
        transfer.write = write
        results[f"waiting/{name}"] = whole(CALLS["a call, seeds"], False)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
