"""Conditions of each sample, and guidance by them: `model_kwargs`, `uncond_kwargs`, `uncond_model`.

The expectation is the paper's loop in float64 with both halves put together by hand.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

import fastddim
from fastddim import Sampler, Schedule, Stream
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.pool import POOL
from fastddim.loop.rows import Rows

from .support.models import SmallNet, elementwise_model
from .support.paper import ddim_sample, guided, linear_alphas
from .support.products import in_turns
from .support.recorded_graph import RecordedGraph, recorded_graphs

STEPS = [900, 500, 140, 3]
SHAPE = (2, 4, 4)
G = 2.5
NULL = 10
LINEAR = Schedule.linear()

Arguments = dict[str, Any]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


def of_each(value: Tensor, x: Tensor) -> Tensor:
    """One number for each sample, from its row."""
    assert len(value) == len(x), "a row for each sample"
    return value.to(x.dtype).flatten(1).mean(1) if value.ndim > 1 else value.to(x.dtype)


def network(
    x: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    text: Tensor | None = None,
    added: dict[str, Any] | None = None,
    residuals: list[Tensor] | tuple[Tensor, ...] = (),
    ragged: list[Tensor] | None = None,
    scale: Any = 1.0,
    name: str = "none",
) -> Tensor:
    """A network in which every argument has its own effect on each sample, with rounding that no
    batch changes.
    """
    assert ragged is None or [len(part) for part in ragged] == [7, 5]
    values = [] if y is None else [of_each(y, x) / 16]
    values += [] if text is None else [of_each(text, x)]
    values += [] if added is None else [of_each(added["text"], x), -of_each(added["ids"], x) / 4]
    values += [of_each(each, x) / (2 + i) for i, each in enumerate(residuals)]
    output = elementwise_model(x, t)
    for value in values:
        output = output + 0.125 * value.reshape(-1, *[1] * (x.ndim - 1))
    return output * scale + (0.25 if name == "shifted" else 0.0)


def rows(*shape: int, seed: int = 0) -> Tensor:
    # Multiples of 1/64, so that means over them are exact.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 64, shape, generator=generator).double() / 64


def latents(batch: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *SHAPE), generator=generator, dtype=torch.float64)


class Case:
    """Arguments as a user gives them, and those of both halves by hand."""

    def __init__(self, given: Arguments, other: Arguments, halves: list[Arguments]) -> None:
        self.guided = {"guidance_scale": G, "model_kwargs": given, "uncond_kwargs": other}
        self.halves = halves

    def by_hand(self, x: np.ndarray, t: int) -> np.ndarray:
        state = torch.from_numpy(x)
        time = torch.full((len(x),), t)
        return guided(
            np.concatenate([network(state, time, **half).numpy() for half in self.halves]), G
        )

    @property
    def doubled(self) -> Arguments:
        """Both halves in one batch, built by hand."""

        def stacked(u: Any, c: Any) -> Any:
            if isinstance(c, dict):
                return {name: stacked(u[name], c[name]) for name in c}
            return torch.cat([u, c]) if isinstance(c, Tensor) else c

        kwargs = {name: stacked(self.halves[0][name], c) for name, c in self.halves[1].items()}
        return {"guidance_scale": G, "model_kwargs": kwargs}


def labels(batch: int, null: Any) -> Case:
    y = torch.arange(batch)
    return Case({"y": y}, {"y": null}, [{"y": torch.full((batch,), NULL)}, {"y": y}])


def texts(batch: int, of_condition: int, of_null: int) -> Case:
    text, null = rows(of_condition, 3, 4), rows(of_null, 3, 4, seed=1)
    whole = [value.expand(batch, 3, 4) for value in (null, text)]
    return Case({"text": text}, {"text": null}, [{"text": value} for value in whole])


def nested(batch: int) -> Case:
    """Values of many kinds, of which one has another value in the unconditional half."""
    text, ids, null = rows(batch, 5), rows(1, 2), rows(1, 5, seed=2)
    same = {
        "ragged": [torch.ones(7, 2), torch.ones(5, 2)],
        "scale": torch.tensor(0.5),
        "name": "shifted",
    }
    halves = [
        {"added": {"text": value.expand(batch, 5), "ids": ids.expand(batch, 2)}, **same}
        for value in (null, text)
    ]
    return Case({"added": {"text": text, "ids": ids}, **same}, {"added": {"text": null}}, halves)


def sequences(batch: int) -> Case:
    given = [rows(batch, 3), rows(batch, 2, seed=1)]
    halves = [
        {"residuals": [torch.full((batch, 3), 0.5, dtype=torch.float64), given[1]]},
        {"residuals": given},
    ]
    return Case({"residuals": given}, {"residuals": [0.5]}, halves)


CASES: dict[str, Callable[[int], Case]] = {
    "a number": lambda batch: labels(batch, NULL),
    "a tensor without dimensions": lambda batch: labels(batch, torch.tensor(NULL)),
    "one row": lambda batch: labels(batch, torch.tensor([NULL])),
    "B rows": lambda batch: labels(batch, torch.full((batch,), NULL)),
    "one row for all": lambda batch: texts(batch, 1, 1),
    "one row and B": lambda batch: texts(batch, 1, batch),
    "nested": nested,
    "a list": sequences,
}

KIND: Arguments = {"schedule": LINEAR, "dtype": torch.float64}


def by_sample(case: Case, x: Tensor) -> Tensor:
    return fastddim.sample(network, STEPS, x_T=x, **case.guided, **KIND)


def by_two_models(case: Case, x: Tensor) -> Tensor:
    other = functools.partial(network)
    return fastddim.sample(network, STEPS, x_T=x, uncond_model=other, **case.guided, **KIND)


def by_sampler(case: Case, x: Tensor) -> Tensor:
    return Sampler(network, STEPS, shape=x.shape, **case.guided, **KIND)(x_T=x)


def in_one_graph(case: Case, x: Tensor) -> Tensor:
    return Sampler(network, STEPS, shape=x.shape, graph="loop", **case.guided, **KIND)(x_T=x)


def by_stream(case: Case, x: Tensor) -> Tensor:
    stream = Stream(network, shape=(2, *SHAPE), guided=True, max_steps=4, **KIND)
    return _streamed(stream, case, x)


def by_stream_of_two_models(case: Case, x: Tensor) -> Tensor:
    other = functools.partial(network)
    kind: Arguments = {"shape": (2, *SHAPE), "guided": True, "max_steps": 4, **KIND}
    return _streamed(Stream(network, uncond_model=other, **kind), case, x)


def _streamed(stream: Stream, case: Case, x: Tensor) -> Tensor:
    def row(value: Any, i: int) -> Any:
        if isinstance(value, dict):
            return {name: row(each, i) for name, each in value.items()}
        if isinstance(value, list):
            return [row(each, i) for each in value]
        many = isinstance(value, Tensor) and value.ndim and len(value) > 1
        return value[i : i + 1] if many else value

    tickets = [
        stream.submit(STEPS, x_T=x[i : i + 1], **{k: row(v, i) for k, v in case.guided.items()})
        for i in range(len(x))
    ]
    stream.run()
    return torch.cat([ticket.result(0) for ticket in tickets])


ENTRIES: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "sample": by_sample,
    "sample, two models": by_two_models,
    "Sampler": by_sampler,
    "Sampler, one graph": in_one_graph,
    "Stream": by_stream,
    "Stream, two models": by_stream_of_two_models,
}


class TestEqualsTheLoopByHand:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(
        ("entry", "case"),
        # Requests of a stream have no tensors without rows.
        [(e, c) for e in ENTRIES for c in CASES if not ("Stream" in e and c == "nested")],
    )
    def test_samples(self, entry: str, case: str, batch: int, request: Any) -> None:
        if "graph" in entry:
            request.getfixturevalue("captures")
        given, x = CASES[case](batch), latents(batch)
        own = ENTRIES[entry](given, x)
        expected = ddim_sample(given.by_hand, x.numpy(), STEPS, linear_alphas())
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("models", [1, 2])
    def test_inversion(self, models: int, case: str, batch: int) -> None:
        given, x = CASES[case](batch), latents(batch)
        kind = {**given.guided, "schedule": LINEAR}
        if models == 2:
            kind["uncond_model"] = functools.partial(network)
        own = fastddim.invert(network, x, STEPS, **kind)
        expected, alphas, a = x.numpy(), linear_alphas(), 1.0
        for t in reversed(STEPS):
            m, p = given.by_hand(expected, t), alphas[t]
            x_0 = (expected - np.sqrt(1 - a) * m) / np.sqrt(a)
            expected, a = np.sqrt(p) * x_0 + np.sqrt(1 - p) * m, p
        np.testing.assert_allclose(own.numpy(), expected, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_without_guidance(self, batch: int) -> None:
        """Without guidance one row is given as B rows."""
        seen = []

        def model(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            seen.append(text)
            return network(x, t, text=text)

        text = rows(1, 3, 4)
        own = fastddim.sample(model, STEPS, x_T=latents(batch), model_kwargs={"text": text})
        expected = fastddim.sample(
            network, STEPS, x_T=latents(batch), model_kwargs={"text": text.expand(batch, 3, 4)}
        )
        assert torch.equal(own, expected)
        assert all(value.shape == (batch, 3, 4) for value in seen)
        assert (seen[0] is text) == (batch == 1)


def darker(x_0: Tensor, t: Tensor) -> Tensor:
    return x_0.mul_(0.5)


OPTIONS: dict[str, Arguments] = {
    "g of each sample": {"guidance_scale": torch.tensor([0.5, 2.0, 7.0])},
    "g of each step": {"guidance_scale": [1.0, 2.0, 3.0, 4.0]},
    "rescaled": {"guidance_rescale": 0.7},
    "order 2": {"order": 2},
    "x_0 by a function": {"denoised_fn": darker},
    "x_0 by a function, rescaled": {"denoised_fn": darker, "guidance_rescale": 0.7},
    "noise": {"eta": 1.0, "clip": 1.5, "seed": 7, "x_T": None, "shape": (3, *SHAPE)},
    "thresholding": {"dynamic_thresholding_ratio": 0.9},
    "float32": {"dtype": torch.float32, "x_T": None, "shape": (3, *SHAPE), "seed": 1},
    "model in float64": {"model_dtype": torch.float64, "dtype": torch.float32, "x_T": None}
    | {"shape": (3, *SHAPE), "seed": 1},
    "model in float16": {"model_dtype": torch.float16},
    "mask": {"mask": torch.ones(4, 1).bool(), "known": latents(3, seed=5)},
    "trajectory": {"return_trajectory": True},
    "reference": {"impl": "reference"},
    "finite": {"check_finite": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_three_ways_give_the_same(option: str) -> None:
    """Three ways give the same: halves doubled by hand, stacked here, and by two models."""
    case = labels(3, NULL)
    kind = {"x_T": latents(3), **KIND, **OPTIONS[option]}

    def drawn(given: Arguments, **more: Any) -> Tensor:
        return fastddim.sample(network, STEPS, **{**given, **kind, **more})

    expected = drawn(case.doubled)
    assert torch.equal(drawn(case.guided), expected)
    assert torch.equal(drawn(case.guided, uncond_model=functools.partial(network)), expected)


@pytest.mark.parametrize("refine", [0, 2])
def test_inversion_in_three_ways(refine: int) -> None:
    case = labels(3, NULL)
    kind = {"refine": refine, "guidance_rescale": 0.5, "schedule": LINEAR}
    expected = fastddim.invert(network, latents(3), STEPS, **case.doubled, **kind)
    other = functools.partial(network)
    for more in ({}, {"uncond_model": other}):
        own = fastddim.invert(network, latents(3), STEPS, **case.guided, **kind, **more)
        assert torch.equal(own, expected)


REFUSED: list[tuple[Arguments, str]] = [
    ({"model_kwargs": {"y": torch.zeros(2)}}, "model_kwargs['y']: expected a tensor [3, ...] or ["),
    ({"model_kwargs": {"y": torch.zeros(6)}}, "model_kwargs['y']: expected a tensor [3, ...] or ["),
    (
        {"model_kwargs": {"a": {"b": [torch.zeros(4)]}}},
        "model_kwargs['a']['b'][0]: expected a tensor [3, ...] or [1, ...], got shape (4,)",
    ),
    *[
        (
            {"model_kwargs": {"y": torch.zeros(count)}, "guidance_scale": 2.0},
            "model_kwargs['y']: expected a tensor [3, ...] or [1, ...] under guidance where "
            "uncond_kwargs={'y': ...} gives the unconditional value, or a tensor [6, ...] that has "
            f"it in its first half, got shape ({count},)",
        )
        for count in (1, 3, 4)
    ],
    (
        {"model_kwargs": {"y": torch.zeros(6)}, "uncond_kwargs": {"y": 1}, "guidance_scale": 2.0},
        "model_kwargs['y']: expected a tensor [3, ...] or [1, ...], got shape (6,)",
    ),
    ({"uncond_kwargs": {"y": 1}}, "uncond_kwargs: expected None without guidance_scale, got"),
    ({"uncond_kwargs": 3}, "uncond_kwargs: expected a mapping of names to values, got 3"),
    ({"uncond_model": network}, "uncond_model: expected None without guidance, got function"),
    (
        {"uncond_model": 3, "guidance_scale": 2.0},
        "uncond_model: expected a callable model(x, t), got int",
    ),
    (
        {"uncond_model": SmallNet(2).double(), "guidance_scale": 2.0},
        "uncond_model: expected a model that reads torch.float32 like the other one, got one that",
    ),
    (
        {"uncond_model": SmallNet(2).to("meta"), "guidance_scale": 2.0},
        "device: expected the device that the model computes on, since its parameters are on meta",
    ),
]
LABELS, FLOATS = {"y": torch.arange(3)}, {"y": torch.zeros(3, 2)}
REFUSED += [
    (
        {"model_kwargs": given, "uncond_kwargs": {"y": other}, "guidance_scale": 2.0},
        f"uncond_kwargs['y']: expected {message}",
    )
    for given, other, message in [
        (LABELS, 1.0, "a tensor or a number of torch.int64, got 1.0 (float)"),
        (LABELS, True, "a tensor or a number of torch.int64, got True (bool)"),
        (LABELS, None, "a tensor or a number of torch.int64, got None (NoneType)"),
        (LABELS, 2**63, "a tensor or a number of torch.int64, got 9223372036854775808 (int)"),
        ({"y": torch.zeros(3, dtype=torch.bool)}, 1, "a tensor or a number of torch.bool, got 1"),
        (FLOATS, False, "a tensor or a number of torch.float32, got False (bool)"),
        (FLOATS, 1e39, "a tensor or a number of torch.float32, got 1e+39 (float)"),
        (FLOATS, "0", "a tensor or a number of torch.float32, got '0' (str)"),
        (FLOATS, torch.zeros(3, 2).double(), "dtype torch.float32, got torch.float64"),
        (FLOATS, torch.zeros(6, 2), "a tensor [3, ...] or [1, ...], got shape (6, 2)"),
        (FLOATS, torch.zeros(1, 3), "shape [3, 2] like model_kwargs['y'], got (1, 3)"),
        (FLOATS, torch.zeros(3), "shape [3, 2] like model_kwargs['y'], got (3,)"),
        (FLOATS, torch.zeros(1, 2, device="meta"), "the device of model_kwargs['y'], cpu, got me"),
        ({"y": "cat"}, "dog", "no value, since model_kwargs['y'] is no tensor with a row for"),
        ({"y": torch.tensor(1)}, 2, "no value, since model_kwargs['y'] is no tensor with a row"),
    ]
]
REFUSED += [
    (
        {"model_kwargs": LABELS, "uncond_kwargs": {"z": 1}, "guidance_scale": 2.0},
        "uncond_kwargs['z']: expected a name in model_kwargs, ['y'], got ['z']",
    ),
    (
        {"uncond_kwargs": {"z": 1}, "guidance_scale": 2.0},
        "uncond_kwargs['z']: expected a name in model_kwargs, none, got ['z']",
    ),
]


def untouched(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    raise AssertionError("called")


class TestRefused:
    @pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda v: str(v)[:0] or None)
    def test_before_any_work(self, given: Arguments, message: str) -> None:
        x = torch.zeros(3, *SHAPE)
        calls: list[Callable[[], object]] = [
            lambda: fastddim.sample(untouched, 3, x_T=x, **given),
            lambda: Sampler(untouched, 3, shape=x.shape, **given),
            lambda: fastddim.invert(untouched, x, 3, **given),
        ]
        for call in calls:
            with pytest.raises((TypeError, ValueError), match=re.escape(message)):
                call()

    def test_one_row_of_one_sample(self) -> None:
        """One row of one sample: a single label used to be broadcast over both halves, and guidance
        did nothing.
        """
        with pytest.raises(
            ValueError, match=re.escape("uncond_kwargs={'y': ...} gives the uncond")
        ):
            fastddim.sample(
                untouched,
                3,
                shape=(1, *SHAPE),
                guidance_scale=7.5,
                model_kwargs={"y": torch.tensor([3])},
            )

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"model_kwargs": {"y": torch.zeros(1)}},
                "model_kwargs['y']: expected a tensor [1, ..",
            ),
            (
                {"model_kwargs": {"y": torch.zeros(3)}},
                "model_kwargs['y']: expected a tensor [1, ..",
            ),
            ({"uncond_kwargs": {"y": 1}}, "uncond_kwargs['y']: expected a name in model_kwargs"),
            (
                {"model_kwargs": {"y": torch.zeros(2)}, "uncond_kwargs": {"y": 1}},
                "model_kwargs['y']: expected a tensor [1, ...], got shape (2,)",
            ),
        ],
    )
    def test_in_a_stream(self, given: Arguments, message: str) -> None:
        stream = Stream(untouched, shape=(2, *SHAPE), guided=True)
        with pytest.raises(ValueError, match=re.escape(message)):
            stream.submit(3, guidance_scale=2.0, **given)
        assert stream.pending == 0

    def test_of_a_stream(self) -> None:
        with pytest.raises(ValueError, match="uncond_model: expected None without guidance"):
            Stream(untouched, shape=(2, *SHAPE), uncond_model=untouched)
        stream = Stream(untouched, shape=(2, *SHAPE))
        with pytest.raises(ValueError, match="uncond_kwargs: expected None without guidance_scale"):
            stream.submit(3, model_kwargs={"y": torch.zeros(1)}, uncond_kwargs={"y": 1})


def test_a_stream_takes_both_kinds_of_requests() -> None:
    """A stream takes both kinds of requests: a pair of rows by hand, and a value without the
    condition.
    """
    stream = Stream(network, shape=(2, *SHAPE), guided=True, **KIND)
    x, pair = latents(1), torch.tensor([NULL, 3])
    kind = {"guidance_scale": G, "x_T": x}
    first = stream.submit(STEPS, model_kwargs={"y": pair}, **kind)
    second = stream.submit(STEPS, model_kwargs={"y": pair[1:]}, uncond_kwargs={"y": NULL}, **kind)
    stream.run()
    assert torch.equal(first.result(0), second.result(0))


class TestCallsOfASampler:
    @pytest.mark.parametrize("mode", [False, True, "loop"])
    def test_values_of_one_call(self, mode: Any, captures: list[RecordedGraph]) -> None:
        before = [labels(3, NULL), texts(3, 3, 1), texts(3, 1, 1)]
        for case in before:
            given, other = case.guided["model_kwargs"], case.guided["uncond_kwargs"]
            kept = copy.deepcopy((given, other))
            sampler = Sampler(network, STEPS, shape=(3, *SHAPE), graph=mode, **case.guided, **KIND)
            count = len(captures)

            def expected(given: Arguments, other: Arguments) -> Tensor:
                kind = {"guidance_scale": G, "model_kwargs": given, "uncond_kwargs": other}
                return fastddim.sample(network, STEPS, x_T=latents(3), graph=False, **kind, **KIND)

            first = expected(given, other)
            calls = []
            for name, value in given.items():
                new = {name: value.flip(0) + 1}
                one = {name: value[:1] + 2}
                null = {name: 1 if name == "y" else 0.5}
                calls += [({}, {}), (new, {}), (one, {}), ({}, null), (new, null), ({}, new)]
            results = []
            for new, null in calls:
                more = {"model_kwargs": new or None, "uncond_kwargs": null or None}
                own = sampler(x_T=latents(3), **more)
                assert torch.equal(own, expected({**given, **new}, {**other, **null}))
                assert torch.equal(sampler(x_T=latents(3)), first)
                results.append(own)
            assert len({tuple(own.flatten().tolist()) for own in results}) == len(calls)
            assert len(captures) - count == (0 if mode is False else 1)
            assert all(torch.equal(kept[0][name], given[name]) for name in given)

    def test_observations(self, captures: list[RecordedGraph]) -> None:
        """Observations without guidance may be passed, written in place, or be one for all."""
        text = rows(2, 3)
        seen = []

        def policy(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            seen.append(text)
            return network(x, t, text=text)

        for mode in (False, True):
            sampler = Sampler(
                policy, 3, shape=(2, *SHAPE), model_kwargs={"text": text}, graph=mode, **KIND
            )
            results = []
            for new in (rows(2, 3, seed=4), rows(1, 3, seed=5), rows(3, 2, seed=6).mT[:2]):
                own = sampler(seed=1, model_kwargs={"text": new})
                kind = {"shape": (2, *SHAPE), "seed": 1, "graph": False, **KIND}
                assert torch.equal(
                    own, fastddim.sample(network, 3, model_kwargs={"text": new}, **kind)
                )
                results.append(own)
            text.copy_(rows(2, 3, seed=4))
            assert torch.equal(sampler(seed=1), results[0])
            text.copy_(rows(2, 3))
            assert mode or seen[-1] is text
        assert len(captures) == 1

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"z": 1}, "model_kwargs['z']: expected a name in model_kwargs, ['y'], ['n']"),
            ({"y": 3}, "model_kwargs['y']: expected a tensor, got 3 (int)"),
            ({"y": torch.zeros(2, 3)}, "model_kwargs['y']: expected shape [B, 4] as when the Sam"),
            ({"y": torch.zeros(2)}, "model_kwargs['y']: expected shape [B, 4] as when the Sampler"),
            ({"y": torch.zeros(3, 4)}, "model_kwargs['y']: expected a tensor [2, ...] or [1, ...]"),
            ({"y": torch.zeros(4, 4)}, "model_kwargs['y']: expected a tensor [2, ...] or [1, ...]"),
            ({"y": torch.zeros(2, 4).double()}, "model_kwargs['y']: expected dtype torch.float32"),
            ({"y": torch.zeros(2, 4, device="meta")}, "model_kwargs['y']: expected the device of"),
            (
                {"n": 2},
                "model_kwargs['n']: expected 1 as when the Sampler was made, since only ten",
            ),
            (3, "model_kwargs: expected a mapping of names to values, got 3"),
        ],
    )
    def test_other_kinds_are_refused(self, given: Any, message: str) -> None:
        kwargs = {"y": torch.zeros(2, 4), "n": 1}
        sampler = Sampler(
            lambda x, t, y, n: 0.5 * x, 3, shape=(2, *SHAPE), model_kwargs=kwargs, **KIND
        )
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            sampler(model_kwargs=given)
        with pytest.raises(ValueError, match="uncond_kwargs: expected None, as when the"):
            sampler(uncond_kwargs={"y": 1})
        assert torch.equal(sampler(seed=1, model_kwargs={"n": 1}), sampler(seed=1))

    def test_pairs_by_hand(self) -> None:
        first, second = labels(3, NULL), labels(3, NULL)
        sampler = Sampler(network, STEPS, shape=(3, *SHAPE), **first.doubled, **KIND)
        pair = second.doubled["model_kwargs"]["y"].flip(0)
        own = sampler(x_T=latents(3), model_kwargs={"y": pair})
        kind = {"guidance_scale": G, "model_kwargs": {"y": pair}, **KIND}
        assert torch.equal(own, fastddim.sample(network, STEPS, x_T=latents(3), **kind))
        with pytest.raises(
            ValueError, match=re.escape("or a tensor [6, ...] that has it in its f")
        ):
            sampler(model_kwargs={"y": pair[:3]})

    def test_a_list_stays_one_of_rows(self) -> None:
        """One row in a list of B rows does not make it ragged."""
        case = sequences(3)
        sampler = Sampler(network, STEPS, shape=(3, *SHAPE), **case.guided, **KIND)
        own = sampler(x_T=latents(3), model_kwargs={"residuals": [rows(1, 3, seed=8)]})
        given = [rows(1, 3, seed=8).expand(3, 3), case.guided["model_kwargs"]["residuals"][1]]
        expected = sampler(x_T=latents(3), model_kwargs={"residuals": given})
        assert torch.equal(own, expected)


class Weak(SmallNet):
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        output = super().forward(x, t)
        return output if y is None else output + y.to(x.dtype).reshape(-1, 1, 1, 1) / 16


class Pair(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.net, self.weak = Weak(2), Weak(2, seed=1)
        self.sampler = Sampler(
            self.net,
            3,
            shape=(2, *SHAPE),
            guidance_scale=G,
            uncond_model=self.weak,
            model_kwargs={"y": torch.tensor([1, 2])},
            **kind,
        )


class TestTwoModels:
    def test_both_get_the_same_batch(self) -> None:
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def watched(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append((x.clone(), t.clone(), y.clone()))
            return 0.5 * x

        kind = {"guidance_scale": G, "uncond_model": functools.partial(watched)}
        kind |= {"model_kwargs": {"y": torch.tensor([1, 2])}, "uncond_kwargs": {"y": 0}}
        fastddim.sample(watched, 2, shape=(2, *SHAPE), **kind)
        assert len(seen) == 4
        for (x, t, null), (same_x, same_t, y) in (seen[:2], seen[2:]):
            assert x.shape == (2, *SHAPE)
            assert torch.equal(x, same_x)
            assert torch.equal(t, same_t)
            assert null.tolist() == [0, 0]
            assert y.tolist() == [1, 2]

    def test_learned_variance(self) -> None:
        wide, narrow = Weak(2, outputs=4), Weak(2, outputs=4, seed=1)
        kind = {"shape": (2, *SHAPE), "guidance_scale": G, "seed": 1}
        own = fastddim.sample(wide, 3, uncond_model=narrow, **kind)
        expected = fastddim.sample(
            lambda x, t: wide(x, t)[:, :2], 3, uncond_model=lambda x, t: narrow(x, t)[:, :2], **kind
        )
        assert torch.equal(own, expected)
        with pytest.raises(
            ValueError, match="uncond_model output: expected shape and dtype of the"
        ):
            fastddim.sample(Weak(2), 3, uncond_model=narrow, **kind)

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (
                lambda x, t: x[:1],
                "uncond_model output: expected shape (2, 2, 4, 4) or (2, 4, 4, 4),",
            ),
            (lambda x, t: x.double(), "uncond_model output: expected shape and dtype of the model"),
            (lambda x, t: 3, "uncond_model: expected it to return a tensor, a tuple that starts"),
        ],
        ids=["shape", "dtype", "type"],
    )
    def test_outputs_that_are_refused(self, output: Any, message: str) -> None:
        kind = {"shape": (2, *SHAPE), "guidance_scale": G}
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            fastddim.sample(Weak(2), 3, uncond_model=output, **kind)

    def test_one_network_that_returns_its_own_memory(self) -> None:
        memory = torch.zeros(2, *SHAPE)

        def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return memory.copy_(x * y.reshape(-1, 1, 1, 1) / 8)

        kind = {"shape": (2, *SHAPE), "guidance_scale": G, "seed": 1, "uncond_kwargs": {"y": 1.0}}
        kind |= {"model_kwargs": {"y": torch.tensor([2.0, 3.0])}}
        own = fastddim.sample(model, 3, uncond_model=functools.partial(model), **kind)
        expected = fastddim.sample(lambda x, t, y: x * y.reshape(-1, 1, 1, 1) / 8, 3, **kind)
        assert torch.equal(own, expected)

    def test_outputs_that_are_the_state(self) -> None:
        kind = {"shape": (2, *SHAPE), "guidance_scale": G, "seed": 1}
        own = fastddim.sample(lambda x, t: x, 3, uncond_model=lambda x, t: x[:], **kind)
        expected = fastddim.sample(
            lambda x, t: 1.0 * x, 3, uncond_model=lambda x, t: 1.0 * x, **kind
        )
        assert torch.equal(own, expected)

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_have_copies_of_both(self, way: Callable[[Pair], Pair]) -> None:
        pair = Pair()
        before = pair.sampler(seed=1)
        other = way(pair)
        assert torch.equal(other.sampler(seed=1), before)
        with torch.no_grad():
            pair.weak.bias.add_(1.0)
        assert not torch.equal(pair.sampler(seed=1), before)
        assert torch.equal(other.sampler(seed=1), before)
        with torch.no_grad():
            other.weak.bias.add_(1.0)
        assert torch.equal(other.sampler(seed=1), pair.sampler(seed=1))

    def test_a_sampler_shows_both(self) -> None:
        assert "guidance_scale=2.5, uncond_model=Weak, dtype" in repr(Pair().sampler)

    def test_converted_weights_are_refused(self) -> None:
        pair = Pair()
        pair.weak.half()
        with pytest.raises(
            ValueError, match="uncond_model: expected weights as they were when the"
        ):
            pair.sampler()
        weak = Weak(2)
        stream = Stream(Weak(2), shape=(2, *SHAPE), guided=True, uncond_model=weak)
        stream.submit(3, guidance_scale=G)
        weak.half()
        with pytest.raises(
            ValueError, match="uncond_model: expected weights as they were when the"
        ):
            stream.step()

    @pytest.mark.parametrize("mode", [True, "loop"])
    def test_graphs_follow_both(self, mode: Any, captures: list[RecordedGraph]) -> None:
        pair = Pair(graph=mode)
        eager = Pair(graph=False)
        assert torch.equal(pair.sampler(seed=1), eager.sampler(seed=1))
        for each in (pair, eager):
            each.weak.bias = nn.Parameter(each.weak.bias.detach() + 1.0)
        assert torch.equal(pair.sampler(seed=2), eager.sampler(seed=2))
        assert len(captures) == 2

    def test_kept_loops_are_of_both(self, captures: list[RecordedGraph]) -> None:
        net = Weak(2)
        kind = {"shape": (2, *SHAPE), "guidance_scale": G, "seed": 1}
        others = [lambda x, t, k=k: x * k for k in (0.25, 0.5)]
        eager = [fastddim.sample(net, 3, uncond_model=o, graph=False, **kind) for o in others]
        for _ in range(2):
            for other, expected in zip(others, eager, strict=True):
                own = fastddim.sample(net, 3, uncond_model=other, graph=True, **kind)
                assert torch.equal(own, expected)
        assert len(captures) == 2
        assert len(POOL) == 2
        others.clear()
        del other
        assert len(POOL) == 0

    def test_a_stream_finds_what_is_not_finite(self) -> None:
        def weak(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x / y.reshape(-1, 1, 1, 1)

        stream = Stream(
            lambda x, t, y: 0.5 * x,
            shape=(2, *SHAPE),
            guided=True,
            uncond_model=weak,
            check_finite=True,
        )
        kind = {"guidance_scale": G}
        bad = stream.submit(2, model_kwargs={"y": torch.tensor([0.0])}, **kind)
        good = stream.submit(2, model_kwargs={"y": torch.tensor([2.0])}, **kind)
        stream.run()
        with pytest.raises(ValueError, match="model output: expected finite values"):
            bad.result(0)
        assert good.result(0).isfinite().all()


def test_values_are_read_at_every_call(captures: list[RecordedGraph]) -> None:
    """Values are read at every call, and stacked anew, so that a change in place counts."""
    y, null = torch.tensor([1, 2, 3]), torch.tensor([NULL])
    kind: Arguments = {"guidance_scale": G, "shape": (3, *SHAPE), **KIND}
    for mode in (False, True):
        sampler = Sampler(
            network, STEPS, model_kwargs={"y": y}, uncond_kwargs={"y": null}, graph=mode, **kind
        )
        results = []
        for change in (lambda: None, lambda: y.add_(1), lambda: null.sub_(4)):
            change()
            own = sampler(x_T=latents(3))
            expected = fastddim.sample(
                network,
                STEPS,
                x_T=latents(3),
                model_kwargs={"y": torch.cat([null.expand(3), y])},
                guidance_scale=G,
                graph=False,
                **KIND,
            )
            assert torch.equal(own, expected)
            assert not any(torch.equal(own, other) for other in results)
            results.append(own)
    assert len(captures) == 1


def test_other_numbers_need_no_other_graph(captures: list[RecordedGraph]) -> None:
    for null in (1, 2, torch.tensor([3])):
        fastddim.sample(
            network,
            STEPS,
            x_T=latents(3),
            guidance_scale=G,
            model_kwargs={"y": torch.arange(3)},
            uncond_kwargs={"y": null},
            graph=True,
            **KIND,
        )
    assert len(captures) == 1


class Policy(nn.Module):
    """A network, sampled with an observation as an input of the program."""

    def __init__(self, sampled: str, models: int) -> None:
        super().__init__()
        self.net, self.sampled, self.models = Weak(2), sampled, models
        self.kind: Arguments = {"guidance_scale": G}
        if models == 2:
            self.weak = Weak(2, seed=1)
            self.kind["uncond_model"] = self.weak
        self.sampler = Sampler(
            self.net,
            3,
            shape=(2, *SHAPE),
            model_kwargs={"y": torch.zeros(2)},
            uncond_kwargs={"y": 7},
            schedule=LINEAR,
            **self.kind,
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        given = {"model_kwargs": {"y": y}}
        if self.sampled == "Sampler":
            return self.sampler(x_T=x, **given)
        kind = {**self.kind, **given, "uncond_kwargs": {"y": 7}, "schedule": LINEAR}
        if self.sampled == "invert":
            return fastddim.invert(self.net, x, 3, **kind)
        return fastddim.sample(self.net, 3, x_T=x, **kind)


SAMPLED = ("Sampler", "sample", "invert")


class TestPrograms:
    def given(self, batch: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((batch, *SHAPE), generator=generator)
        return x, torch.randn((rows,), generator=generator)

    @pytest.mark.parametrize(("sampled", "models", "count"), in_turns(2, SAMPLED, (1, 2), (1, 2)))
    def test_compiled(self, sampled: str, models: int, count: int) -> None:
        torch._dynamo.reset()
        policy = Policy(sampled, models)
        program = torch.compile(policy, backend="aot_eager", fullgraph=True)
        for seed in (1, 2):
            given = self.given(2, count, seed)
            assert torch.equal(program(*given), policy(*given))

    @pytest.mark.parametrize(
        ("sampled", "models", "count", "strict"),
        in_turns(2, SAMPLED, (1, 2), (1, 2), (False, True)),
    )
    def test_exported(self, sampled: str, models: int, count: int, strict: bool) -> None:
        policy = Policy(sampled, models)
        given = self.given(2, count, 0)
        program = torch.export.export(policy, given, strict=strict).module()
        for seed in (1, 2):
            given = self.given(2, count, seed)
            assert torch.equal(program(*given), policy(*given))

    @pytest.mark.parametrize("models", [1, 2])
    @pytest.mark.parametrize("sampled", SAMPLED)
    def test_exported_for_any_batch(self, sampled: str, models: int) -> None:
        policy = Policy(sampled, models)
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = {"x": {0: batch}, "y": {0: batch}}
        given = self.given(3, 3, 0)
        program = torch.export.export(policy, given, dynamic_shapes=shapes).module()
        for count in (2, 5):
            x, y = self.given(count, count, count)
            kind = {**policy.kind, "model_kwargs": {"y": y}, "uncond_kwargs": {"y": 7}}
            if sampled == "invert":
                expected = fastddim.invert(policy.net, x, 3, schedule=LINEAR, **kind)
            else:
                kind["schedule"] = LINEAR
                expected = fastddim.sample(policy.net, 3, x_T=x, **kind)
            assert torch.allclose(program(x, y), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("sampled", "models", "count"), in_turns(2, SAMPLED, (1, 2), (1, 2)))
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_jit(self, sampled: str, models: int, count: int) -> None:
        policy = Policy(sampled, models)
        program = torch.jit.trace(policy, self.given(2, count, 0), check_trace=False)
        for seed in (1, 2):
            given = self.given(2, count, seed)
            assert torch.equal(program(*given), policy(*given))

    @pytest.mark.parametrize(("sampled", "models"), in_turns(2, SAMPLED, (1, 2)))
    def test_wrong_rows(self, sampled: str, models: int) -> None:
        torch._dynamo.reset()
        program = torch.compile(Policy(sampled, models), backend="aot_eager")
        with pytest.raises(
            ValueError, match=re.escape("model_kwargs['y']: expected a tensor [2, ")
        ):
            program(*self.given(2, 3, 0))


@pytest.mark.parametrize("models", [1, 2])
def test_tuning(models: int) -> None:
    seen = set()

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.add((x.shape[0], tuple(label.tolist())))
        return x * (0.5 + 0.1 * label[:, None])

    kind: Arguments = {"shape": (4, 4), "guidance_scale": 2.0, "samples": 8, "progress": False}
    kind |= {"schedule": LINEAR, "teacher_steps": 20}
    label, null = torch.arange(4.0), -1.0
    more: Arguments = {} if models == 1 else {"uncond_model": functools.partial(model)}
    own = fastddim.tune(
        model, 2, model_kwargs={"label": label}, uncond_kwargs={"label": null}, **more, **kind
    )
    halves = [(-1.0,) * 4, (0.0, 1.0, 2.0, 3.0)]
    expected = {(8, halves[0] + halves[1])} if models == 1 else {(4, half) for half in halves}
    assert seen == expected
    pair = torch.cat([torch.full((4,), null), label])
    by_hand = fastddim.tune(model, 2, model_kwargs={"label": pair}, **kind)
    assert own.timesteps == by_hand.timesteps
    assert own.direction == by_hand.direction
    with pytest.raises(
        ValueError, match=re.escape("model_kwargs['label']: expected a tensor [4, ")
    ):
        fastddim.tune(model, 2, model_kwargs={"label": label[:3]}, **kind)
    with pytest.raises(ValueError, match="uncond_model: expected None without guidance"):
        fastddim.tune(model, 2, uncond_model=model, **(kind | {"guidance_scale": None}))


RUN: Arguments = {
    "stop": 5,
    "shape": (2, *SHAPE),
    "schedule": LINEAR,
    "model_id": "network",
    "format": "safetensors",
    "progress": False,
    "guidance_scale": G,
    "model_kwargs": {"y": torch.tensor([3])},
}


class TestRuns:
    """`generate`, whose last batch is smaller."""

    @pytest.mark.parametrize("models", [1, 2])
    def test_samples_are_those_of_sample(self, models: int, tmp_path: Path) -> None:
        other = {"uncond_kwargs": {"y": NULL}}
        other |= {"uncond_model": functools.partial(network)} if models == 2 else {}
        run = fastddim.generate(network, 3, tmp_path, **RUN, **other)
        drawn = [load_file(path)["samples"] for path in sorted(tmp_path.glob("*.safetensors"))]
        case = labels(5, NULL).doubled["model_kwargs"]["y"]
        case[5:] = 3
        kind = {"schedule": LINEAR, "guidance_scale": G, "model_kwargs": {"y": case}, "seed": 0}
        expected = fastddim.sample(network, 3, shape=(5, *SHAPE), **kind)
        assert [len(part) for part in drawn] == [2, 2, 1]
        assert torch.equal(torch.cat(drawn), expected)
        assert run.drawn == 5

    def test_the_manifest_tells_them_apart(self, tmp_path: Path) -> None:
        fastddim.generate(network, 3, tmp_path, uncond_kwargs={"y": NULL}, **RUN)
        again = fastddim.generate(network, 3, tmp_path, uncond_kwargs={"y": NULL}, **RUN)
        assert again.drawn == 0
        for other in (
            {"uncond_kwargs": {"y": NULL + 1}},
            {"uncond_kwargs": {"y": NULL}, "uncond_model": SmallNet(2).eval()},
        ):
            with pytest.raises(ValueError, match="uncond_"):
                fastddim.generate(network, 3, tmp_path, **RUN, **other)


class TestReplaced:
    """Tensors just like those before take a shorter way, unlike a mapping that is no
    dict.

    Both give the same, and refuse the same in the same words.
    """

    GIVEN: ClassVar[Arguments] = {
        "y": torch.zeros(2, 3),
        "one row": torch.zeros(1, 3),
        "it's": torch.tensor(1.0),
        "scale": 2.0,
        "added": {"text": torch.zeros(2)},
    }
    TAKEN: ClassVar[dict[str, Arguments]] = {
        "nothing": {},
        "rows": {"y": torch.ones(2, 3)},
        "none": {"it's": torch.tensor(3.0)},
        "one row": {"one row": torch.ones(1, 3)},
        "other rows": {"y": torch.ones(1, 3), "one row": torch.ones(2, 3)},
        "a parameter": {"y": nn.Parameter(torch.ones(2, 3))},
        "a number": {"y": torch.ones(2, 3), "scale": 2.0},
        "nested": {"added": {"text": torch.ones(2)}},
    }
    REFUSED: ClassVar[dict[str, Arguments]] = {
        "name": {"z": torch.ones(2, 3)},
        "shape": {"y": torch.ones(2, 4)},
        "dimensions": {"it's": torch.ones(1)},
        "dtype": {"y": torch.ones(2, 3).double()},
        "device": {"y": torch.ones(2, 3, device="meta")},
        "number": {"y": torch.ones(2, 3), "scale": 3.0},
        "no tensor": {"y": 1.0},
        "no rows": {"added": torch.ones(2)},
    }

    @pytest.fixture
    def before(self) -> ModelArguments:
        return ModelArguments.of(self.GIVEN, None, batch=2, guided=False, apart=False)

    @pytest.mark.parametrize("new", TAKEN)
    def test_taken(self, new: str, before: ModelArguments) -> None:
        given = self.TAKEN[new]
        short, long = before.replaced(given, None), before.replaced(MappingProxyType(given), None)
        assert short.key == long.key
        for own, expected in ((short.model_kwargs, long.model_kwargs), (short.trees, long.trees)):
            own_leaves, structure = tree_flatten_with_path(own)
            leaves, expected_structure = tree_flatten_with_path(expected)
            assert structure == expected_structure
            for (path, leaf), (other_path, other) in zip(own_leaves, leaves, strict=True):
                assert path == other_path
                if isinstance(leaf, Rows):
                    assert (leaf.parts, leaf.each, leaf.whole) == (
                        *(other.parts, other.each, other.whole),
                    )
                else:
                    assert leaf is other

    @pytest.mark.parametrize("new", REFUSED)
    def test_refused(self, new: str, before: ModelArguments) -> None:
        given = self.REFUSED[new]
        with pytest.raises((TypeError, ValueError)) as long:
            before.replaced(MappingProxyType(given), None)
        with pytest.raises(type(long.value), match=f"^{re.escape(str(long.value))}$"):
            before.replaced(given, None)

    def test_names(self) -> None:
        """Names of tensors are those of a walk through the tree."""
        given = {"y": torch.ones(1), "it's": torch.ones(1), 'a "b"': torch.ones(1)}
        names = [keystr(path) for path, _ in tree_flatten_with_path(given)[0]]
        arguments = ModelArguments.of(given, None, batch=1, guided=False, apart=False)
        assert list(arguments.tensors) == names
        assert list(arguments.replaced(MappingProxyType(given), None).tensors) == names
