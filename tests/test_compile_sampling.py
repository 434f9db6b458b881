"""Whole runs as parts of programs: torch.compile, torch.export, torch.jit.trace, make_fx.

A program gives what the same call gives outside of it, bit for bit: models here compute with
operators that a compiler does not fuse (backends "eager" and "aot_eager").
"""

from __future__ import annotations

import copy
import functools
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastddim
from fastddim import Sampler

from .support.environment import ROOT, RunPython
from .support.models import SmallNet, shown
from .support.products import in_turns
from .support.tuned import random_steps

SHAPE = (2, 3, 4, 4)
S = 3
COSINE = fastddim.Schedule.cosine(200)
TUNED = random_steps(S)
NOISE = torch.randn((S, *SHAPE), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([1.0, 0.0, 0.25, 1.0])


def darker(x_0: Tensor, t: Tensor) -> Tensor:
    return x_0.clamp(-1, 1) * (t[0] / 1000)


class Conditioned(SmallNet):
    """A network with twice the channels on request, and an argument besides x and t."""

    wide = False

    def forward(self, x: Tensor, t: Tensor, shift: Any = 0.0) -> Any:
        output = super().forward(x, t) + shift
        return (torch.cat([output, output], dim=1), None) if self.wide else output


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0, "clip": 0.7, "rederive_eps": True, "variance": "large"},
    "noise of each step": {"eta": [1.0, 0.0, 0.5], "temperature": 0.8},
    "order 2": {"order": 2},
    "tuned": {"steps": TUNED},
    "timesteps": {"steps": [900, 400, 100]},
    "guided": {"guidance_scale": 3.0, "eta": 0.3},
    "guided, rescaled": {"guidance_scale": [1.0, 2.0, 3.0], "guidance_rescale": 0.7},
    "thresholding": {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
    "changed x_0": {"denoised_fn": darker, "eta": 0.5},
    "changed x_0, rederived": {"denoised_fn": darker, "rederive_eps": True},
    "changed x_0, order 2, rescaled": {
        "denoised_fn": darker,
        "order": 2,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.5,
    },
    "schedule": {"schedule": COSINE, "spacing": "leading", "prediction": "v_prediction"},
    "conditions": {"model_kwargs": {"shift": torch.full((1, 3, 1, 1), 0.5)}},
    "reference": {"impl": "reference"},
}
CALLS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2**63 + 5, "sample_offset": 7},
    "seeds": {"seed": [1, 2**64 - 1]},
    "noise": {"noise": NOISE},
    "known": {"mask": MASK, "known": NOISE[0]},
    "trajectory": {"return_trajectory": True},
    "no x_T": {"x_T": None, "seed": 5},
}


