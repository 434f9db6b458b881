"""Copies and pickles of all objects that users hold, and models that are converted or moved
meanwhile.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim
from fastddim import Sampler, Stream, options
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.setup import prepare_sampling

from .support.models import SmallNet, shown
from .support.recorded_graph import RecordedGraph, recorded_graphs
from .support.tuned import random_steps

SHAPE = (2, 3, 6, 6)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DEEP: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
}
COPIES = {"copy": copy.copy, **DEEP}


def halved(x_0: Tensor, t: Tensor) -> Tensor:
    return x_0 * 0.5


class Conditioned(SmallNet):
    """A network with an argument besides x and t, of one row for each sample or for each pair of
    them.
    """

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        return super().forward(x, t) + (0 if shift is None else shift)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0, "clip": 0.7, "rederive_eps": True},
    "eta of each sample": {"eta": torch.tensor([0.0, 1.0]), "variance": "large"},
    "guided": {"guidance_scale": [1.0, 2.0, 3.0, 4.0], "guidance_rescale": 0.5},
    "order 2": {"order": 2, "spacing": "uniform"},
    "thresholding": {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
    "x_0 by a function": {"denoised_fn": halved},
    "conditions": {"model_kwargs": {"shift": torch.tensor([0.5, -0.5])[:, None, None, None]}},
    "float64": {"dtype": torch.float64, "prediction": "v_prediction"},
    "schedule": {"schedule": fastddim.Schedule.cosine(100), "check_finite": True},
    "reference": {"impl": "reference", "eta": 0.5},
}


class Holder(nn.Module):
    """A policy with a network, and a sampler of it."""

    def __init__(self, of: str, **kind: Any) -> None:
        super().__init__()
        self.net = Conditioned()
        model: Any = {
            "network": self.net,
            "method": self.denoise,
            "partial": functools.partial(self.net, shift=torch.tensor(0.25)),
            "partial of a method": functools.partial(self.denoise, shift=0.25),
            "itself": self,
            "object": Wrapped(self.net),
        }[of]
        self.sampler = Sampler(model, 4, shape=SHAPE, **kind)
        self.stream = Stream(model, shape=SHAPE, max_steps=4)

    def denoise(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        output: Tensor = self.net(x, t)
        return output + shift

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * self.denoise(x, t)


class Wrapped:
    """A callable that is no module."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.net(x, t)
        return 2 * output


OF = ("network", "method", "partial", "partial of a method", "itself", "object")


def run(stream: Stream) -> Tensor:
    tickets = [stream.submit(3, seed=s, eta=0.5) for s in range(3)]
    assert [ticket.index for ticket in tickets] == [0, 1, 2]
    stream.run()
    return torch.cat([ticket.result(0) for ticket in tickets])


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler(kind: str, way: str) -> None:
    sampler = Sampler(Conditioned(), 4, shape=SHAPE, **KINDS[kind])
    unused = COPIES[way](sampler)
    expected = sampler(seed=5)
    used = COPIES[way](sampler)
    for other in (unused, used):
        assert type(other) is Sampler
        assert torch.equal(other(seed=5), expected)
        # It has buffers of its own: each may be called while the other runs.
        other(callback=lambda *_, of=other: sampler(seed=1) if of is used else None)
    assert torch.equal(sampler(seed=5), expected)
    for name in ("shape", "dtype", "device"):
        assert getattr(used, name) == getattr(sampler, name)
    assert torch.equal(used.plan.table, sampler.plan.table)


