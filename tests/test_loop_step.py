"""A loop's step in one call gives the results of the operators one after the other."""

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
        patch.delattr(cpu, "masked_loop_step")
        return draw(own, **arguments)


def masking(masked: bool = True, **arguments: Any) -> dict[str, Any]:
    """Known data and their weights for such a call, some of them 0 and some 1."""
    if not masked:
        return {}
    shape, dtype = arguments.get("shape", (2, 3, 5, 7)), arguments.get("dtype", torch.float32)
    values = torch.Generator().manual_seed(11)
    known = torch.randn(shape, generator=values, dtype=torch.float64)
    weights = torch.rand(shape, generator=values, dtype=torch.float64) * 1.5 - 0.25
    return {"known": known.to(dtype), "mask": weights.clamp(0, 1).to(dtype)}


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """A record, for each step that comes to this function of the backend, of whether one call took
    it.
    """
    taken: list[bool] = []
    original = getattr(cpu, name)

    def loop_step(*args: Any, **kwargs: Any) -> Callable[[Tensor], bool]:
        take = original(*args, **kwargs)

        def recording(output: Tensor) -> bool:
            taken.append(take(output))
            return taken[-1]

        return recording

    monkeypatch.setattr(cpu, name, loop_step)
    return taken


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A record, for each step without a mask, of whether one call took it."""
    return recorded(monkeypatch, "loop_step")


@pytest.fixture
def masked_taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A record, for each masked step, of whether one call took it."""
    return recorded(monkeypatch, "masked_loop_step")


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_operators(
    case: str, monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    expected = by_operators(monkeypatch, model, **CASES[case])
    assert not taken
    assert torch.equal(draw(model, **CASES[case]), expected)
    assert taken == [expected.numel() > 0] * 7


@pytest.mark.parametrize("case", CASES)
def test_masked_steps_have_the_bits_of_the_operators(
    case: str, monkeypatch: pytest.MonkeyPatch, taken: list[bool], masked_taken: list[bool]
) -> None:
    kind = CASES[case] | masking(**CASES[case])
    expected = by_operators(monkeypatch, model, **kind)
    if expected.numel():
        assert not torch.equal(expected, by_operators(monkeypatch, model, **CASES[case]))
    assert not masked_taken
    assert torch.equal(draw(model, **kind), expected)
    assert masked_taken == [expected.numel() > 0] * 7
    assert not taken


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("halved", [False, True])
def test_a_model_of_another_dtype(
    halved: bool,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[bool],
    masked_taken: list[bool],
) -> None:
    network = nn.Conv2d(3, 6 if halved else 3, 3, padding=1, dtype=torch.bfloat16)

    def own(x: Tensor, t: Tensor) -> Tensor:
        return network(x)

    module = nn.Module()
    module.register_module("network", network)
    module.forward = own
    kind = {"eta": 1.0} | masking(masked)
    with torch.no_grad():
        expected = by_operators(monkeypatch, module, **kind)
        assert torch.equal(draw(module, **kind), expected)
    assert (masked_taken if masked else taken) == [True] * 7


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", AWKWARD)
def test_outputs_that_lie_otherwise(
    kind: str,
    first: bool,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[bool],
    masked_taken: list[bool],
) -> None:
    """Every other output lies in another way, beginning with the first or the second. One call
    takes those that lie as the first does, whatever their order in memory.
    """
    calls = 0

    def own(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        output = model(x, t)
        return AWKWARD[kind](output) if (calls % 2 == 1) == first else output

    expected = by_operators(monkeypatch, own, **masking(masked))
    calls = 0
    assert torch.equal(draw(own, **masking(masked)), expected)
    refused = kind != "another dtype" or not first
    prepared = first and kind in ("transposed", "channels_last", "expanded", "cut out")
    refusals = (masked_taken if masked else taken).count(False)
    assert refusals == (4 if first and not prepared else 3) or not refused


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "expanded", "cut out"])
@pytest.mark.parametrize("case", ["eta 0", "eta 1", "guided", "bfloat16", "float16, order 2"])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_that_all_lie_so(
    masked: bool,
    case: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    taken: list[bool],
    masked_taken: list[bool],
) -> None:
    def own(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = AWKWARD[kind](model(x, t))
        return output

    arguments = CASES[case] | masking(masked, **CASES[case])
    expected = by_operators(monkeypatch, own, **arguments)
    assert torch.equal(draw(own, **arguments), expected)
    assert (masked_taken if masked else taken) == [True] * 7


def test_the_state_turned_over_as_output(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    """An output may be no copy of the state, and yet not be read where it is written."""
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


WITHIN: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "a part of it": lambda x: x[..., 1:2].expand(x.shape),
    "turned over": lambda x: x.transpose(-1, -2),
}


@pytest.mark.parametrize("kind", [{}, {"guidance_scale": 3.0}, {"order": 2}], ids=str)
@pytest.mark.parametrize("part", WITHIN)
def test_what_the_model_reads_as_output_of_a_masked_step(
    part: str, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch, masked_taken: list[bool]
) -> None:
    """The output of a masked step may lie inside the memory that a step writes over: the state, or
    under guidance the model's input.
    """
    arguments = {"shape": (2, 3, 5, 5), **kind}
    arguments |= masking(**arguments)
    expected = by_operators(monkeypatch, lambda x, t: WITHIN[part](x.clone()), **arguments)
    assert torch.equal(draw(lambda x, t: WITHIN[part](x), **arguments), expected)
    # A copy of an expanded view lies otherwise than the view.
    assert masked_taken == [part != "a part of it"] * 7


def test_a_masked_run_that_begins_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, masked_taken: list[bool]
) -> None:
    kind = {"x_T": torch.linspace(-1, 1, 210).view(2, 3, 5, 7), "first_step": 3, "eta": 1.0}
    kind |= masking()
    expected = by_operators(monkeypatch, model, **kind)
    assert torch.equal(draw(model, **kind), expected)
    assert masked_taken == [True] * 4