class Program(nn.Module):
    """A model that is sampled by a function of (network, x)."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Any], net: nn.Module | None = None):
        super().__init__()
        self.net = Conditioned() if net is None else net
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.net, x)


class Policy(nn.Module):
    """A network with a sampler."""

    def __init__(self, call: dict[str, Any] | None = None, **kind: Any) -> None:
        super().__init__()
        self.net = Conditioned()
        self.call = {"seed": 0, **(call or {})}
        steps = kind.pop("steps", S)
        self.sampler = Sampler(self.net, steps, shape=SHAPE, **kind)

    def forward(self, x: Tensor) -> Any:
        return self.sampler(**{"x_T": x, **self.call})


def sampling(call: dict[str, Any] | None = None, **kind: Any) -> Program:
    given: dict[str, Any] = {"steps": S, "seed": 0, **kind, **(call or {})}

    def run(net: nn.Module, x: Tensor) -> Any:
        return fastddim.sample(net, **{"x_T": x, **given})

    return Program(run)


def inverting(**kind: Any) -> Program:
    return Program(lambda net, x: fastddim.invert(net, x, S, **kind))


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    **{f"sample, {k}": lambda kind=kind: sampling(**kind) for k, kind in KINDS.items()},
    **{f"Sampler, {k}": lambda kind=kind: Policy(**kind) for k, kind in KINDS.items()},
    **{
        f"Sampler, call with {k}": lambda call=call: Policy(call, eta=1.0)
        for k, call in CALLS.items()
    },
    "sample, call with known": lambda: sampling(CALLS["known"]),
    "sample, no x_T": lambda: sampling({"x_T": None, "shape": SHAPE, "seed": 3}, eta=0.5),
    "Sampler, eta of each sample": lambda: Policy(eta=torch.tensor([0.0, 1.0])),
    "invert": inverting,
    "invert, order 2": lambda: inverting(order=2),
    "invert, refined": lambda: inverting(refine=2),
    "invert, guided": lambda: inverting(guidance_scale=1.5, return_trajectory=True),
}


def compiled(program: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    torch._dynamo.reset()
    return torch.compile(program, backend="aot_eager", fullgraph=True)


def exported(program: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.export.export(program, (x,), strict=False).module()


def strictly_exported(program: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return torch.export.export(program, (x,), strict=True).module()


def jit_traced(program: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(program, (x,), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded: Callable[[Tensor], Any] = torch.jit.load(file)
    return loaded


def functional(program: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    return make_fx(program)(x)


WAYS = {
    "compile": compiled,
    "export": exported,
    "strict export": strictly_exported,
    "jit.trace": jit_traced,
    "make_fx": functional,
}


def states(seed: int, batch: int = SHAPE[0]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *SHAPE[1:]), generator=generator)


def same(own: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return all(same(*pair) for pair in zip(own, expected, strict=True))
    return type(own) is Tensor and torch.equal(own, expected)


# Earlier compilers do not hand a model on to code that they do not follow.
HANDS_ON = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
needs_handing_on = pytest.mark.skipif(
    not HANDS_ON, reason="before torch 2.13 only a Sampler can be a part of a compiled function"
)


def marks(number: int, name: str, way: str) -> list[pytest.MarkDecorator]:
    # Most are traced in one way each, in turns.
    quick = name in ALL_WAYS or (number + list(WAYS).index(way)) % len(WAYS) == 0
    handed_on = way in ("compile", "strict export") and not name.startswith("Sampler")
    return [
        *([] if quick else [pytest.mark.deep]),
        *([needs_handing_on] if handed_on else []),
    ]


ALL_WAYS = ("sample, noise", "Sampler, noise", "invert")
CASES = [
    pytest.param(name, way, marks=marks(i, name, way))
    for i, name in enumerate(PROGRAMS)
    for way in WAYS
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_program_gives_what_the_call_gives(name: str, way: str) -> None:
    before = PROGRAMS[name]()
    expected = [before(states(seed)) for seed in (1, 2)]
    # Traced at other values, and before any call.
    program = PROGRAMS[name]()
    own = WAYS[way](program, states(0))
    assert same(own(states(1)), expected[0])
    assert same(own(states(2)), expected[1])
    assert "no x_T" in name or not same(expected[0], expected[1])
    # Nothing of the tracer is left behind.
    assert same(program(states(1)), expected[0])
    assert same(PROGRAMS[name]()(states(2)), expected[1])


def operators(graph: torch.fx.Graph) -> list[str]:
    """The operators of the package in a graph and its parts."""
    module = graph.owning_module
    parts = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target).split(".") for part in parts for node in part.nodes]
    return [target[1] for target in targets if target[0] == "fastddim"]


@pytest.mark.parametrize(
    ("kind", "each_step"),
    [
        ({}, ["update"]),
        ({"eta": 1.0, "guidance_scale": 2.0, "clip": 1.0}, ["update"]),
        ({"order": 2}, ["update"] * 2),
        ({"denoised_fn": darker}, ["update"] * 3),
        ({"dynamic_thresholding_ratio": 0.9}, ["fit_rows", "update"]),
    ],
    ids=shown,
)
def test_the_operators_of_a_program(kind: dict[str, Any], each_step: list[str]) -> None:
    expected = each_step * S
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    torch.compile(Policy(**kind), backend=backend, fullgraph=True)(states(0))
    (graph,) = graphs
    assert operators(graph) == expected
    exported = torch.export.export(sampling(**kind), (states(0),), strict=False)
    assert operators(exported.graph) == expected


@pytest.mark.parametrize("name", ["sample, noise", "Sampler, noise", "invert"])
def test_compiled_with_breaks_where_need_be(name: str) -> None:
    torch._dynamo.reset()
    program = PROGRAMS[name]()
    assert same(torch.compile(program, backend="eager")(states(1)), program(states(1)))


MADE = [
    pytest.param(sampling, marks=needs_handing_on, id="sample"),
    pytest.param(Policy, id="Sampler"),
]


@pytest.mark.parametrize("make", MADE)
def test_one_compiled_function_for_other_seeds_batches_and_steps(make: Any) -> None:
    torch._dynamo.reset()
    net = Conditioned()
    sampler = Sampler(net, S, shape=SHAPE, eta=1.0)

    def run(x: Tensor, seed: int, steps: int) -> Any:
        if make is Policy:
            return sampler(x_T=x, seed=seed)
        return fastddim.sample(net, steps, x_T=x, seed=seed, eta=1.0)

    own = torch.compile(run, backend="eager", fullgraph=True)
    for batch, seed, steps in [(2, 1, 3), (3, 2, 3), (5, 2**63 + 5, 3), (5, 7, 4), (2, 0, 5)]:
        x = states(seed, batch)
        expected = fastddim.sample(net, S if make is Policy else steps, x_T=x, seed=seed, eta=1.0)
        assert same(own(x, seed, steps), expected)


@pytest.mark.parametrize(
    ("made", "kind"),
    in_turns(
        2, ("sample", "Sampler"), ("noise", "guided", "order 2", "changed x_0", "thresholding")
    ),
)
def test_an_open_batch(made: str, kind: str) -> None:
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = PROGRAMS[f"{made}, {kind}"]()
    with torch.no_grad():
        exported = torch.export.export(program, (states(0),), dynamic_shapes=shapes, strict=False)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    own = torch.export.load(file).module()
    for batch in (2, 5):
        x = states(1, batch)
        assert same(own(x), fastddim.sample(program.net, S, x_T=x, seed=0, **KINDS[kind]))


def test_an_open_batch_of_samples_with_rows_of_their_own() -> None:
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = Policy(eta=torch.tensor([0.0, 1.0]))
    with pytest.raises(Exception, match="batch"):
        torch.export.export(program, (states(0),), dynamic_shapes=shapes, strict=False)
    with pytest.raises(ValueError, match=r"x_T: expected shape \(2, 3, 4, 4\), got \(5, 3, 4, 4\)"):
        torch.export.export(program, (states(0, 5),), strict=False)


EXPORT = """
import sys

