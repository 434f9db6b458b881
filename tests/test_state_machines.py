"""Calls in any order give what fresh calls of `sample` give."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastddim

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model

SHAPE = (2, 5)
SEEDS = st.integers(0, 2**64 - 1)
STEPS = st.integers(1, 6)
ETAS = st.sampled_from([0.0, 0.4, 1.0])


class Boom(Exception):
    """An error that a model or a callback raises here."""


class Unreliable:
    """The elementwise model, which raises at its n-th call from now on request."""

    def __init__(self) -> None:
        self.calls_left: int | None = None

    def __call__(self, x, t, shift=0.0):
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.calls_left = None
                raise Boom
        return elementwise_model(x, t) + shift


class StreamMachine(RuleBasedStateMachine):
    """Requests that come, go, are cancelled and fail, against `sample` for each that is done."""

    SLOTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.model = Unreliable()
        self.open = {}

    @initialize(impl=st.sampled_from(CPU_IMPLS))
    def start(self, impl):
        self.impl = impl
        self.stream = fastddim.Stream(self.model, shape=(self.SLOTS, *SHAPE), impl=impl)

    @rule(
        steps=STEPS,
        eta=ETAS,
        variance=st.sampled_from(["small", "large"]),
        clip=st.sampled_from([None, 0.5]),
        seed=SEEDS,
        sample_offset=st.integers(0, 2**32 - 1),
        shift=st.sampled_from([-0.5, 0.0, 0.25]),
        given=st.booleans(),
    )
    def submit(self, shift, given, **request):
        if given:
            request["x_T"] = torch.full((1, *SHAPE), shift)
        request["model_kwargs"] = {"shift": torch.full((1, 1, 1), shift)}
        ticket = self.stream.submit(**request)
        self.open[ticket] = request

    def check(self, tickets):
        for ticket in tickets:
            request = self.open.pop(ticket)
            expected = fastddim.sample(
                elementwise_with_shift, shape=(1, *SHAPE), impl=self.impl, **request
            )
            assert torch.equal(ticket.result(0), expected), request
            assert ticket.taken == ticket.steps

    @rule()
    def step(self):
        before = {ticket: ticket.taken for ticket in self.open}
        self.check(self.stream.step())
        advanced = sum(ticket.taken - taken for ticket, taken in before.items())
        assert advanced == min(self.SLOTS, len(before))

    @rule()
    def drain(self):
        self.check(self.stream.run())
        assert not self.open

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(list(self.open)))
        assert ticket.cancel()
        del self.open[ticket]

    @precondition(lambda self: self.open)
    @rule()
    def fail(self):
        self.model.calls_left = 0
        failed = self.stream.step()
        assert len(failed) == min(self.SLOTS, len(self.open))
        for ticket in failed:
            del self.open[ticket]
            error = ticket.exception(0)
            assert isinstance(error.__cause__, Boom)
            assert str(error).startswith(f"request {ticket.index} failed at step {ticket.taken} ")

    @invariant()
    def slots_are_bounded(self):
        assert self.stream.running <= self.SLOTS
        assert self.stream.pending + self.stream.running >= len(self.open)


def elementwise_with_shift(x, t, shift):
    return elementwise_model(x, t) + shift


CALLS = {
    "which": st.integers(0, 1),
    "seed": SEEDS,
    "start": st.booleans(),
    "noise": st.booleans(),
    "masked": st.booleans(),
}


class SamplerMachine(RuleBasedStateMachine):
    """Samplers of two plans that are used, and interrupted, in any order."""

    BATCH = 2

    def __init__(self) -> None:
        super().__init__()
        self.model = Unreliable()
        self.kinds = [
            {"steps": 4, "eta": [1.0, 0.0, 0.5, 1.0], "clip": 0.7},
            {"steps": 3, "order": 2},
        ]
        self.shape = (self.BATCH, *SHAPE)

    @initialize(impl=st.sampled_from(CPU_IMPLS))
    def prepare(self, impl):
        self.impl = impl
        self.samplers = [
            fastddim.Sampler(self.model, shape=self.shape, impl=impl, **kind) for kind in self.kinds
        ]

    def arguments(self, which, seed, start, noise, masked):
        """The arguments that a call and `sample` share, with the same tensors in each."""
        generator = torch.Generator().manual_seed(seed % 2**63)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        arguments = {"seed": seed}
        if start:
            arguments["x_T"] = draw(*self.shape)
        if noise:
            arguments["noise"] = draw(self.kinds[which]["steps"], *self.shape)
        if masked:
            arguments["mask"] = draw(1, 1, SHAPE[1]) > 0
            arguments["known"] = draw(*self.shape)
        return arguments

    def expected(self, which, arguments):
        return fastddim.sample(
            elementwise_model,
            return_trajectory=True,
            shape=self.shape,
            impl=self.impl,
            **self.kinds[which],
            **arguments,
        )

    @rule(**CALLS, trajectory=st.booleans())
    def call(self, which, trajectory, **kind):
        arguments = self.arguments(which, **kind)
        result = self.samplers[which](return_trajectory=trajectory, **arguments)
        states = self.expected(which, arguments)
        assert torch.equal(result, states if trajectory else states[-1])

    @rule(which=st.integers(0, 1), first=SEEDS, second=SEEDS)
    def seeds(self, which, first, second):
        arguments = {"seed": [first, second]}
        result = self.samplers[which](**arguments)
        assert torch.equal(result, self.expected(which, arguments)[-1])

    @rule(**CALLS)
    def watch(self, which, **kind):
        arguments = self.arguments(which, **kind)
        seen = []
        self.samplers[which](callback=lambda s, t, x_t, x_0: seen.append(x_t), **arguments)
        assert torch.equal(torch.stack(seen), self.expected(which, arguments)[1:])

    @rule(**CALLS, at=st.integers(0, 2))
    def fail_in_the_model(self, which, at, **kind):
        self.model.calls_left = at
        with pytest.raises(Boom):
            self.samplers[which](**self.arguments(which, **kind))

    @rule(**CALLS, at=st.integers(0, 2))
    def fail_in_the_callback(self, which, at, **kind):
        def callback(s, t, x_t, x_0):
            x_t.fill_(torch.nan)
            if s == at:
                raise Boom

        with pytest.raises(Boom):
            self.samplers[which](callback=callback, **self.arguments(which, **kind))

    @rule(which=st.integers(0, 1))
    def refuse(self, which):
        with pytest.raises(ValueError, match="x_T: expected shape"):
            self.samplers[which](x_T=torch.zeros(1))
        with pytest.raises(ValueError, match="mask: expected a weight of known"):
            self.samplers[which](known=torch.zeros(self.shape))


TestStream = StreamMachine.TestCase
TestStream.settings = settings(max_examples=25, stateful_step_count=25)
TestSampler = SamplerMachine.TestCase
TestSampler.settings = settings(max_examples=20, stateful_step_count=12)