@pytest.mark.parametrize("way", DEEP)
@pytest.mark.parametrize("of", OF)
def test_a_module_that_holds_them(of: str, way: str) -> None:
    """The copy's sampler and stream evaluate the copy's weights, and the original's its own."""
    module = Holder(of, eta=1.0)
    before = module.sampler(seed=1)
    other = DEEP[way](module)
    assert torch.equal(other.sampler(seed=1), before)
    with torch.no_grad():
        other.net.weight.mul_(0.5)
        other.net.bias.add_(0.1)
    own = Holder(of, eta=1.0)
    own.load_state_dict(other.state_dict())
    changed = own.sampler(seed=1)
    assert not torch.equal(changed, before)
    assert torch.equal(other.sampler(seed=1), changed)
    assert torch.equal(run(other.stream), run(own.stream))
    assert torch.equal(module.sampler(seed=1), before)


def test_an_average_of_weights() -> None:
    """An average of weights, as training keeps it: a copy whose weights follow."""
    module = Holder("network")
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    with torch.no_grad():
        module.net.weight.mul_(3.0)
    average.update_parameters(module)
    assert torch.allclose(average.module.net.weight, module.net.weight * (2 / 3))
    expected = fastddim.sample(average.module.net, 4, shape=SHAPE, seed=0)
    assert torch.equal(average.module.sampler(seed=0), expected)
    assert not torch.equal(module.sampler(seed=0), expected)


@pytest.mark.parametrize("way", COPIES)
def test_a_subclass_with_attributes(way: str) -> None:
    sampler = Named(SmallNet(), 3, shape=SHAPE)
    sampler.notes = ["before"]
    other = COPIES[way](sampler)
    assert type(other) is Named
    assert other.notes == ["before"]
    assert torch.equal(other(seed=0), sampler(seed=0))


class Named(Sampler):
    notes: list[str]


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    "kind",
    [{}, {"guided": True}, {"order": 2}, {"denoised_fn": halved}, {"max_pending": 4}],
    ids=shown,
)
def test_a_stream(kind: dict[str, Any], way: str) -> None:
    def take(stream: Stream) -> Tensor:
        guidance = 2.0 if kind.get("guided") else None
        tickets = [stream.submit(s, seed=s, guidance_scale=guidance) for s in (3, 2, 4)]
        assert tickets[0].index == 0
        stream.run()
        return torch.cat([ticket.result(0) for ticket in tickets])

    model = SmallNet()
    stream = Stream(model, shape=SHAPE, max_steps=5, **kind)
    other = COPIES[way](stream)
    expected = take(Stream(model, shape=SHAPE, **kind))
    assert torch.equal(take(stream), expected)
    # Also one that has had requests.
    for each in (other, COPIES[way](stream)):
        assert (each.max_steps, each.max_pending) == (5, kind.get("max_pending"))
        assert torch.equal(take(each), expected)
    with pytest.raises(ValueError, match="steps: expected at most max_steps = 5"):
        other.submit(6, guidance_scale=2.0 if kind.get("guided") else None)


@pytest.mark.parametrize("way", COPIES)
def test_requests_are_not_copied(way: str) -> None:
    stream = Stream(SmallNet(), shape=SHAPE)
    ticket = stream.submit(3)
    with pytest.raises(TypeError, match=r"Ticket: expected to stay .* request 0; its result\(\)"):
        COPIES[way](ticket)
    with pytest.raises(RuntimeError, match=r"Stream: expected no request .* 1 waiting and 0 run"):
        COPIES[way](stream)
    stream.step()
    with pytest.raises(RuntimeError, match="got 0 waiting and 1 running; run"):
        COPIES[way](stream)
    stream.run()
    assert torch.equal(COPIES[way](ticket.result(0)), ticket.result(0))
    assert COPIES[way](stream).pending == 0