def test_masked_and_other_calls_in_turns(taken: list[bool], masked_taken: list[bool]) -> None:
    """Masked steps read the mask and the data of their call, wherever those lie."""
    shape = (2, 3)
    sampler = fastddim.Sampler(model, 7, shape=shape, eta=1.0, impl="cpu")
    one = masking(shape=shape)
    other = {"known": one["known"] * 2, "mask": 1 - one["mask"]}
    for seed, kind in enumerate([{}, one, other, {}]):
        expected = fastddim.sample(
            model, 7, shape=shape, seed=seed, eta=1.0, impl="reference", **kind
        )
        torch.testing.assert_close(sampler(seed=seed, **kind), expected)
    assert taken == masked_taken == [True] * 14


def test_a_backend_without_masked_loop_steps(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    """A backend without masked loop steps takes all its other steps in one call."""
    expected = draw(model, **masking())
    monkeypatch.delattr(cpu, "masked_loop_step")
    sampler = fastddim.Sampler(model, 7, shape=(2, 3, 5, 7), impl="cpu")
    assert torch.equal(sampler(seed=3, **masking()), expected)
    assert not taken
    assert torch.equal(sampler(seed=3), draw(model))
    assert taken == [True] * 14


def held(shape: tuple[int, ...]) -> tuple[Callable[[Tensor], bool], Tensor]:
    """A masked loop step that alone holds its tensors, and its state, of ones."""
    state, row = torch.ones(shape), torch.zeros(1, dtype=torch.int64)
    # x_0 + 2·x of the state; data + 3·x_T of the known data.
    table, known_table = torch.zeros(2, 1, 12)
    table[0, [0, 2, 3, 4]] = torch.tensor([1.0, float("inf"), 1.0, 2.0])
    known_table[0, [2, 4, 5]] = torch.tensor([float("inf"), 1.0, 3.0])
    like = [torch.full(shape, value) for value in (0.5, 0.0, 4.0, 5.0)]
    take = cpu.loop_step(
        state,
        torch.zeros(shape),
        table[:1],
        row,
        keys=None,
        history=None,
        model_input=None,
        counters=torch.zeros(1, dtype=torch.int64),
        timesteps=torch.zeros(3, dtype=torch.int64),
        t=torch.zeros(1, dtype=torch.int64),
        blending=ops.Blending(*like, known_table[:1], row),
    )
    return take, state


def test_a_held_step_keeps_its_tensors() -> None:
    shape = (2, 20_000)
    take, state = held(shape)
    gc.collect()
    overwriting = [torch.full(shape, float("nan")) for _ in range(8)]
    assert take(torch.zeros(shape))
    assert torch.equal(state, torch.full(shape, 0.5 * 3 + 0.5 * 19))
    assert len(overwriting) == 8


@pytest.mark.parametrize("missing", ["data", "x_T", "known_table", "known_row", "mask", "known"])
def test_what_masked_loop_steps_need(missing: str) -> None:
    whole, table = torch.ones(2, 3), torch.zeros(1, 12)
    integers = torch.zeros(2, dtype=torch.int64)
    given = dict.fromkeys(("mask", "known", "data", "x_T"), whole)
    given |= {"known_table": table, "known_row": integers[:1]}
    given.pop(missing)
    needed = "mask, known" if missing in ("mask", "known") else "data, x_T, known_table, known_row"
    with pytest.raises(RuntimeError, match=f"{needed}: expected"):
        torch.ops.fastddim.make_loop_step(
            *(whole, whole, table, integers[:1], None, None, None, None, None),
            *(integers[:1], integers, integers[:1]),
            **given,
        )


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


@pytest.mark.parametrize("masked", [False, True])
def test_loops_are_freed(masked: bool) -> None:
    kind = {"shape": (1, 1 << 18)}
    kind |= masking(masked, **kind)
    for _ in range(3):
        draw(lambda x, t: x, **kind)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30 if masked else 100):
        draw(lambda x, t: x, **kind)
    # KiB. Each loop has two tensors like the state, of 1 MiB, and four more where it is masked.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