import torch
from tests.test_compile_sampling import Policy, sampling, states

for name, program in {"sampler": Policy(eta=1.0), "sample": sampling(eta=1.0)}.items():
    # Cold: nothing was called before.
    exported = torch.export.export(program, (states(0),), strict=name == "sampler")
    torch.export.save(exported, f"{sys.argv[1]}/{name}.pt2")
    own = program(states(1))
    assert type(own) is torch.Tensor, name
    assert torch.equal(own, exported.module()(states(1))), name
    torch.save((states(1), own), f"{sys.argv[1]}/{name}.pt")
"""

RUN = """
import sys

import torch

import fastddim

for name in ("sampler", "sample"):
    own = torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()
    x, expected = torch.load(f"{sys.argv[1]}/{name}.pt")
    assert torch.equal(own(x), expected), name
"""


def test_a_file_in_another_process(run_python: RunPython, tmp_path: Path) -> None:
    for script in (EXPORT, RUN):
        result = run_python("-c", script, tmp_path, cwd=ROOT)
        assert result.returncode == 0, result.stderr


def test_inductor() -> None:
    torch._dynamo.reset()
    program = Policy(eta=1.0)
    own = torch.compile(program, fullgraph=True)(states(1))
    torch.testing.assert_close(own, program(states(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["compile", "export", "jit.trace"])
def test_modes_and_gradients(way: str, mode: Any) -> None:
    """Results have no gradients, and the model runs without them, as outside of programs."""
    program = Policy(eta=1.0)
    expected = program(states(1))
    with mode():
        own = WAYS[way](program, states(0))
        result = own(states(1))
    assert torch.equal(result, expected)
    assert not result.requires_grad
    assert torch.equal(program(states(1)), expected)
    if way == "jit.trace" and mode is torch.inference_mode:
        return  # What torch.jit.load makes in inference mode is for inference mode.
    again = own(states(1).requires_grad_())
    assert torch.equal(again, expected)
    assert not again.requires_grad


class OfOwnDtype(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


@pytest.mark.parametrize(
    "way", [pytest.param("compile", marks=needs_handing_on), "export", "jit.trace"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [{"order": 2}, {"guidance_scale": 2.0, "eta": 1.0}], ids=str)
def test_dtypes(kind: dict[str, Any], dtype: torch.dtype, way: str) -> None:
    net = OfOwnDtype() if dtype is not torch.float64 else SmallNet().double()
    program = Program(lambda net, x: fastddim.sample(net, S, x_T=x, seed=0, **kind), net)
    own = WAYS[way](program, states(0).to(dtype))
    x = states(1).to(dtype)
    assert same(own(x), program(x))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(SHAPE[0])]


OUTSIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "callback": lambda: {"callback": lambda *_: None},
    "progress": lambda: {"progress": True},
    "check_finite": lambda: {"check_finite": True},
    "noise": lambda: {"noise": generators(), "eta": 1.0},
    "eta": lambda: {"eta": torch.tensor([0.0, 1.0])},
    "guidance_scale": lambda: {"guidance_scale": [torch.tensor([0.0, 1.0])] * S},
    "steps": lambda: {"steps": torch.tensor([900, 300])},
}
REFUSED: dict[str, dict[str, Any]] = {
    "eta": {"eta": -1.0},
    "steps": {"steps": 0},
    "known": {"mask": MASK},
    "return_trajectory": {"return_trajectory": 1},
    "seed": {"seed": -1},
    "sample_offset": {"sample_offset": 2**32},
    "shape": {"shape": (2, 1)},
    "spacing": {"spacing": "none"},
    "denoised_fn": {"denoised_fn": 3},
    "model_kwargs": {"model_kwargs": 3},
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_no_program_can_hold_runs_outside_of_it(name: str) -> None:
    kind = {"steps": S, "seed": 0, **OUTSIDE[name]()}
    program = Program(lambda net, x: 2 * fastddim.sample(net, x_T=x, **kind))
    expected = program(states(1))
    kind |= OUTSIDE[name]()
    torch._dynamo.reset()
    assert same(torch.compile(program, backend="eager")(states(1)), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fastddim: callback, progress, check"):
        torch.compile(program, backend="eager", fullgraph=True)(states(1))
    message = f"{name}: expected what a program can hold, since sampling is traced"
    for way in ("export", "jit.trace", "make_fx"):
        with pytest.raises(ValueError, match=message):
            WAYS[way](program, states(1))
    with pytest.raises(Exception, match="fastddim: callback, progress, check"):
        strictly_exported(program, states(1))


@pytest.mark.parametrize(("name", "way"), in_turns(3, REFUSED, ("compile", "export", "make_fx")))
def test_refused_arguments(name: str, way: str) -> None:
    """Refused arguments give the same error as outside of programs."""
    kind = {"steps": S, **REFUSED[name]}
    program = Program(lambda net, x: fastddim.sample(net, x_T=x, **kind))
    with pytest.raises((TypeError, ValueError)) as raised:
        program(states(1))
    message = str(raised.value)
    assert message.startswith(f"{'x_T' if name == 'shape' else name}: ")
    torch._dynamo.reset()
    trace = functools.partial(WAYS[way], program)
    if way == "compile":
        trace = torch.compile(program, backend="eager")
    with pytest.raises(type(raised.value), match=re.escape(message)):
        trace(states(1))


def test_a_mask_that_a_program_is_given_later_is_not_taken_on_trust() -> None:
    """A mask that a program gets later is not trusted: the traced mask is within [0, 1], and no
    value is looked at when it runs.
    """
    net, known = SmallNet(), NOISE[0]

    def draw(mask: Tensor) -> Tensor:
        return fastddim.sample(net, S, shape=SHAPE, mask=mask, known=known, seed=1)

    program = make_fx(draw)(MASK)
    assert torch.equal(program(MASK / 2), draw(MASK / 2))
    assert program(255 * MASK)[..., [0, 2, 3]].isnan().all()


def test_a_stream_runs_outside_of_a_compiled_function() -> None:
    class Serving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream = fastddim.Stream(SmallNet(), shape=SHAPE, max_steps=S)

        def forward(self, x: Tensor) -> Tensor:
            ticket = self.stream.submit(S, x_T=x[:1])
            self.stream.run()
            return ticket.result(0) + x

    expected = Serving()(states(1))
    torch._dynamo.reset()
    assert same(torch.compile(Serving(), backend="eager")(states(1)), expected)
    serving = Serving()
    for way in ("export", "jit.trace", "make_fx"):
        with pytest.raises(RuntimeError, match="Stream: expected calls outside of programs"):
            WAYS[way](serving, states(0))
    assert same(serving(states(1)), expected)


def test_copies_of_a_sampler_are_traced() -> None:
    program = Policy(eta=1.0)
    expected = program(states(1))
    assert same(compiled(copy.deepcopy(program), states(0))(states(1)), expected)
    assert same(exported(copy.deepcopy(program), states(0))(states(1)), expected)
