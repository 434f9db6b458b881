"""Steps that Python takes past the dispatcher, against the operators' way."""

from __future__ import annotations

import copy
import pickle
import random
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastddim
from fastddim import direct, ops

pytestmark = pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason="needs the extension")

PREDICTIONS = ("epsilon", "sample", "v", "score")


class Watched:
    """`direct.step`, with a note whether it took the last step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = False
        self._step = direct.step
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(direct, "step", self)

    def __call__(self, *arguments: Any) -> Any:
        result = self._step(*arguments)
        self.taken = result is not None
        return result

    def otherwise(self, *arguments: Any, **options: Any) -> Any:
        """The result of the operators."""
        with self._monkeypatch.context() as patch:
            patch.setattr(direct, "step", direct.declines)
            return fastddim.step(*arguments, **options)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("trial", range(60))
def test_the_bits_of_the_operators(trial: int, watched: Watched) -> None:
    torch.manual_seed(trial)
    draw = random.Random(trial)
    dtype = draw.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    shape = draw.choice([(5,), (3, 7), (2, 3, 5, 7), (1, 4, 33, 9), (2, 130, 41)])
    guided, wide = draw.random() < 0.4, len(shape) > 1 and draw.random() < 0.4
    m_shape = [shape[0] * (2 if guided else 1), *shape[1:]]
    m_shape[1:2] = [2 * size if wide else size for size in m_shape[1:2]]
    x, m = randn(*shape, dtype=dtype), randn(*m_shape, dtype=draw.choice([dtype, torch.float32]))
    if len(shape) == 4 and draw.random() < 0.5:
        x = x.to(memory_format=torch.channels_last)
    if draw.random() < 0.3:
        x = torch.stack([x, x], dim=-1)[..., 1]
    a = draw.random() ** 3 * 0.99 + 1e-3
    options: dict[str, Any] = {
        "eta": draw.choice([0, 0.0, 0.6, 1]),
        "variance": draw.choice(["small", "fixed_large"]),
        "prediction": draw.choice(PREDICTIONS),
        "clip": draw.choice([None, 1]),
        "rederive_eps": draw.random() < 0.3,
        "guidance_scale": draw.choice([2, 3.5]) if guided else None,
        "temperature": draw.choice([1.0, 0.8]),
        "seed": draw.choice([3, 2**64 - 1]),
        "sample_offset": draw.choice([0, 11]),
        "step_index": draw.choice([0, 9]),
        "noise": randn(*shape, dtype=dtype) if draw.random() < 0.3 else None,
        "return_x0": True,
    }
    p = a + (1 - a) * draw.random()
    got = fastddim.step(x, m, a, p, **options)
    assert watched.taken
    want = watched.otherwise(x, m, a, p, **options)
    assert all(
        torch.equal(g, w) and g.stride() == w.stride() for g, w in zip(got, want, strict=True)
    )
    out = torch.full_like(x, torch.nan)
    options["return_x0"] = False
    assert fastddim.step(x, m, torch.tensor(a, dtype=torch.float64), p, **options, out=out) is out
    assert watched.taken
    assert torch.equal(out, want[0])


EDGES = (0.0, 5e-324, 1e-300, 1e-16, 0.5, 1 - 2**-53, 1.0)


def test_the_coefficients_are_those_of_the_plan(watched: Watched) -> None:
    """The coefficients are those of the plan, to the last bit of float64, also at the ends of their
    ranges; refusals are the same.
    """
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    x, m, z = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    taken = refused = 0
    for _ in range(1500):
        a, p = (draw.choice(EDGES) if draw.random() < 0.2 else draw.random() for _ in range(2))
        options: dict[str, Any] = {
            "eta": draw.choice([0, 1.0, 2 * draw.random()]),
            "variance": draw.choice(["small", "large"]),
            "prediction": draw.choice(PREDICTIONS),
            "clip": draw.choice([None, draw.random() + 0.1]),
            "rederive_eps": draw.random() < 0.3,
            "temperature": draw.choice([1.0, draw.random()]),
            "noise": z,
            "return_x0": True,
        }
        try:
            want = watched.otherwise(x, m, a, p, **options)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                fastddim.step(x, m, a, p, **options)
            refused += 1
            continue
        got = fastddim.step(x, m, a, p, **options)
        taken += watched.taken
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.view(torch.int64), other.view(torch.int64)), (a, p, options)
    assert taken > 700
    assert refused > 200


def test_in_place_and_a_fresh_seed(watched: Watched) -> None:
    x, m = randn(2, 300), randn(2, 300)
    results = []
    for call in (fastddim.step, watched.otherwise):
        torch.manual_seed(4)
        state = x.clone()
        call(state, m, 0.5, 0.6, eta=1, out=state)
        results += [state, torch.rand(1)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [Seen, SeenFunctions, torch.autograd.forward_ad.dual_level, torch.profiler.profile],
    ids=["dispatch", "function", "forward", "profiler"],
)
def test_declined_where_something_watches(mode: Any, watched: Watched) -> None:
    x, m = randn(8), randn(8)
    with mode():
        result = fastddim.step(x, m, 0.5, 0.6)
    assert not watched.taken
    assert torch.equal(result, fastddim.step(x, m, 0.5, 0.6))
    assert watched.taken


def test_declined_where_values_are_not_plain(watched: Watched) -> None:
    x, m = randn(8), randn(8)
    for given in (
        (torch._neg_view(x), m),
        (x.clone().requires_grad_(), m),
        (x, torch.nn.Parameter(m)),
        (x[:0], m[:0]),
    ):
        result = fastddim.step(*given, 0.5, 0.6)
        assert not watched.taken
        assert torch.equal(result, watched.otherwise(*given, 0.5, 0.6))
    torch.func.vmap(lambda a, b: fastddim.step(a, b, 0.5, 0.6))(randn(3, 8), randn(3, 8))
    assert not watched.taken


@pytest.mark.parametrize("way", ["direct", "operators"])
def test_a_tensor_saved_for_backward_is_known_to_be_written(way: str, watched: Watched) -> None:
    saved, weight = randn(8), randn(8).requires_grad_()
    loss = (saved * weight).sum()
    step = fastddim.step if way == "direct" else watched.otherwise
    step(randn(8), randn(8), 0.5, 0.6, out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads() -> None:
    x, m = randn(4, 5000), randn(4, 5000)
    want = fastddim.step(x, m, 0.5, 0.6, eta=1, seed=1)
    differ: list[int] = []

    def take() -> None:
        for i in range(30):
            if not torch.equal(fastddim.step(x, m, 0.5, 0.6, eta=1, seed=1), want):
                differ.append(i)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differ


SHAPE = (3, 2, 4, 4)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * 0.5 + t.view(-1, 1, 1, 1) * 1e-4


class TestStepper:
    @pytest.mark.parametrize("eta", [0.0, 1.0, [0.1 * i for i in range(6)]], ids=str)
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_a_loop_is_sample(self, eta: Any, impl: Any) -> None:
        schedule = fastddim.Schedule.linear()
        want = fastddim.sample(model, 6, schedule=schedule, shape=SHAPE, eta=eta, seed=5, impl=impl)
        made = fastddim.Stepper(schedule, 6, eta=eta, impl=impl)
        for stepper in (made, copy.deepcopy(pickle.loads(pickle.dumps(made)))):
            x = fastddim.philox.initial_latents(SHAPE, 5)
            for i, t in enumerate(stepper.timesteps):
                x = stepper(x, model(x, t.expand(3)), i, seed=5, out=x)
            assert torch.equal(x, want)

    def test_derivatives_and_compilation(self) -> None:
        stepper = fastddim.Stepper(fastddim.Schedule.linear(), 6)
        x, m = randn(*SHAPE), randn(*SHAPE).requires_grad_()
        result = stepper(x, m, 2)
        result.sum().backward()
        assert m.grad is not None
        assert torch.equal(result, stepper(x, m.detach(), 2))
        compiled = torch.compile(lambda x, m: stepper(x, m, 2), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, m.detach()), result)

    def test_refuses(self) -> None:
        schedule = fastddim.Schedule.linear()
        with pytest.raises(TypeError, match=r"schedule: expected a fastddim\.Schedule, got int"):
            fastddim.Stepper(6, schedule)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"fastddim.step takes these"):
            fastddim.Stepper(schedule, 6, guidance_scale=torch.tensor([1.0, 2.0]))
        stepper = fastddim.Stepper(schedule, 6)
        for i in (6, -1):
            with pytest.raises(ValueError, match=rf"i: expected an integer in \[0, 5\], got {i}"):
                stepper(randn(2), randn(2), i)
        with pytest.raises(ValueError, match=r"model_output: expected shape \(2,\)"):
            stepper(randn(2), randn(3), 0)
