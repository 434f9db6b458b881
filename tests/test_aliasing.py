"""Results of the user's functions may lie in the loop's own memory, which a step writes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim

from .support.environment import CPU_IMPLS
from .support.recorded_graph import RecordedGraph, recorded_graphs

# A kernel reads and writes a sample of this size in several parts.
SHAPE = (3, 2, 48, 48)
# Several threads share a state of this size, and each of its samples.
LARGE = (2, 2, 160, 160)

# Outputs that lie in x. Most are at other places than the elements that they are combined with.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "a view": lambda x: x.view_as(x),
    "a subclass": lambda x: x.as_subclass(Plain),
    "transposed": lambda x: x.transpose(-1, -2),
    "first sample": lambda x: x[:1].expand_as(x),
    "last sample": lambda x: x[-1:].expand_as(x),
    "other channel": lambda x: x[:, 1:].expand_as(x),
    "last row": lambda x: x[..., -1:, :].expand_as(x),
    "shared with NumPy": lambda x: torch.from_numpy(x.numpy()).transpose(-1, -2),
    "another start": lambda x: x.flatten()[-1].expand_as(x),
    "of twice the channels": lambda x: x[:, [0]].expand(-1, 4, -1, -1),
}


class Plain(Tensor):
    """A subclass with memory."""


def viewing(view: Callable[[Tensor], Tensor], *, copied: bool) -> Callable[[Tensor, Tensor], Any]:
    def model(x: Tensor, t: Tensor) -> Tensor:
        output = view(x)
        return output.clone(memory_format=torch.contiguous_format) if copied else output

    return model


def run_sample(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    return [fastddim.sample(model, 4, x_T=x, seed=1, **kind)]


def run_sampler(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    sampler = fastddim.Sampler(model, 4, shape=tuple(x.shape), dtype=x.dtype, **kind)
    return [sampler(x_T=x, seed=2), sampler(seed=3), sampler(x_T=x, seed=2, return_trajectory=True)]


def run_watched(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    fastddim.sample(
        model, 4, x_T=x, seed=1, callback=lambda s, t, x_t, x_0: seen.extend((x_t, x_0)), **kind
    )
    return seen


def run_masked(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    return [fastddim.sample(model, 4, x_T=x, mask=(x > 0).to(x.dtype), known=x, seed=1, **kind)]


def run_checked(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    return [fastddim.sample(model, 4, x_T=x, seed=1, check_finite=True, **kind)]


def run_invert(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    return [fastddim.invert(model, x, 4, order=o, **kind) for o in (1, 2)]


def run_refined(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    return [fastddim.invert(model, x, 4, refine=2, **kind)]


def run_stream(model: Any, x: Tensor, **kind: Any) -> list[Tensor]:
    stream = fastddim.Stream(model, shape=tuple(x.shape), dtype=x.dtype, **kind)
    # Other batches than the whole one lie in the same memory.
    steps = [4, 3, 4][: len(x)]
    tickets = [stream.submit(s, x_T=x[i : i + 1], eta=0.5, seed=1) for i, s in enumerate(steps)]
    stream.run()
    return [ticket.result(0) for ticket in tickets]


RUNS = {
    "sample": run_sample,
    "Sampler": run_sampler,
    "callback": run_watched,
    "mask": run_masked,
    "check_finite": run_checked,
    "invert": run_invert,
    "refine": run_refined,
    "Stream": run_stream,
}


def same_with_a_copy(
    run: Callable[..., list[Tensor]], view: Callable[[Tensor], Tensor], x: Tensor, **kind: Any
) -> None:
    own = run(viewing(view, copied=False), x.clone(), **kind)
    expected = run(viewing(view, copied=True), x.clone(), **kind)
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    assert all(v.isfinite().all() for v in own)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("run", RUNS)
def test_an_output_in_the_state(run: str, view: str) -> None:
    same_with_a_copy(RUNS[run], VIEWS[view], torch.randn(SHAPE))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("run", RUNS)
def test_backends(run: str, impl: str) -> None:
    same_with_a_copy(RUNS[run], VIEWS["transposed"], torch.randn(2, 2, 40, 40), impl=impl)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("view", ["itself", "transposed", "first sample", "last row"])
@pytest.mark.parametrize("run", ["sample", "callback", "invert", "Stream"])
def test_large_states(run: str, view: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_with_a_copy(RUNS[run], VIEWS[view], torch.randn(LARGE))
    finally:
        torch.set_num_threads(before)


KINDS: dict[str, dict[str, Any]] = {
    "noise": {"eta": 1.0},
    "clip": {"clip": 0.7, "rederive_eps": True},
    "thresholding": {"dynamic_thresholding_ratio": 0.9},
    "order 2": {"order": 2},
    "x_0 by a function": {"denoised_fn": lambda x_0, t: x_0 * 0.5, "eta": 0.5},
    # The output then has two samples for each of the state, in a buffer of their own.
    "guided": {"guidance_scale": 2.0},
    "guided, in one call": {"guidance_scale": torch.tensor([1.0, 2.0, 3.0]), "eta": 0.3},
    "guided, rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("view", ["itself", "transposed", "last sample", "of twice the channels"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_steps(kind: str, view: str, dtype: torch.dtype) -> None:
    same_with_a_copy(run_sample, VIEWS[view], torch.randn(SHAPE).to(dtype), **KINDS[kind])


class OfOwnDtype(nn.Module):
    """A model in bfloat16, which reads a copy of the state."""

    def __init__(self, view: Callable[[Tensor], Tensor], *, copied: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        self.function = viewing(view, copied=copied)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return self.function(x, t)


@pytest.mark.parametrize("kind", [{}, {"guidance_scale": 2.0}, {"order": 2}], ids=str)
@pytest.mark.parametrize("view", ["itself", "transposed", "last sample"])
def test_an_output_in_the_models_input(view: str, kind: dict[str, Any]) -> None:
    x = torch.randn(SHAPE)
    own, expected = (
        fastddim.sample(OfOwnDtype(VIEWS[view], copied=copied), 4, x_T=x, **kind)
        for copied in (False, True)
    )
    assert torch.equal(own, expected)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("rederive_eps", [False, True])
@pytest.mark.parametrize("view", [v for v in VIEWS if v != "of twice the channels"])
def test_a_changed_x_0_in_x_0(view: str, rederive_eps: bool, watched: bool) -> None:
    def run(copied: bool) -> list[Tensor]:
        def denoised_fn(x_0: Tensor, t: Tensor) -> Tensor:
            return viewing(VIEWS[view], copied=copied)(x_0.mul_(0.5), t)

        seen: list[Tensor] = []
        x = fastddim.sample(
            lambda x, t: x.sin(),
            3,
            shape=SHAPE,
            seed=1,
            denoised_fn=denoised_fn,
            rederive_eps=rederive_eps,
            callback=(lambda s, t, x_t, x_0: seen.append(x_0)) if watched else None,
        )
        return [x, *seen]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("of", ["x_0", "x"])
def test_what_one_function_keeps_for_the_other(of: str) -> None:
    """One function may keep memory of the other: x_0 as the model's output at the next step, or x
    as the changed x_0, without a copy.
    """

    def run(copied: bool) -> Tensor:
        kept: dict[str, Tensor] = {}

        def view(tensor: Tensor) -> Tensor:
            return tensor.mT.contiguous() if copied else tensor.mT

        def model(x: Tensor, t: Tensor) -> Tensor:
            kept["x"] = x
            return view(kept["x_0"]) if of == "x_0" and "x_0" in kept else x.sin()

        def denoised_fn(x_0: Tensor, t: Tensor) -> Tensor:
            kept["x_0"] = x_0
            return view(kept["x"]) if of == "x" else x_0

        return fastddim.sample(model, 4, shape=SHAPE, seed=1, denoised_fn=denoised_fn, clip=1.0)

    assert torch.equal(run(False), run(True))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Graphs by recording, on the CPU."""
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


