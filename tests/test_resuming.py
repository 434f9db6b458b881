"""Runs that stop after a step, and runs that begin at one: with the bits of the whole run."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastddim
from fastddim import STOP, Sampler

from .support.environment import CPU_IMPLS
from .support.models import SmallNet, elementwise_model
from .support.recorded_graph import RecordedGraph, recorded_graphs
from .support.tuned import random_steps

S = 4
SHAPE = (2, 3, 4, 4)
LINEAR = fastddim.Schedule.linear()


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halved(x_0: Tensor, t: Tensor) -> Tensor:
    return x_0 * (0.5 + t[0] / 2000)


KINDS: dict[str, dict[str, Any]] = {
    "eta 0": {},
    "eta 0.5": {"eta": 0.5},
    "eta 1": {"eta": 1.0, "clip": 1.0, "rederive_eps": True},
    "sigma-hat": {"eta": 1.0, "variance": "large"},
    "of each step": {"eta": [0.0, 1.0, 0.5, 0.0], "temperature": [1.0, 0.5, 0.25, 1.0]},
    "of each sample": {"eta": torch.tensor([1.0, 0.5])},
    "guided": {"eta": 0.5, "guidance_scale": [1.0, 2.0, 3.0, 4.0], "guidance_rescale": 0.3},
    "thresholded": {"eta": 0.5, "dynamic_thresholding_ratio": 0.9},
    "changed x_0": {"eta": 0.5, "denoised_fn": halved},
    "float64": {"eta": 1.0, "dtype": torch.float64},
    "bfloat16": {"eta": 1.0, "dtype": torch.bfloat16},
}
CALLS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2**64 - 3},
    "offset": {"seed": 5, "sample_offset": 9},
    "seeds": {"seed": [3, 2**63]},
    "noise": {"seed": 1, "noise": draws(S, *SHAPE, seed=1)},
    "known": {"seed": 4, "mask": torch.ones(4, 4).tril(), "known": draws(*SHAPE, seed=2)},
}
CASES = {
    **{name: (kind, CALLS["seed"]) for name, kind in KINDS.items()},
    **{f"eta 1, {name}": (KINDS["eta 1"], call) for name, call in CALLS.items()},
    "of each sample, known": (KINDS["of each sample"], CALLS["known"]),
}


def stopping(at: int) -> Callable[..., Any]:
    return lambda s, t, x_t, x_0: STOP if s == at else None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Graphs by recording, on the CPU."""
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


# A recorded graph of the reference takes long to replay.
@pytest.mark.parametrize(
    ("impl", "graph"), [*((impl, False) for impl in CPU_IMPLS), ("auto", True), ("auto", "loop")]
)
@pytest.mark.parametrize(("kind", "call"), CASES.values(), ids=CASES)
def test_the_rest_of_a_run_has_its_bits(
    kind: dict[str, Any], call: dict[str, Any], impl: str, graph: Any, recorded: list[Any]
) -> None:
    common = {"shape": SHAPE, "schedule": LINEAR, "impl": impl, **kind}
    states = fastddim.sample(SmallNet(), S, graph=False, return_trajectory=True, **common, **call)
    sampler = Sampler(SmallNet(), S, graph=graph, **common)
    for k in (2, 0, S - 1, 1):
        rest = {"x_T": states[k], "first_step": k, **call}
        assert torch.equal(sampler(**rest), states[-1])
        assert torch.equal(sampler(return_trajectory=True, **rest), states[k:])
        assert torch.equal(
            fastddim.sample(SmallNet(), S, **common, graph=graph, **rest), states[-1]
        )
    assert torch.equal(sampler(**call), states[-1])


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("kind", "call"), CASES.values(), ids=CASES)
def test_a_run_that_stopped_goes_on(
    kind: dict[str, Any], call: dict[str, Any], graph: Any, recorded: list[Any]
) -> None:
    common = {"shape": SHAPE, "schedule": LINEAR, **kind}
    states = fastddim.sample(SmallNet(), S, graph=False, return_trajectory=True, **common, **call)
    sampler = Sampler(SmallNet(), S, graph=graph, **common)
    for s in range(S):
        stopped = sampler(callback=stopping(s), **call)
        assert torch.equal(stopped, states[s + 1])
        seen = sampler(callback=stopping(s), return_trajectory=True, **call)
        assert torch.equal(seen, states[: s + 2])
        assert seen.untyped_storage().nbytes() == seen.nbytes
        if s + 1 < S:
            assert torch.equal(sampler(x_T=stopped, first_step=s + 1, **call), states[-1])
        assert torch.equal(sampler(**call), states[-1])