@pytest.mark.parametrize("made", ["sampler", "stream"])
def test_a_function_of_a_module_that_is_copied(made: str) -> None:
    """A copy of a function is itself: it would go on with the original's weights."""
    module = nn.Module()
    module.net = SmallNet()

    def model(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = module.net(x, t)
        return output

    def make() -> Any:
        return Sampler(model, 3, shape=SHAPE) if made == "sampler" else Stream(model, shape=SHAPE)

    module.made = made = make()
    with pytest.raises(TypeError, match="model: expected a module, or a method or functools"):
        copy.deepcopy(module)
    # Alone it shares the model with its copy, as functions are shared.
    assert copy.deepcopy(made)._functions()[0] is model


def test_a_changed_x_0_by_a_function_of_a_module_that_is_copied() -> None:
    module = nn.Module()
    module.net = SmallNet()
    module.sampler = Sampler(
        module.net, 3, shape=SHAPE, denoised_fn=lambda x_0, t: 2 * module.net(x_0, t)
    )
    with pytest.raises(TypeError, match="expected a module"):
        copy.deepcopy(module)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Graphs by recording, on the CPU."""
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("mode", [True, "loop"])
def test_graphs_are_captured_anew(mode: Any, way: str, recorded: list[RecordedGraph]) -> None:
    net = SmallNet()
    sampler = Sampler(net, 3, shape=SHAPE, eta=1.0, graph=mode)
    first = sampler(seed=1)
    other = COPIES[way](sampler)
    assert len(recorded) == 1
    assert torch.equal(other(seed=1), first)
    assert len(recorded) == 2
    expected = fastddim.sample(net, 3, shape=SHAPE, eta=1.0, seed=2, graph=False)
    assert torch.equal(other(seed=2), expected)
    assert torch.equal(sampler(seed=2), expected)
    assert len(recorded) == 2


@pytest.mark.parametrize("way", COPIES)
def test_graphs_of_a_stream_are_captured_anew(way: str, recorded: list[RecordedGraph]) -> None:
    stream = Stream(SmallNet(), shape=SHAPE, graph=True)
    first = run(stream)
    other = COPIES[way](stream)
    assert len(recorded) == 1
    assert torch.equal(run(other), first)
    assert len(recorded) == 2


def test_copies_in_inference_mode_serve_outside_of_it() -> None:
    sampler = Sampler(SmallNet(), 3, shape=SHAPE, eta=1.0)
    expected = sampler(seed=1)
    with torch.inference_mode():
        others = [way(sampler) for way in COPIES.values()]
    for other in others:
        assert torch.equal(other(seed=1), expected)
        with torch.inference_mode():
            assert torch.equal(other(seed=1), expected)


VALUES: dict[str, Callable[[], Any]] = {
    "Schedule": fastddim.Schedule.cosine,
    "Plan": lambda: Sampler(SmallNet(), 3, shape=SHAPE, guidance_scale=2.0).plan,
    "StepKind": lambda: Sampler(SmallNet(), 3, shape=SHAPE, order=2).plan.kind,
    "TunedSteps": random_steps,
    "SampleOptions": lambda: options.SampleOptions(SmallNet(), 3, shape=SHAPE, seed=3),
    "InvertOptions": lambda: options.InvertOptions(SmallNet(), torch.ones(SHAPE), 3),
    "StreamOptions": lambda: options.StreamOptions(SmallNet(), shape=SHAPE),
    "Setup": lambda: prepare_sampling(options.SamplerOptions(SmallNet(), 3, shape=SHAPE)),
    "Setup, guided": lambda: prepare_sampling(
        options.SamplerOptions(
            SmallNet(),
            3,
            shape=SHAPE,
            guidance_scale=2.0,
            model_kwargs={"a": {"y": torch.arange(2)}, "name": "b", "z": torch.ones(2, 3)},
            uncond_kwargs={"a": {"y": 7}},
        )
    ),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_all_that_plain_objects_hold(name: str, way: str) -> None:
    value = VALUES[name]()
    other = COPIES[way](value)
    assert type(other) is type(value)
    assert_same(other, value)


def assert_same(other: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        assert torch.equal(other, value)
    elif isinstance(value, nn.Module):
        assert all(map(torch.equal, other.parameters(), value.parameters()))
    elif is_dataclass(value):
        for each in fields(value):
            assert_same(getattr(other, each.name), getattr(value, each.name))
    elif isinstance(value, ModelArguments):
        assert_same(vars(other), vars(value))
    elif isinstance(value, dict):
        assert_same(tuple(other.items()), tuple(value.items()))
    elif isinstance(value, tuple):
        for pair in zip(other, value, strict=True):
            assert_same(*pair)
    else:
        assert other == value


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.float16 on cpu": nn.Module.half,
    "torch.float64 on cpu": nn.Module.double,
    "torch.bfloat16 on cpu": lambda module: module.to(torch.bfloat16),
    "torch.float32 on meta": lambda module: module.to("meta"),
}


class TestConvertedModels:
    @pytest.mark.parametrize("to", CONVERSIONS)
    @pytest.mark.parametrize("of", OF)
    def test_are_refused(self, of: str, to: str) -> None:
        module = Holder(of)
        module.sampler()
        run(module.stream)
        ticket = module.stream.submit(3)
        CONVERSIONS[to](module)
        message = (
            "model: expected weights as they were when the {0} was made, torch.float32 on cpu, "
            f"got {to}; make a new {{0}} after module.to() or module.half()"
        )
        for call, name in ((module.sampler, "Sampler"), (module.stream.step, "Stream")):
            with pytest.raises(ValueError, match=re.escape(message.format(name))):
                call()
        if "meta" in to:
            return
        # A new one follows, and so does the same one after the way back.
        if of in ("network", "itself"):
            model = module.sampler._setup.model
            assert Sampler(model, 4, shape=SHAPE)().isfinite().all()
        module.float()
        assert module.sampler().isfinite().all()
        module.stream.run()
        assert ticket.result(0).isfinite().all()

    def test_in_place_of_the_parameters(self) -> None:
        net = SmallNet()
        sampler = Sampler(net, 3, shape=SHAPE)
        net.weight = nn.Parameter(net.weight.detach().double())
        net.bias = nn.Parameter(net.bias.detach().double())
        with pytest.raises(ValueError, match=r"got torch\.float64 on cpu; make a new Sampler"):
            sampler()

    def test_buffers_alone(self) -> None:
        net = nn.Module()
        net.register_buffer("weight", torch.ones(3))
        net.forward = lambda x, t: 0.5 * x
        sampler = Sampler(net, 3, shape=SHAPE)
        assert sampler().isfinite().all()
        net.half()
        with pytest.raises(ValueError, match="model: expected weights as they were"):
            sampler()

    def test_weights_that_hooks_bring_to_the_state(self) -> None:
        """Weights that hooks bring to the state: offloading keeps weights elsewhere, and moves them
        to the state's device.
        """
        net = SmallNet().to("meta")
        sampler = Sampler(net, 3, shape=SHAPE, device="cpu")
        net.to_empty(device="cpu")
        net.load_state_dict(SmallNet().state_dict())
        assert torch.equal(sampler(seed=0), Sampler(SmallNet(), 3, shape=SHAPE)(seed=0))

    def test_other_values_of_the_same_kind(self) -> None:
        net = SmallNet()
        sampler = Sampler(net, 3, shape=SHAPE)
        net.weight = nn.Parameter(0.5 * net.weight.detach())
        assert torch.equal(sampler(seed=0), fastddim.sample(net, 3, shape=SHAPE, seed=0))
        nn.utils.parametrizations.weight_norm(net)
        assert sampler().isfinite().all()

    @pytest.mark.parametrize("way", DEEP)
    def test_of_a_copy(self, way: str) -> None:
        module = Holder("network")
        other = DEEP[way](module)
        other.half()
        with pytest.raises(ValueError, match=r"got torch\.float16 .* make a new Sampler"):
            other.sampler()
        assert module.sampler().isfinite().all()
        module.half()
        with pytest.raises(ValueError, match="make a new Sampler"):
            DEEP[way](module).sampler()
