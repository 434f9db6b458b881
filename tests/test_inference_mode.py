"""Objects made inside torch.inference_mode serve outside of it, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim

from .support.models import SmallNet
from .support.tuned import random_steps

SHAPE = (2, 3, 4, 4)
S = 3


def sampler(**kind: Any) -> Callable[[], list[Tensor]]:
    own = fastddim.Sampler(SmallNet(), S, shape=SHAPE, **kind)
    return lambda: [own(seed=1), own(seed=2, return_trajectory=True), own(seed=1)]


def tuned() -> Callable[[], list[Tensor]]:
    own = fastddim.Sampler(SmallNet(), random_steps(S), shape=SHAPE)
    return lambda: [own(seed=1), own(seed=2)]


def masked() -> Callable[[], list[Tensor]]:
    own = fastddim.Sampler(SmallNet(), S, shape=SHAPE)
    given = {"mask": torch.ones(4, 4).tril(), "known": torch.ones(SHAPE), "x_T": torch.ones(SHAPE)}
    return lambda: [own(**given), own(seed=1)]


def of_given_tensors() -> Callable[[], list[Tensor]]:
    noise, eta = torch.ones(S, *SHAPE), torch.tensor([0.5, 1.0])
    own = fastddim.Sampler(SmallNet(), S, shape=SHAPE, eta=eta)
    return lambda: [own(noise=noise, seed=3), own(noise=torch.Generator().manual_seed(1))]


def stream() -> Callable[[], list[Tensor]]:
    net = SmallNet()
    own = fastddim.Stream(net, shape=SHAPE, max_steps=S)

    def run() -> list[Tensor]:
        given = torch.ones(1, *SHAPE[1:])
        tickets = [own.submit(S, seed=1), own.submit(2, seed=2, eta=1.0), own.submit(S, x_T=given)]
        own.run()
        return [ticket.result(0) for ticket in tickets]

    return run


def inversion() -> Callable[[], list[Tensor]]:
    net, x_0 = SmallNet(), torch.ones(SHAPE)
    return lambda: [
        fastddim.invert(net, x_0, S),
        fastddim.invert(net, x_0, S, order=2, return_trajectory=True),
        fastddim.invert(net, x_0, S, refine=1),
    ]


def sample() -> Callable[[], list[Tensor]]:
    net, x_T = SmallNet(), torch.ones(SHAPE)
    return lambda: [
        fastddim.sample(net, S, x_T=x_T, denoised_fn=lambda x_0, t: x_0.clamp(-1, 1)),
        fastddim.sample(net, S, shape=SHAPE, seed=1, guidance_scale=2.0, guidance_rescale=0.5),
    ]


def schedule() -> Callable[[], list[Tensor]]:
    own, x_0 = fastddim.Schedule.cosine(), torch.ones(SHAPE)
    net = SmallNet()
    return lambda: [
        own.add_noise(x_0, 500, torch.zeros(SHAPE)),
        fastddim.sample(net, S, shape=SHAPE, seed=1, schedule=own),
        fastddim.slerp(x_0, 2 * x_0, 0.5),
    ]


MADE: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
    "Sampler": lambda: sampler(eta=1.0),
    "Sampler of order 2": lambda: sampler(order=2),
    "Sampler of tuned steps": tuned,
    "Sampler with known data": masked,
    "Sampler with given noise": of_given_tensors,
    "Stream": stream,
    "invert": inversion,
    "sample": sample,
    "Schedule": schedule,
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inside": torch.inference_mode,
    "outside": nullcontext,
}


@pytest.mark.parametrize("uses", [("inside", "outside"), ("outside", "inside", "outside")], ids=str)
@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("name", MADE)
def test_any_order_of_modes(name: str, made: str, uses: tuple[str, ...]) -> None:
    expected = MADE[name]()()
    with MODES[made]():
        run = MADE[name]()
    for use in uses:
        with MODES[use]():
            own = run()
        for result, other in zip(own, expected, strict=True):
            assert torch.equal(result, other)
            if name != "Schedule":
                # The caller's own, to go on with in training.
                assert not result.is_inference()
                result.requires_grad_().sum().backward()


@pytest.mark.parametrize("gradients", [True, False])
def test_the_modes_of_the_caller_are_back(gradients: bool) -> None:
    own = fastddim.Sampler(SmallNet(), S, shape=SHAPE)
    with torch.inference_mode(), torch.set_grad_enabled(gradients):
        own(seed=1)
        assert torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled() == gradients


def test_a_run_into_files(tmp_path: Path) -> None:
    shards = []
    for name, mode in MODES.items():
        with mode():
            net = SmallNet().eval()
            given: dict[str, Any] = {"shape": (2, *SHAPE[1:]), "eta": 1.0}
            fastddim.generate(net, S, tmp_path / name, stop=4, **given)
        shards.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.npz")})
    assert shards[0]
    assert shards[0] == shards[1]