def test_a_part_in_the_middle() -> None:
    kind: dict[str, Any] = {"shape": SHAPE, "eta": 1.0, "schedule": LINEAR}
    sampler = Sampler(elementwise_model, 6, **kind)
    states = sampler(seed=1, return_trajectory=True)
    calls: list[Any] = []

    def callback(s: int, t: int, x_t: Tensor, x_0: Tensor) -> Any:
        calls.append((s, t, x_t))
        return STOP if s == 3 else None

    part = sampler(seed=1, x_T=states[2], first_step=2, callback=callback, return_trajectory=True)
    assert torch.equal(part, states[2:5])
    assert [call[:2] for call in calls] == [(s, sampler.plan.timesteps[s].item()) for s in (2, 3)]
    assert all(torch.equal(x_t, states[s + 1]) for s, _, x_t in calls)


@pytest.mark.parametrize("each", [False, True], ids=["one", "one a sample"])
def test_generators_draw_on(each: bool) -> None:
    def generators() -> Any:
        made = [torch.Generator().manual_seed(s) for s in range(SHAPE[0])]
        return made if each else made[0]

    common: dict[str, Any] = {"shape": SHAPE, "eta": 1.0, "schedule": LINEAR}
    whole = fastddim.sample(elementwise_model, S, noise=generators(), **common)
    noise = generators()
    part = fastddim.sample(elementwise_model, S, noise=noise, callback=stopping(1), **common)
    rest = fastddim.sample(elementwise_model, S, noise=noise, x_T=part, first_step=2, **common)
    assert torch.equal(rest, whole)


def test_known_data_are_mixed_with_the_latents_of_the_seed() -> None:
    """Known data are mixed with the latents of the seed: with all of it known, each state is the
    data at its noise level.
    """
    known, common = draws(*SHAPE, seed=2), {"shape": SHAPE, "schedule": LINEAR}
    given: dict[str, Any] = {"mask": torch.ones(1), "known": known, "seed": 7, **common}
    states = fastddim.sample(
        elementwise_model, S, x_T=draws(*SHAPE), first_step=1, return_trajectory=True, **given
    )
    expected = fastddim.sample(elementwise_model, S, return_trajectory=True, **given)
    torch.testing.assert_close(states[1:], expected[2:])


def test_inversion_stops() -> None:
    x_0 = draws(*SHAPE)
    states = fastddim.invert(elementwise_model, x_0, S, return_trajectory=True)
    for order in (1, 2):
        states = fastddim.invert(elementwise_model, x_0, S, order=order, return_trajectory=True)
        stopped = fastddim.invert(elementwise_model, x_0, S, order=order, callback=stopping(1))
        assert torch.equal(stopped, states[2])


@pytest.mark.parametrize("result", [None, True, "stop", 0, fastddim.stopping.Stop], ids=repr)
def test_other_results_of_a_callback_do_not_stop(result: Any) -> None:
    kind: dict[str, Any] = {"shape": SHAPE, "seed": 1}
    own = fastddim.sample(elementwise_model, S, callback=lambda *_: result, **kind)
    assert torch.equal(own, fastddim.sample(elementwise_model, S, **kind))


def test_the_bar_of_a_run_that_stops_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    kind: dict[str, Any] = {"shape": SHAPE, "seed": 1, "progress": True}
    x = fastddim.sample(elementwise_model, S, callback=stopping(1), **kind)
    shown = capsys.readouterr().err
    assert f"2/{S}" in shown
    assert shown.endswith("\n")
    fastddim.sample(elementwise_model, S, x_T=x, first_step=2, **kind)
    shown = capsys.readouterr().err
    assert f"2/{S}" in shown
    assert f"{S}/{S}" in shown


def test_stop_is_one_of_its_kind() -> None:
    assert repr(STOP) == str(STOP) == "fastddim.STOP"
    copies = (copy.copy(STOP), copy.deepcopy(STOP), pickle.loads(pickle.dumps(STOP)))
    assert all(other is STOP for other in copies)


def test_a_late_state_that_is_given_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastddim.sample(
            elementwise_model, [90, 50, 3], x_T=draws(*SHAPE), schedule=LINEAR, first_step=1
        )


