"""A loop's step in one call gives what the operators give one after the other."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim
from fastddim import ops
from fastddim.backends import cpu

pytestmark = pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=str(ops.EXTENSION_ERROR))

CASES: dict[str, dict[str, Any]] = {
    "eta 0": {},
    "eta 1": {"eta": 1.0},
    "policy": {"shape": (3, 112)},
    "one dimension": {"shape": (5,), "eta": 0.5},
    "no element": {"shape": (2, 0, 3), "eta": 0.5},
    "several threads": {"shape": (2, 3, 150, 151), "eta": 1.0},
    "eta of each sample": {"eta": torch.tensor([0.0, 0.5, 1.0]), "shape": (3, 7)},
    "guided": {"guidance_scale": 3.0, "eta": 0.3},
    "guided, scale of each sample": {"guidance_scale": torch.tensor([1.0, 2.0])},
    "order 2": {"order": 2},
    "clip": {"clip": 0.7, "rederive_eps": True},
    "float64": {"dtype": torch.float64, "eta": 1.0},
    "bfloat16": {"dtype": torch.bfloat16, "eta": 1.0},
    "float16, order 2": {"dtype": torch.float16, "order": 2},
    "v": {"prediction": "v_prediction", "variance": "large", "eta": 1.0, "clip": 1.0},
    "score": {"prediction": "score", "eta": 0.3},
    "score, order 2": {"prediction": "score", "order": 2},
}


def model(x: Tensor, t: Tensor) -> Tensor:
    return (x.double().sin() * 0.9 + t.view(-1, *[1] * (x.ndim - 1)) * 1e-3).to(x.dtype)


def draw(own: Callable[..., Any], seed: int = 3, **arguments: Any) -> Tensor:
    arguments = {"shape": (2, 3, 5, 7), **arguments}
    result = fastddim.sample(own, 7, seed=seed, impl="cpu", **arguments)
    assert isinstance(result, Tensor)
    return result


def by_operators(monkeypatch: pytest.MonkeyPatch, own: Any, **arguments: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.delattr(cpu, "loop_step")
        return draw(own, **arguments)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step, whether one call took it."""
    taken: list[bool] = []
    original = cpu.loop_step

    def loop_step(*args: Any, **kwargs: Any) -> Callable[[Tensor], bool]:
        take = original(*args, **kwargs)

        def recorded(output: Tensor) -> bool:
            taken.append(take(output))
            return taken[-1]

        return recorded

    monkeypatch.setattr(cpu, "loop_step", loop_step)
    return taken


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_operators(
    case: str, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    expected = by_operators(monkeypatch, model, **CASES[case])
    assert not taken
    assert torch.equal(draw(model, **CASES[case]), expected)
    assert taken == [expected.numel() > 0] * 7


@pytest.mark.parametrize("halved", [False, True])
def test_a_model_of_another_dtype(
    halved: bool, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    network = nn.Conv2d(3, 6 if halved else 3, 3, padding=1, dtype=torch.bfloat16)

    def own(x: Tensor, t: Tensor) -> Tensor:
        return network(x)

    module = nn.Module()
    module.register_module("network", network)
    module.forward = own
    with torch.no_grad():
        expected = by_operators(monkeypatch, module, eta=1.0)
        assert torch.equal(draw(module, eta=1.0), expected)
    assert taken == [True] * 7


AWKWARD: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda e: e.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_last": lambda e: e.contiguous(memory_format=torch.channels_last),
    "expanded": lambda e: e[:, :1].expand(e.shape),
    "cut out": lambda e: torch.cat([e, e], -1)[..., : e.shape[-1]],
    "negated in passing": lambda e: torch.complex(e, -e).conj().imag,
    "a parameter": nn.Parameter,
    "another dtype": lambda e: e.double(),
    "zeros without memory": lambda e: torch._efficientzerotensor(e.shape),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", AWKWARD)
def test_outputs_that_lie_otherwise(
    kind: str, first: bool, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    """Every other output, beginning with the first or the second. One call takes those that lie as
    the first does, in whatever order.
    """
    calls = 0

    def own(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output = model(x, t)
        return AWKWARD[kind](output) if (calls % 2 == 1) == first else output

    expected = by_operators(monkeypatch, own)
    calls = 0
    assert torch.equal(draw(own), expected)
    refused = kind != "another dtype" or not first
    prepared = first and kind in ("transposed", "channels_last", "expanded", "cut out")
    assert taken.count(False) == (4 if first and not prepared else 3) or not refused


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "expanded", "cut out"])
@pytest.mark.parametrize("case", ["eta 0", "eta 1", "guided", "bfloat16", "float16, order 2"])
def test_outputs_that_all_lie_so(
    case: str, kind: str, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    def own(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = AWKWARD[kind](model(x, t))
        return output

    expected = by_operators(monkeypatch, own, **CASES[case])
    assert torch.equal(draw(own, **CASES[case]), expected)
    assert taken == [True] * 7


def test_the_state_turned_over_as_output(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    """An output that is no copy of the state, and yet not read where it is written."""
    kind = {"shape": (2, 3, 5, 5), "eta": 1.0}
    expected = by_operators(monkeypatch, lambda x, t: x.transpose(-1, -2), **kind)
    assert torch.equal(draw(lambda x, t: x.transpose(-1, -2), **kind), expected)
    plain = draw(lambda x, t: x.transpose(-1, -2).contiguous(), **kind)
    assert torch.equal(expected, plain)
    assert all(taken)


def test_the_state_itself_as_output(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    expected = by_operators(monkeypatch, lambda x, t: x, eta=1.0)
    assert torch.equal(draw(lambda x, t: x, eta=1.0), expected)
    assert all(taken)


def test_what_is_wrong_is_refused_as_ever() -> None:
    outputs = iter([torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 5, 8)])
    with pytest.raises(ValueError, match=r"model output: expected shape \(2, 3, 5, 7\)"):
        draw(lambda x, t: next(outputs))
    values = iter([0.0, 1.0, float("nan")])
    with pytest.raises(ValueError, match="at step 2"):
        draw(lambda x, t: torch.full_like(x, next(values)), check_finite=True)


def test_a_sampler_goes_on_after_an_error() -> None:
    fails = True

    def own(x: Tensor, t: Tensor) -> Tensor:
        if fails and t[0] < 500:
            raise RuntimeError("out of order")
        return model(x, t)

    sampler = fastddim.Sampler(own, 7, shape=(2, 3), eta=1.0, impl="cpu")
    with pytest.raises(RuntimeError, match="out of order"):
        sampler(seed=3)
    fails = False
    assert torch.equal(sampler(seed=3), draw(own, shape=(2, 3), eta=1.0))


def test_a_call_that_looks_on_and_one_that_does_not() -> None:
    sampler = fastddim.Sampler(model, 7, shape=(2, 3), eta=1.0, impl="cpu")
    expected = sampler(seed=3)
    seen: list[Tensor] = []
    assert torch.equal(sampler(seed=3, callback=lambda s, t, x, x_0: seen.append(x_0)), expected)
    assert len(seen) == 7
    noise = torch.randn(7, 2, 3)
    assert not torch.equal(sampler(seed=3, noise=noise), expected)
    assert torch.equal(sampler(seed=3), expected)


def test_loops_are_freed() -> None:
    for _ in range(3):
        draw(lambda x, t: x, shape=(1, 1 << 18))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        draw(lambda x, t: x, shape=(1, 1 << 18))
    # KiB. Each loop has two states of 1 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
