"""Calls without a seed: they differ, `torch.manual_seed` repeats them, and no more is drawn than
one number where noise comes from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastddim
from fastddim import Sampler, Schedule, philox, transfer

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model

SHAPE = (2, 3, 4)
X = torch.linspace(-1, 1, 24).reshape(SHAPE)
NOISE = X.expand(3, *SHAPE)
SAMPLER = Sampler(elementwise_model, 3, shape=SHAPE, eta=1.0)
PLAIN = Sampler(elementwise_model, 3, shape=SHAPE)
STREAM = fastddim.Stream(elementwise_model, shape=SHAPE)


def sample(**given: Any) -> Tensor:
    return fastddim.sample(elementwise_model, 3, **{"shape": SHAPE, **given})


def step(x: Tensor = X, **given: Any) -> Any:
    return fastddim.step(x, x.cos(), 0.3, 0.6, **{"eta": 1.0, **given})


def submitted(**given: Any) -> Tensor:
    ticket = STREAM.submit(3, **given)
    STREAM.run()
    return ticket.result(0)


DRAWING: dict[str, Callable[..., Tensor]] = {
    "sample": sample,
    "sample, given x_T": lambda **given: sample(x_T=X, eta=0.5, **given),
    "sample, given noise": lambda **given: sample(noise=NOISE, eta=0.5, **given),
    "sample, offset": lambda **given: sample(sample_offset=7, **given),
    "sample, some steps": lambda **given: sample(x_T=X, eta=[0.0, 1.0, 0.0], **given),
    "Sampler": SAMPLER,
    "step": step,
    "step, in place": lambda **given: step(X.clone(), out=torch.empty(SHAPE), **given),
    "submit": submitted,
    "submit, given x_T": lambda **given: submitted(x_T=X[:1], eta=0.5, **given),
    "add_noise": lambda **given: Schedule.linear().add_noise(X, 500, **given),
    "initial_latents": lambda **given: philox.initial_latents(SHAPE, **given),
    "step_noise": lambda **given: philox.step_noise(SHAPE, 2, **given),
}


def drawn_once(call: Callable[[], Any]) -> int:
    """The seed that is drawn in a call, which draws nothing else."""
    torch.manual_seed(9)
    seed = int(torch.randint(0, 2**63 - 1, ()))
    after = torch.get_rng_state()
    torch.manual_seed(9)
    call()
    assert torch.equal(torch.get_rng_state(), after)
    return seed


@pytest.mark.parametrize("call", DRAWING.values(), ids=DRAWING)
def test_calls_differ_and_repeat(call: Callable[..., Tensor]) -> None:
    torch.manual_seed(9)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert torch.equal(call(), first)
    assert torch.equal(call(seed=None), second)


@pytest.mark.parametrize("call", DRAWING.values(), ids=DRAWING)
def test_one_number_is_drawn_and_is_the_seed(call: Callable[..., Tensor]) -> None:
    results: list[Tensor] = []
    seed = drawn_once(lambda: results.append(call()))
    assert torch.equal(results[0], call(seed=seed))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_every_backend_draws_the_same_seed(impl: str) -> None:
    results: list[Tensor] = []
    seed = drawn_once(lambda: results.append(sample(eta=1.0, impl=impl)))
    assert torch.equal(results[0], sample(eta=1.0, impl=impl, seed=seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


STILL: dict[str, Callable[[Path], Any]] = {
    "given x_T": lambda _: sample(x_T=X),
    "given x_T and noise": lambda _: sample(x_T=X, noise=NOISE, eta=1.0),
    "generator": lambda _: sample(noise=generator(), eta=1.0),
    "generators": lambda _: sample(noise=[generator(), generator()], eta=1.0),
    "generator, given x_T": lambda _: sample(x_T=X, noise=generator(), eta=1.0),
    "seed": lambda _: sample(seed=1, eta=1.0),
    "seeds": lambda _: sample(seed=[1, 2], eta=1.0),
    "Sampler": lambda _: PLAIN(x_T=X),
    "step without noise": lambda _: step(eta=0.0),
    "step of given noise": lambda _: step(noise=X),
    "step of a generator": lambda _: step(noise=generator()),
    "step of a seed": lambda _: step(seed=1),
    "submit": lambda _: submitted(x_T=X[:1]),
    "submit, seed": lambda _: submitted(seed=1, eta=1.0),
    "add_noise": lambda _: Schedule.linear().add_noise(X, 500, X),
    "invert": lambda _: fastddim.invert(elementwise_model, X, 3),
    "generate": lambda folder: fastddim.generate(
        elementwise_model,
        3,
        folder / "run",
        stop=2,
        shape=SHAPE,
        model_id="model",
        progress=False,
        format="safetensors",
        eta=1.0,
    ),
}


@pytest.mark.parametrize("call", STILL.values(), ids=STILL)
def test_where_no_noise_comes_from_it_no_seed_is_drawn(
    call: Callable[[Path], Any], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    call(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_is_of_the_cpu_whatever_the_default_device() -> None:
    def on_meta() -> None:
        with torch.device("meta"):
            sample(device="cpu")

    drawn_once(on_meta)


def test_no_call_is_refused_for_its_seed() -> None:
    """Every drawn seed may also be given."""
    for _ in range(200):
        assert 0 <= int(philox.fresh_seed(torch.device("cpu"))) < 2**63


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "step": step,
    "Sampler": lambda x: SAMPLER(x_T=x),
    "Sampler, latents": lambda x: PLAIN() + 0 * x,
    "sample": lambda x: fastddim.sample(elementwise_model, 3, x_T=x, eta=1.0),
}


def jit_traced(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(call, (x,), check_trace=False)


def exported(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    return torch.export.export(Module(), (x,), strict=False).module()


def compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)


WAYS: dict[str, Callable[..., Any]] = {
    "compile": compiled,
    "export": exported,
    "jit.trace": jit_traced,
    "make_fx": lambda call, x: make_fx(call)(x),
    "symbolic make_fx": lambda call, x: make_fx(
        call, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x),
}
HANDS_ON = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_a_program_draws_whenever_it_runs(name: str, way: str) -> None:
    if name == "sample" and way == "compile" and not HANDS_ON:
        pytest.skip("before torch 2.13 only a Sampler can be a part of a compiled function")
    own = WAYS[way](CALLS[name], X)
    torch.manual_seed(9)
    first, second = own(X), own(X)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert torch.equal(own(X), first)
    torch.manual_seed(9)
    assert torch.equal(CALLS[name](X), first)


def test_a_program_of_the_default_compiler() -> None:
    torch._dynamo.reset()
    own = torch.compile(CALLS["Sampler"], fullgraph=True)
    torch.manual_seed(9)
    first, second = own(X), own(X)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert torch.equal(own(X), first)


class TestVmap:
    """torch's own rules of randomness under `vmap`."""

    def mapped(self, randomness: str, **given: Any) -> Tensor:
        states = X.expand(3, *SHAPE)
        result: Tensor = torch.vmap(lambda x: step(x, **given), randomness=randomness)(states)
        return result

    def test_same(self) -> None:
        first, *others = self.mapped("same")
        assert all(torch.equal(first, other) for other in others)
        assert not torch.equal(first, self.mapped("same")[0])

    def test_different(self) -> None:
        torch.manual_seed(9)
        first, second, third = own = self.mapped("different")
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
        torch.manual_seed(9)
        assert torch.equal(self.mapped("different"), own)

    def test_error(self) -> None:
        with pytest.raises(RuntimeError, match="vmap: called random operation while in randomness"):
            self.mapped("error")
        assert torch.equal(self.mapped("error", seed=3)[1], step(seed=3))
        assert torch.equal(self.mapped("error", eta=0.0)[1], step(eta=0.0))