@pytest.mark.parametrize("mode", [True, "loop"])
@pytest.mark.parametrize("view", ["itself", "transposed", "last sample"])
@pytest.mark.parametrize("kind", [{"eta": 1.0}, {"guidance_scale": 2.0}], ids=str)
def test_captured(
    kind: dict[str, Any], view: str, mode: Any, recorded: list[RecordedGraph]
) -> None:
    call: dict[str, Any] = {"x_T": torch.randn(SHAPE), "seed": 1, **kind}
    own = fastddim.sample(viewing(VIEWS[view], copied=False), 4, graph=mode, **call)
    expected = fastddim.sample(viewing(VIEWS[view], copied=True), 4, graph=False, **call)
    assert len(recorded) == 1
    assert torch.equal(own, expected)


def test_captured_in_a_stream(recorded: list[RecordedGraph]) -> None:
    x = torch.randn(SHAPE)
    own, expected = (
        run_stream(viewing(VIEWS["transposed"], copied=mode is False), x, graph=mode)
        for mode in (True, False)
    )
    assert len(recorded) == 1
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_earlier_results_as_arguments() -> None:
    """Results belong to the caller, so that each may be an argument of the call that follows."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x.sin()

    kind: dict[str, Any] = {"shape": SHAPE, "eta": 1.0}
    sampler = fastddim.Sampler(model, 4, **kind)
    before, states = sampler(seed=1), sampler(seed=1, return_trajectory=True)
    mask = states[1].sigmoid()
    given = {"x_T": before, "known": states[2], "mask": mask, "noise": states[:4]}
    kept = {name: tensor.clone() for name, tensor in given.items()}
    own = sampler(**given)
    assert torch.equal(own, fastddim.sample(model, 4, eta=1.0, **kept))
    assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())
