"""The CUDA kernel that each kind of sampler launches: none goes element by element, except for a
list of exceptions. Kernels are chosen by the launchers that nvcc built, and not executed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim
from fastddim import Schedule, backends

from .support.environment import needs_compiler, needs_extension
from .support.gpuless.cuda_on_ptx import Device, device
from .support.gpuless.toolchain import needs_nvcc
from .support.recorded_graph import recorded_graphs

__all__ = ["device"]

pytestmark = [needs_compiler, needs_extension, needs_nvcc]

LATENTS = (2, 4, 8, 8)
HALVES = (torch.float16, torch.bfloat16)


class Net(nn.Module):
    """A network as far as samplers see it: weights, and outputs in the layout of the weights."""

    def __init__(
        self,
        channels: int = 4,
        dtype: torch.dtype = torch.float16,
        *,
        memory_format: torch.memory_format = torch.channels_last,
        output_format: torch.memory_format | None = None,
        output_dtype: torch.dtype | None = None,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        outputs = channels * (1 + learned_variance)
        self.conv_in = nn.Conv2d(channels, 8, 3, padding=1, dtype=dtype)
        self.norm = nn.GroupNorm(2, 8, dtype=dtype)
        self.conv_out = nn.Conv2d(8, outputs, 3, padding=1, dtype=dtype)
        self.to(memory_format=memory_format)
        self._outputs = outputs
        self._format = memory_format if output_format is None else output_format
        self._dtype = dtype if output_dtype is None else output_dtype
        self.seen: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add(x.stride())
        size = (len(x), self._outputs, *x.shape[2:])
        return torch.empty(size, dtype=self._dtype, memory_format=self._format).zero_()


Kernels = Callable[..., set[str]]


@pytest.fixture
def kernels(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """The names of the update kernels that a call of `sample` launches."""
    found: set[str] = set()

    def update_out(*args: Any, **kwargs: Any) -> None:
        device.update_out(*args, **kwargs)
        (launch,) = device.gpu.launches
        name = re.search(r"(update\w*?)I(\w+?)EEv", launch.name)
        assert name is not None
        found.add(name[1])

    backend = SimpleNamespace(
        __name__="recorded",
        update_out=update_out,
        normal_out=device.normal_out,
        advance=device.advance,
    )
    monkeypatch.setattr(backends, "choose", lambda impl, where: backend)

    def launched(model: Any, *, shape: tuple[int, ...] = LATENTS, **arguments: Any) -> set[str]:
        found.clear()
        fastddim.sample(model, 3, shape=shape, schedule=Schedule.linear(), seed=1, **arguments)
        return set(found)

    device.gpu.executes = False
    yield launched
    device.gpu.executes = True


FEATURES: dict[str, dict[str, Any]] = {
    "eta 0": {},
    "eta 1": {"eta": 1.0},
    "eta of each sample": {"eta": torch.tensor([0.0, 1.0])},
    "noise of the caller": {"eta": 1.0, "noise": torch.zeros(3, *LATENTS)},
    "order 2": {"order": 2},
    "a callback": {"eta": 1.0, "callback": lambda s, t, x, x_0: None},
    "a mask": {"eta": 1.0, "mask": torch.ones(LATENTS), "known": torch.zeros(LATENTS)},
}
SPLIT: dict[str, dict[str, Any]] = {
    "whole": {},
    "split": {"denoised_fn": lambda x_0, t: x_0},
    "split, another tensor": {"denoised_fn": lambda x_0, t: x_0.clone(), "rederive_eps": True},
}
NETS: dict[str, dict[str, Any]] = {
    "channels_last": {},
    "row-major": {"memory_format": torch.contiguous_format},
    "its output alone": {
        "memory_format": torch.contiguous_format,
        "output_format": torch.channels_last,
    },
    "its weights alone": {"output_format": torch.contiguous_format},
    "learned variance": {"learned_variance": True},
}
PAIRS = [(torch.float32, torch.float32), *((torch.float32, h) for h in HALVES)]
PAIRS += [(h, h) for h in HALVES]
OUTPUTS = (None, torch.float32)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("split", SPLIT)
@pytest.mark.parametrize("guided", [False, True])
def test_no_step_goes_element_by_element(
    kernels: Kernels, net: str, split: str, guided: bool, pytestconfig: pytest.Config
) -> None:
    """No step goes element by element, in any mix of dtypes that a sampler makes; with `--deep` in
    all of them.
    """
    strided = []
    cases = list(itertools.product(FEATURES, PAIRS, OUTPUTS))
    if not pytestconfig.getoption("--deep"):
        cases = cases[list(NETS).index(net) + 2 * guided :: 11]
    for feature, (dtype, model_dtype), output in cases:
        kind = {**FEATURES[feature], **SPLIT[split]}
        # Known data are of the dtype of the state.
        kind |= {k: v.to(dtype) for k, v in kind.items() if k in ("mask", "known")}
        kind |= {"guidance_scale": 2.0} if guided else {}
        model = Net(dtype=model_dtype, output_dtype=output, **NETS[net])
        if "update_strided" in kernels(model, dtype=dtype, **kind):
            strided.append((feature, dtype, model_dtype, output))
    assert strided == []


@pytest.mark.parametrize("graph", [False, True, "loop"])
@pytest.mark.parametrize(("eta", "kernel"), [(0.0, "update"), (1.0, "update_pixels")])
def test_a_network_in_channels_last(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    graph: bool | str,
    eta: float,
    kernel: str,
) -> None:
    """A network in channels_last reads every state in the order in which it writes, eagerly and
    from a graph.
    """
    model = Net()
    with recorded_graphs(monkeypatch) as graphs:
        assert kernels(model, dtype=torch.float16, eta=eta, graph=graph) == {kernel}
    assert bool(graphs) == bool(graph)
    assert model.seen == {(256, 1, 32, 4)}


# What is left: more channels than a thread takes, words that are not whole, and float64.
EXCEPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "five channels": ({"channels": 5}, {"shape": (2, 5, 8, 8)}),
    "an odd plane": ({}, {"shape": (2, 4, 7, 7)}),
    "float64": ({"dtype": torch.float64}, {"dtype": torch.float64}),
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions(kernels: Kernels, name: str) -> None:
    """Exceptions go element by element if noise is drawn into interleaved channels."""
    net, kind = EXCEPTIONS[name]
    kind = {"dtype": torch.float16, **kind}
    assert kernels(Net(**net), eta=1.0, **kind) == {"update_strided"}
    assert kernels(Net(**net), **kind) == {"update"}