def test_generate_writes_whole_samples(tmp_path: Path) -> None:
    kind: dict[str, Any] = {"stop": 2, "shape": SHAPE, "model_id": "model", "progress": False}
    kind |= {"format": "safetensors", "schedule": LINEAR}
    with pytest.raises(ValueError, match=r"^callback: expected .*, got fastddim\.STOP at step 1$"):
        fastddim.generate(elementwise_model, S, tmp_path / "run", callback=stopping(1), **kind)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    seen: list[int] = []
    fastddim.generate(
        elementwise_model,
        S,
        tmp_path / "run",
        callback=lambda s, *_: seen.append(s),
        **kind,
    )
    assert seen == list(range(S))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": (
        {"first_step": -1},
        ValueError,
        "first_step: expected an integer in [0, 3], got -1",
    ),
    "past the end": (
        {"first_step": 4, "x_T": draws(*SHAPE)},
        ValueError,
        "first_step: expected an integer in [0, 3], got 4",
    ),
    "bool": ({"first_step": True}, TypeError, "first_step: expected an integer, got True (bool)"),
    "float": ({"first_step": 1.0}, TypeError, "first_step: expected an integer, got 1.0 (float)"),
    "no state": (
        {"first_step": 2},
        ValueError,
        "x_T: expected the state before step 2, the first_step, got None",
    ),
    "order 2": (
        {"first_step": 1, "x_T": draws(*SHAPE), "order": 2},
        ValueError,
        "first_step: expected 0 at order 2 and with tuned steps, which read the epsilon of the "
        "step before, got 1",
    ),
    "tuned": (
        {"steps": random_steps(S), "first_step": 1, "x_T": draws(*SHAPE)},
        ValueError,
        "first_step: expected 0 at order 2 and with tuned steps, which read the epsilon of the "
        "step before, got 1",
    ),
    "known without a seed": (
        {"first_step": 1, "x_T": draws(*SHAPE), "mask": torch.ones(1), "known": draws(*SHAPE)},
        ValueError,
        "seed: expected that of the whole run with mask and first_step=1, since known data are "
        "mixed with its latents, got None",
    ),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(given: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"steps": S, "shape": SHAPE, "schedule": LINEAR, **given}
    with pytest.raises(error) as raised:
        fastddim.sample(elementwise_model, **given)
    assert str(raised.value) == message
    with pytest.raises(error) as raised:
        make_fx(lambda x: fastddim.sample(elementwise_model, **given) + x)(torch.zeros(SHAPE))
    assert str(raised.value) == message


def compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)


WAYS: dict[str, Callable[..., Any]] = {
    "compile": compiled,
    "jit.trace": lambda call, x: torch.jit.trace(call, (x,), check_trace=False),
    "make_fx": lambda call, x: make_fx(call)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_programs(call: dict[str, Any], way: str) -> None:
    sampler = Sampler(elementwise_model, S, shape=SHAPE, eta=1.0, schedule=LINEAR)
    states = sampler(return_trajectory=True, **call)

    def rest(x: Tensor) -> Tensor:
        return sampler(x_T=x, first_step=2, return_trajectory=True, **call)

    own = WAYS[way](rest, torch.zeros(SHAPE))
    assert torch.equal(own(states[2]), states[2:])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_sampler_shows_what_it_is(impl: str) -> None:
    sampler = Sampler(
        SmallNet(),
        10,
        shape=SHAPE,
        eta=[1.0] * 9 + [0.0],
        guidance_scale=torch.tensor([1.0, 2.0]),
        prediction="v_prediction",
        schedule=LINEAR,
        dtype=torch.float64,
        impl=impl,
    )
    expected = (
        "Sampler(SmallNet, shape=(2, 3, 4, 4), steps=10 (999 to 99, trailing), eta=1.0 to 0.0, "
        "guidance_scale=tensor [2], prediction='v_prediction', dtype=torch.float64, device='cpu', "
        f"impl='{impl}', graph='auto')"
    )
    assert repr(sampler) == expected
    assert repr(copy.deepcopy(sampler)) == expected
    assert repr(pickle.loads(pickle.dumps(sampler))) == expected
    assert repr(Sampler(elementwise_model, [9, 3], shape=(1, 2), impl=impl, graph=False)) == (
        "Sampler(elementwise_model, shape=(1, 2), steps=2 (9 to 3, given), eta=0.0, "
        f"dtype=torch.float32, device='cpu', impl='{impl}', graph=False)"
    )
    tuned = Sampler(elementwise_model, random_steps(S), shape=(1, 2), impl=impl)
    assert f"steps=4 ({tuned.plan.timesteps[0]} to {tuned.plan.timesteps[-1]}, tuned)" in repr(
        tuned
    )


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_a_stream_shows_what_it_is_doing(impl: str) -> None:
    stream = fastddim.Stream(SmallNet(), shape=SHAPE, impl=impl, schedule=LINEAR)
    for _ in range(5):
        stream.submit(3, seed=1)
    stream.step()
    assert repr(stream) == (
        "Stream(SmallNet, shape=(2, 3, 4, 4), running=2, pending=3, dtype=torch.float32, "
        f"device='cpu', impl='{impl}', graph='auto')"
    )