def test_derivatives_follow_the_noise_that_was_added() -> None:
    def loss(x: Tensor) -> Tensor:
        made: Tensor = step(x).square().sum()
        return made

    torch.manual_seed(9)
    expected = step().square().sum()
    torch.manual_seed(9)
    gradient, value = torch.func.grad_and_value(loss)(X)
    torch.testing.assert_close(value, expected)
    torch.manual_seed(9)
    (own,) = torch.autograd.grad(loss(x := X.clone().requires_grad_()), x)
    torch.testing.assert_close(own, gradient)


def test_checkpointing_takes_the_step_again_with_the_same_noise() -> None:
    from torch.utils.checkpoint import checkpoint

    def gradient(call: Callable[[Tensor], Any]) -> Tensor:
        torch.manual_seed(9)
        x = X.clone().requires_grad_()
        call(x).pow(3).sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(lambda x: checkpoint(step, x, use_reentrant=False)), gradient(step))


@pytest.mark.parametrize(
    "call",
    [sample, SAMPLER, step, submitted, DRAWING["add_noise"]],
    ids=["sample", "Sampler", "step", "submit", "add_noise"],
)
def test_a_capture_of_the_callers_asks_for_a_seed(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "captured", lambda device: True)
    with pytest.raises(ValueError, match=r"^seed: expected an int, or an .* got None$"):
        call()
    call(seed=1)
