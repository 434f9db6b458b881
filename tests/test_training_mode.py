"""A network in training mode, in which dropout makes samples that nothing repeats."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim
from fastddim import notices

SHAPE = (2, 4)
SCHEDULE = fastddim.Schedule.linear()


class Network(nn.Module):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.dropout(self.layer(x))


class Wrapper(nn.Module):
    """A module of the user around a network, under a name that tells nothing."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


class Policy:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets given warnings, so that toy networks of other tests do not filter them."""
    monkeypatch.setattr(notices, "_given", set())
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def sample(model: Any, **options: Any) -> Tensor:
    return fastddim.sample(model, 2, shape=SHAPE, schedule=SCHEDULE, **options)


CALLS: dict[str, Callable[[Any], object]] = {
    "sample": sample,
    "Sampler": lambda net: fastddim.Sampler(net, 2, shape=SHAPE, schedule=SCHEDULE)(),
    "invert": lambda net: fastddim.invert(net, torch.zeros(SHAPE), 2, schedule=SCHEDULE),
    "Stream": lambda net: fastddim.Stream(net, shape=SHAPE, schedule=SCHEDULE),
    "uncond_model": lambda net: sample(
        Network().eval(), guidance_scale=2.0, uncond_model=net, model_kwargs={}
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_warning_names_the_argument_and_the_class(name: str) -> None:
    argument = name if name == "uncond_model" else "model"
    said = rf"^fastddim: {argument}: expected a network in eval mode, got Network in training mode"
    with pytest.warns(UserWarning, match=said) as caught:
        CALLS[name](Network())
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in CALLS.values():
            call(Network())


def method(net: nn.Module) -> Any:
    return Policy(net).predict


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "a function": lambda net: lambda x, t: 2 * net(x, t),
    "a partial": partial,
    "a method": method,
    "DataParallel": nn.DataParallel,
    "a module": Wrapper,
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_network_within_another_callable(wrap: Callable[[nn.Module], Any]) -> None:
    with pytest.warns(UserWarning, match="in training mode"):
        sample(wrap(Network()))


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_only_the_wrapper_is_in_training_mode(wrap: Callable[[nn.Module], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(wrap(Network().eval()))


class Formula(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x / 2


def test_a_module_without_parameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(Formula())


class Agent(nn.Module):
    """A module with a sampler of itself, which is in training mode when it makes the sampler."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.sampler = fastddim.Sampler(self.predict, 2, shape=SHAPE, schedule=SCHEDULE)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


def test_a_sampler_looks_when_it_is_called() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = Agent().eval()
        agent.sampler()
    with pytest.warns(UserWarning, match="got Agent in training mode"):
        Agent().sampler()


def test_layers_that_are_meant_to_draw() -> None:
    """Layers that are meant to draw: dropout that the user has turned on again in a network in eval
    mode.
    """
    net = Network().eval()
    net.dropout.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(net)


def test_what_is_kept_is_refused(tmp_path: Path) -> None:
    expected = r"^model: expected eval mode \(model.eval\(\)\), got training mode$"
    with pytest.raises(ValueError, match=expected):
        fastddim.tune(Network(), 2, shape=SHAPE, schedule=SCHEDULE, progress=False)
    with pytest.raises(ValueError, match=expected):
        fastddim.generate(
            Network(), 2, tmp_path, stop=2, shape=SHAPE, schedule=SCHEDULE, format="safetensors"
        )
