"""An environment of an `ActionStream` gets its row of an `ActionSampler`, whenever it asks."""

from __future__ import annotations

import asyncio
import copy
import pickle
import queue
import random
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import ActionSampler, ActionStream
from fastddim.actions import ChunkTicket

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model
from .support.recorded_graph import RecordedGraph, recorded_graphs
from .support.tuned import random_steps

N, HORIZON, DIM, TICKS = 3, 5, 2, 4
COSINE = fastddim.Schedule.cosine()
CHANGED: dict[str, Any] = {"denoised_fn": lambda x_0, t: x_0 * 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"eta": 1.0, "temperature": 0.5},
    "warm": {"warm_start": 3, "eta": 0.5, "clip": 1.0},
    "freeze": {"chunking": "freeze"},
    "guide": {"chunking": "guide", "clip": 1.0, "prediction": "v_prediction"},
    "warm and frozen": {"warm_start": 2, "chunking": "freeze", "eta": 1.0, "clip": 1.0},
    "warm and guided": {"warm_start": 1, "chunking": "guide", "max_guidance_weight": 2.0},
    "guidance": {"warm_start": 2, "chunking": "freeze", "guidance_scale": 2.0},
    "order 2": {"order": 2, "chunking": "freeze", "spacing": "uniform"},
    "tuned": {"steps": random_steps(4, schedule=COSINE), "chunking": "freeze"},
    "changed x_0": {**CHANGED, "warm_start": 1},
    "changed x_0, guided": {**CHANGED, "chunking": "guide"},
}


def network(x: Tensor, t: Tensor, *, place: Tensor) -> Tensor:
    return elementwise_model(x, t) + place[:, None, :]


def made(cls: Any, rows: int, **options: Any) -> Any:
    given: dict[str, Any] = {"steps": 4, "shape": (rows, HORIZON, DIM), "schedule": COSINE}
    given |= options
    return cls(given.pop("model", network), given.pop("steps"), **given)


def places(tick: int, guided: bool = False) -> Tensor:
    """The observations of a tick; under guidance those without the condition come first."""
    draw = torch.Generator().manual_seed(tick)
    return torch.rand(N * (1 + guided), DIM, generator=draw)


def numbers(tick: int) -> dict[str, list[int]]:
    rng = random.Random(tick)
    executed = [rng.randrange(HORIZON + 1) for _ in range(N)]
    return {"executed": executed, "frozen": [rng.randrange(HORIZON + 1 - e) for e in executed]}


def chunks_of_sampler(kind: dict[str, Any]) -> list[Tensor]:
    """The chunks `[N, HORIZON, DIM]` of every tick."""
    guided = "guidance_scale" in kind
    sampler = made(ActionSampler, N, seed=5, model_kwargs={"place": places(0, guided)}, **kind)
    return [
        sampler(model_kwargs={"place": places(tick, guided)}, **numbers(tick))
        for tick in range(TICKS)
    ]


def ask(stream: ActionStream, environment: int, tick: int, guided: bool = False) -> ChunkTicket:
    own = {name: values[environment] for name, values in numbers(tick).items()}
    rows = places(tick, guided).view(1 + guided, N, DIM)[:, environment]
    return stream.submit(environment, model_kwargs={"place": rows}, **own)


def chunks_of_stream(
    stream: ActionStream, rng: random.Random, guided: bool = False
) -> list[Tensor]:
    """The chunks, by requests at random times."""
    asked: dict[int, ChunkTicket] = {}
    todo = {environment: iter(range(TICKS)) for environment in range(N)}
    chunks = torch.full((TICKS, N, HORIZON, DIM), torch.nan, dtype=stream.dtype)
    while todo:
        for environment in [e for e in todo if e not in asked and rng.random() < 0.4]:
            tick = next(todo[environment], None)
            if tick is None:
                del todo[environment]
            else:
                asked[environment] = ask(stream, environment, tick, guided)
                assert asked[environment].tick == tick
        for ticket in stream.step():
            assert asked.pop(ticket.environment) is ticket
            chunks[ticket.tick, ticket.environment] = ticket.result(0)
    return list(chunks)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Graphs by recording, on the CPU."""
    with recorded_graphs(monkeypatch) as graphs:
        yield graphs


class TestIsTheSampler:
    def check(self, kind: dict[str, Any], slots: int, **options: Any) -> None:
        guided = "guidance_scale" in kind
        expected = chunks_of_sampler(kind | {"graph": False})
        stream = made(ActionStream, slots, environments=N, seed=5, **kind, **options)
        own = chunks_of_stream(stream, random.Random(slots), guided)
        assert all(map(torch.equal, own, expected))
        assert stream.pending == stream.running == 0

    @pytest.mark.parametrize("slots", [1, 2])
    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_bit_for_bit(self, kind: dict[str, Any], slots: int) -> None:
        self.check(kind, slots)

    @pytest.mark.parametrize("kind", ["warm and frozen", "warm and guided"])
    def test_in_a_captured_batch(self, kind: str, recorded: list[RecordedGraph]) -> None:
        self.check(KINDS[kind], 2, graph=True)
        assert len(recorded) == 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        self.check(KINDS["warm and guided"] | {"dtype": dtype}, 2)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_backends(self, impl: str) -> None:
        self.check(KINDS["warm and frozen"] | {"impl": impl}, 2)

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
    def test_in_the_modes_of_the_caller(self, mode: Any) -> None:
        expected = chunks_of_sampler(KINDS["warm and guided"])
        with mode():
            stream = made(ActionStream, N, seed=5, **KINDS["warm and guided"])
            for tick in range(2):
                tickets = [ask(stream, environment, tick) for environment in range(N)]
                stream.run()
        for ticket in tickets:
            chunk = ticket.result(0)
            assert not chunk.is_inference()
            assert not chunk.requires_grad
            assert torch.equal(chunk, expected[1][ticket.environment])


def test_a_chunk_is_the_owners() -> None:
    """A change of a chunk by its owner does not change the next chunk."""
    stream = made(ActionStream, 1, environments=N, seed=5, warm_start=2)
    expected = chunks_of_sampler({"warm_start": 2})
    for tick in range(2):
        ticket = ask(stream, 1, tick)
        stream.run()
        assert torch.equal(ticket.result(0), expected[tick][1])
        ticket.result(0).fill_(torch.nan)


class TestReset:
    def test_forgets_one_environment(self) -> None:
        stream = made(ActionStream, 2, environments=N, seed=5, warm_start=2)
        for environment in range(2):
            ask(stream, environment, 0)
        stream.run()
        stream.reset(0)
        tickets = [ask(stream, environment, 1) for environment in range(2)]
        stream.run()
        sampler = made(ActionSampler, N, seed=5, model_kwargs={"place": places(1)}, warm_start=2)
        sampler.restore(1)
        assert [ticket.tick for ticket in tickets] == [1, 1]
        assert torch.equal(tickets[0].result(0), sampler(**numbers(1))[0])
        assert torch.equal(tickets[1].result(0), chunks_of_sampler({"warm_start": 2})[1][1])
        stream.reset()
        again = ask(stream, 1, 2)
        stream.run()
        sampler.restore(2)
        expected = sampler(model_kwargs={"place": places(2)}, **numbers(2))
        assert torch.equal(again.result(0), expected[1])

    def test_cancels_the_request_under_way(self) -> None:
        stream = made(ActionStream, 1, environments=N, warm_start=2)
        first, other = ask(stream, 0, 0), ask(stream, 1, 0)
        stream.step()
        stream.reset(0)
        assert first.cancelled()
        after = ask(stream, 0, 1)
        assert stream.run() == [other, after]
        assert (first.tick, after.tick) == (0, 1)

    def check_the_next_begins_anew(self, stream: ActionStream) -> None:
        ticket = ask(stream, 0, 1)
        stream.run()
        sampler = made(ActionSampler, N, seed=5, model_kwargs={"place": places(1)}, warm_start=2)
        sampler.restore(1)
        assert torch.equal(ticket.result(0), sampler(**numbers(1))[0])

    def test_in_a_callback(self) -> None:
        stream = made(ActionStream, 1, environments=N, seed=5, warm_start=2)
        ask(stream, 0, 0).add_done_callback(lambda _: stream.reset(0))
        stream.run()
        self.check_the_next_begins_anew(stream)

    def test_before_a_chunk_is_kept(self) -> None:
        """A chunk is drawn by one thread, and forgotten by another before the first has kept it."""
        stream = made(ActionStream, 1, environments=N, seed=5, warm_start=2)
        ticket = ask(stream, 0, 0)
        for _ in range(3):
            stream.step()
        with stream._lock:
            server = threading.Thread(target=stream.step)
            server.start()
            assert ticket._request is not None
            ticket._request.result(30)
            assert not ticket.done()
            stream.reset(0)
        server.join(30)
        assert torch.equal(ticket.result(30), chunks_of_sampler({"warm_start": 2})[0][0])
        self.check_the_next_begins_anew(stream)


class TestTickets:
    def test_one_at_a_time_for_an_environment(self) -> None:
        stream = made(ActionStream, 1, environments=N)
        ask(stream, 2, 0)
        message = "environment: expected one whose last request is done, got 2, whose tick 0 is not"
        with pytest.raises(RuntimeError, match=message):
            ask(stream, 2, 1)
        stream.run()
        assert ask(stream, 2, 1).tick == 1

    def test_cancelled(self) -> None:
        stream = made(ActionStream, 1, environments=N, seed=5, warm_start=2)
        ask(stream, 0, 0)
        stream.run()
        first = ask(stream, 0, 1)
        assert not first.done()
        assert first.cancel()
        assert first.cancel()
        assert first.cancelled()
        assert wait([first], timeout=0).done == {first}
        with pytest.raises(CancelledError):
            first.result(0)
        assert stream.run() == []
        # The last chunk is that of tick 0 still.
        second = ask(stream, 0, 2)
        stream.run()
        sampler = made(ActionSampler, N, seed=5, model_kwargs={"place": places(2)}, warm_start=2)
        sampler.restore(2, chunks_of_sampler({"warm_start": 2})[0])
        assert torch.equal(second.result(0), sampler(**numbers(2))[0])
        assert not second.cancel()

    def test_failed(self) -> None:
        failing = [False]

        def model(x: Tensor, t: Tensor, *, place: Tensor) -> Tensor:
            if failing[0]:
                raise ValueError("boom")
            return network(x, t, place=place)

        stream = made(ActionStream, 2, environments=N, model=model, seed=5, warm_start=2)
        ask(stream, 0, 0)
        stream.run()
        failing[0] = True
        tickets = [ask(stream, environment, 1) for environment in (1, 0)]
        assert stream.step() == tickets
        for ticket in tickets:
            with pytest.raises(RuntimeError, match="ValueError: boom"):
                ticket.result(0)
        failing[0] = False
        ticket = ask(stream, 0, 2)
        stream.run()
        sampler = made(ActionSampler, N, seed=5, model_kwargs={"place": places(2)}, warm_start=2)
        sampler.restore(2, chunks_of_sampler({"warm_start": 2})[0])
        assert torch.equal(ticket.result(0), sampler(**numbers(2))[0])

    def test_come_in_the_order_of_the_requests(self) -> None:
        stream = made(ActionStream, N, environments=N)
        tickets = [ask(stream, environment, 0) for environment in (2, 0, 1)]
        assert [ticket.index for ticket in tickets] == [0, 1, 2]
        assert stream.run() == tickets

    def test_show_what_they_are(self) -> None:
        stream = made(ActionStream, 1, environments=N)
        first, second = (ask(stream, environment, 0) for environment in range(2))
        assert repr(first) == "ChunkTicket(environment=0, tick=0, pending)"
        second.cancel()
        stream.run()
        assert repr(first) == "ChunkTicket(environment=0, tick=0, done)"
        assert repr(second) == "ChunkTicket(environment=1, tick=0, cancelled)"
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="ChunkTicket: expected to stay where its stream"):
                copied(first)

    def test_can_be_awaited(self) -> None:
        stream = made(ActionStream, 1, environments=N, seed=5)

        async def main() -> Tensor:
            ticket = ask(stream, 0, 0)
            loop = asyncio.get_running_loop()
            served = loop.run_in_executor(None, stream.run)
            chunk = await asyncio.wrap_future(ticket)
            await served
            return chunk

        assert torch.equal(asyncio.run(main()), chunks_of_sampler({})[0][0])

    def test_of_a_full_stream(self) -> None:
        stream = made(ActionStream, 1, environments=N, max_pending=1)
        ask(stream, 0, 0)
        with pytest.raises(queue.Full, match="max_pending: expected at most 1"):
            ask(stream, 1, 0)
        stream.run()
        assert ask(stream, 1, 0).tick == 0


def test_threads() -> None:
    """Robots ask from threads of their own, while one thread serves them."""
    kind = KINDS["warm and frozen"]
    expected = chunks_of_sampler(kind)
    stream = made(ActionStream, 2, environments=N, seed=5, **kind)
    over, wrong = threading.Event(), []

    def drive(environment: int) -> None:
        for tick in range(TICKS):
            chunk = ask(stream, environment, tick).result(30)
            if not torch.equal(chunk, expected[tick][environment]):
                wrong.append((environment, tick))

    def serve() -> None:
        while not over.is_set():
            stream.step()

    server = threading.Thread(target=serve)
    robots = [threading.Thread(target=drive, args=(environment,)) for environment in range(N)]
    for thread in (server, *robots):
        thread.start()
    for thread in robots:
        thread.join(60)
        assert not thread.is_alive()
    over.set()
    server.join(30)
    assert wrong == []


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on(copied: Any) -> None:
    kind = KINDS["warm and guided"]
    expected = chunks_of_sampler(kind)
    stream = made(ActionStream, 1, environments=N, seed=5, **kind)
    ask(stream, 1, 0)
    with pytest.raises(RuntimeError, match="Stream: expected no request to copy or pickle it"):
        copied(stream)
    stream.run()
    other = copied(stream)
    for one in (other, stream):
        ticket = ask(one, 1, 1)
        assert ticket.tick == 1
        one.run()
        assert torch.equal(ticket.result(0), expected[1][1])
    assert repr(other) == repr(stream)


def test_sample_indices_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = made(ActionStream, 1, environments=N)
    stream._ticks = [2**32 // N] * N
    assert 2**32 % N == 1
    ask(stream, 0, 0)
    with pytest.raises(RuntimeError, match="expected sample indices below 2\\*\\*32, got tick"):
        ask(stream, 1, 0)


def test_shows_what_it_is() -> None:
    stream = made(ActionStream, 2, environments=64, seed=5, warm_start=1, chunking="freeze")
    ask(stream, 0, 0)
    assert repr(stream) == (
        "ActionStream(network, shape=(2, 5, 2), running=0, pending=1, dtype=torch.float32, "
        "device='cpu', impl='cpu', graph='auto', steps=4 (999 to 249, trailing), environments=64, "
        "seed=5, warm_start=1, chunking='freeze')"
    ).replace("'cpu', graph", f"{CPU_IMPLS[0]!r}, graph")


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shape": (2, 3)}, "shape: expected (B, horizon, action_dim), none of them 0, got"),
            ({"environments": 0}, "environments: expected an integer in [1, 4294967296], got 0"),
            ({"seed": -1}, "seed: expected an integer in [0, 18446744073709551615], got -1"),
            ({"seed": None}, "seed: expected an integer, got None"),
            ({"warm_start": 4}, "warm_start: expected an integer in [1, 3], got 4"),
            ({"warm_start": 1, "order": 2}, "warm_start: expected None at order 2 and with tuned"),
            ({"chunking": "hard"}, "chunking: expected one of None, 'freeze', 'guide', got 'hard'"),
            ({"chunking": "guide", "guidance_scale": 2.0}, "guidance_scale: expected None with"),
            ({"max_guidance_weight": -1}, "max_guidance_weight: expected a finite number >= 0"),
            ({"steps": 0}, "steps: expected an integer in [1, 1000], got 0"),
            ({"eta": torch.ones(2)}, "eta: expected"),
            ({"max_pending": 0}, "max_pending: expected an integer in [1, "),
            ({**CHANGED, "rederive_eps": True}, "denoised_fn: expected None in an"),
            ({**CHANGED, "chunking": "guide", "clip": 1.0}, "denoised_fn: expected None in an"),
        ],
    )
    def test_stream(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as raised:
            made(ActionStream, 1, **options)
        assert str(raised.value).startswith(message)

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"environment": 3}, "environment: expected an integer in [0, 2], got 3"),
            ({"executed": 6}, "executed: expected an integer in [0, 5], got 6"),
            ({"executed": 2, "frozen": 4}, "frozen: expected an integer in [0, 3], got 4"),
            ({"model_kwargs": {"place": torch.ones(2, 2)}}, "model_kwargs['place']: expected a "),
            ({"model_kwargs": 3}, "model_kwargs: expected a mapping of names to values, got 3"),
        ],
    )
    def test_submit(self, request_: dict[str, Any], message: str) -> None:
        stream = made(ActionStream, 1, environments=N, chunking="guide")
        given = {"environment": 0, "model_kwargs": {"place": torch.ones(1, 2)}, **request_}
        with pytest.raises((TypeError, ValueError)) as raised:
            stream.submit(given.pop("environment"), **given)
        assert str(raised.value).startswith(message)
        assert stream.pending == 0
        assert ask(stream, 0, 0).tick == 0

    def test_reset(self) -> None:
        with pytest.raises(ValueError, match=r"environment: expected an integer in \[0, 2\], got"):
            made(ActionStream, 1, environments=N).reset(3)
