"""A request to a stream gives what `sample` gives for it alone, whatever else is in the batch."""

from __future__ import annotations

import queue
import random
import threading
from concurrent.futures import CancelledError

import pytest
import torch
from torch import nn

import fastddim
from fastddim.loop import cuda
from fastddim.loop.cuda import CaptureError

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model
from .support.recorded_graph import RecordedGraph

SHAPE = (2, 5)


def conditioned(x, t, *, shift, extra):
    """A model of correctly rounded operations, like `elementwise_model`."""
    assert extra["name"] == "fixed"
    assert len(x) == len(t) == len(shift) == len(extra["scale"])
    return elementwise_model(x, t) * extra["scale"][:, :, None] + shift


def random_request(rng, *, guided=False, dtype=torch.float32, order=1, thresholded=False):
    """Arguments that `submit` and `sample` share."""
    steps = rng.choice([1, 2, 3, 5, 8, [900, 500, 3]])
    count = steps if isinstance(steps, int) else len(steps)
    request = {
        "steps": steps,
        "spacing": rng.choice(["uniform", "trailing", "linspace"]),
        "clip": None if thresholded else rng.choice([None, 0.5]),
        "rederive_eps": rng.random() < 0.3,
        "seed": rng.choice([0, 7, 2**63 + 5]),
        "sample_offset": rng.choice([0, 3, 2**32 - 1]),
    }
    if order == 1:
        request["eta"] = rng.choice([0.0, 0.0, 1.0, 0.3, [0.5] * count])
        request["variance"] = rng.choice(["small", "large"])
        request["temperature"] = rng.choice([1.0, 0.7])
    if guided:
        request["guidance_scale"] = rng.choice([0.0, 1.5, 7.0, [2.0] * count])
    if rng.random() < 0.3:
        request["x_T"] = torch.randn(1, *SHAPE, dtype=dtype)
        request["first_step"] = rng.randrange(count) if order == 1 else 0
    return request


def with_conditions(request, parts):
    shift = torch.randn(parts, 1, SHAPE[-1])
    extra = {"scale": torch.rand(parts, SHAPE[0]), "name": "fixed"}
    return {**request, "model_kwargs": {"shift": shift, "extra": extra}}


def with_mask(request):
    mask = torch.rand(SHAPE[-1]) * (torch.rand(SHAPE[-1]) < 0.7)
    return {**request, "mask": mask, "known": torch.randn(1, *SHAPE)}


def halved(x_0, t):
    return x_0.mul_(0.5) + t.reshape(-1, *[1] * (x_0.ndim - 1)) * (1 / 4096)


HOOKED = [
    {},
    {"guided": True, "guidance_rescale": 0.7},
    {"order": 2},
    {"dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    {"guided": True, "masked": True},
]


def drawn_alone(model, request, **common):
    common.setdefault("dtype", torch.float32)
    return fastddim.sample(model, shape=(1, *SHAPE), **{"seed": 0, **request, **common})


def run_in_random_order(stream, requests, rng):
    """Runs in random order: submit a few, take a few steps, and so on."""
    tickets = []
    for request in requests:
        for _ in range(rng.choice([0, 0, 1, 2])):
            stream.step()
        tickets.append(stream.submit(**request))
    stream.run()
    return tickets


@pytest.fixture
def captures(monkeypatch):
    """Records captures on the CPU, and lists the graphs captured so far."""
    recorded = []

    def record(body, warm_up, device, generators):
        for _ in range(cuda.WARM_UPS):
            warm_up()
        try:
            recorded.append(RecordedGraph(body))
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        return recorded[-1]

    monkeypatch.setattr(cuda, "record", record)
    monkeypatch.setattr(cuda, "available", lambda device: True)
    return recorded


class TestIsSample:
    def check(
        self, model, requests, rng, *, slots, guided=False, masked=False, static=False, **common
    ):
        kind = {"guided": guided, "masked": masked}
        stream = fastddim.Stream(model, shape=(slots, *SHAPE), **kind, **common)
        tickets = run_in_random_order(stream, requests, rng)
        if static:
            common = {**common, "graph": False}
        for ticket, request in zip(tickets, requests, strict=True):
            assert torch.equal(ticket.result(0), drawn_alone(model, request, **common)), request
        assert stream.pending == stream.running == 0

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("slots", [1, 2, 5])
    @pytest.mark.parametrize("round", range(3))
    def test_random_mixes(self, impl, slots, round):
        rng = random.Random(f"{slots} {round}")
        requests = [random_request(rng) for _ in range(9)]
        self.check(elementwise_model, requests, rng, slots=slots, impl=impl)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("guided", [False, True])
    @pytest.mark.parametrize("slots", [1, 3])
    def test_conditions_and_guidance(self, impl, guided, slots):
        rng = random.Random(slots)
        requests = [
            with_conditions(random_request(rng, guided=guided), 1 + guided) for _ in range(9)
        ]
        self.check(conditioned, requests, rng, slots=slots, guided=guided, impl=impl)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("prediction", ["sample", "v_prediction", "score"])
    def test_predictions(self, impl, prediction):
        rng = random.Random(1)
        requests = [random_request(rng) for _ in range(6)]
        common = {"prediction": prediction, "schedule": fastddim.Schedule.cosine()}
        self.check(elementwise_model, requests, rng, slots=3, impl=impl, **common)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("guided", [False, True])
    def test_dtypes(self, impl, dtype, own, guided):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(0.5, dtype=own))

            def forward(self, x, t):
                assert x.dtype == own
                return elementwise_model(x, t) * self.scale

        rng = random.Random(2)
        requests = [random_request(rng, guided=guided, dtype=dtype) for _ in range(6)]
        common = {"dtype": dtype, "impl": impl}
        self.check(Model(), requests, rng, slots=3, guided=guided, **common)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("guided", [False, True])
    def test_order_2(self, impl, guided):
        rng = random.Random(3)
        requests = [random_request(rng, order=2, guided=guided) for _ in range(9)]
        self.check(elementwise_model, requests, rng, slots=3, order=2, guided=guided, impl=impl)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_thresholding(self, impl):
        rng = random.Random(4)
        requests = [random_request(rng, thresholded=True) for _ in range(9)]
        common = {"dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
        self.check(elementwise_model, requests, rng, slots=3, impl=impl, **common)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_guidance_rescale(self, impl):
        rng = random.Random(5)
        requests = [with_conditions(random_request(rng, guided=True), 2) for _ in range(9)]
        self.check(
            conditioned, requests, rng, slots=3, guided=True, guidance_rescale=0.7, impl=impl
        )

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("guided", [False, True])
    @pytest.mark.parametrize("order", [1, 2])
    def test_captured(self, impl, guided, order, captures):
        rng = random.Random(6)
        requests = [
            with_conditions(random_request(rng, guided=guided, order=order), 1 + guided)
            for _ in range(12)
        ]
        common = {"guided": guided, "order": order, "impl": impl, "graph": True, "static": True}
        self.check(conditioned, requests, rng, slots=3, **common)
        assert len(captures) == 1

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize(("guided", "order"), [(False, 1), (True, 1), (False, 2), (True, 2)])
    @pytest.mark.parametrize("static", [False, True])
    def test_masks(self, impl, guided, order, static, captures):
        rng = random.Random(7)
        requests = [
            with_mask(with_conditions(random_request(rng, guided=guided, order=order), 1 + guided))
            for _ in range(9)
        ]
        common = {"guided": guided, "order": order, "impl": impl, "graph": static}
        self.check(conditioned, requests, rng, slots=3, masked=True, static=static, **common)
        assert len(captures) == static

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("kind", HOOKED, ids=range(len(HOOKED)))
    @pytest.mark.parametrize("static", [False, True])
    def test_changed_x_0(self, impl, kind, static, captures):
        rng = random.Random(8)
        guided, order = kind.get("guided", False), kind.get("order", 1)
        thresholded = "dynamic_thresholding_ratio" in kind
        requests = []
        for _ in range(9):
            request = random_request(rng, guided=guided, order=order, thresholded=thresholded)
            request["rederive_eps"] = False
            request = with_conditions(request, 1 + guided)
            requests.append(with_mask(request) if kind.get("masked") else request)
        common = {**kind, "denoised_fn": halved, "impl": impl, "graph": static}
        self.check(conditioned, requests, rng, slots=3, static=static, **common)
        assert len(captures) == static

    @pytest.mark.skipif("cpu" not in CPU_IMPLS, reason="the cpu backend alone has such a step")
    @pytest.mark.parametrize(("masked", "name"), [(False, "loop_step"), (True, "masked_loop_step")])
    def test_steps_are_taken_in_one_call(self, masked, name, monkeypatch):
        """Steps are taken in one call if only the model comes between two states."""
        from fastddim.backends import cpu

        taken, made = [], getattr(cpu, name)

        def loop_step(*args, **kwargs):
            take = made(*args, **kwargs)
            return lambda output: taken.append(len(output)) or take(output)

        monkeypatch.setattr(cpu, name, loop_step)
        monkeypatch.setattr(cpu, "update_out", None)
        rng = random.Random(9)
        requests = [random_request(rng) for _ in range(6)]
        if masked:
            requests = [with_mask(request) for request in requests]
        stream = fastddim.Stream(elementwise_model, shape=(3, *SHAPE), masked=masked, impl="cpu")
        tickets = run_in_random_order(stream, requests, rng)
        monkeypatch.undo()
        for ticket, request in zip(tickets, requests, strict=True):
            expected = drawn_alone(elementwise_model, request, impl="reference")
            torch.testing.assert_close(ticket.result(0), expected)
        assert set(taken) == {1, 2, 3}

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_captured_again_where_the_model_changed_between_steps(self, impl, captures):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.full((5,), 0.5))

            def forward(self, x, t):
                return elementwise_model(x, t) * self.scale

        net = Model()
        streams = [
            fastddim.Stream(net, shape=(2, *SHAPE), impl=impl, graph=mode) for mode in (True, False)
        ]
        tickets = [[stream.submit(6, seed=s, eta=1.0) for s in (1, 2)] for stream in streams]

        def in_place():
            net.scale.data.mul_(0.5)

        def moved():
            net.scale.data = torch.full((5,), 0.75)

        def replaced():
            net.scale = nn.Parameter(torch.full((5,), 1.25))

        def evaluated():
            net.eval()

        counts = []
        for change in (in_place, moved, replaced, evaluated, net.train, list):
            change()
            for stream in streams:
                stream.step()
            counts.append(len(captures))
        assert counts == [1, 2, 3, 4, 4, 4]
        for own, expected in zip(*tickets, strict=True):
            assert torch.equal(own.result(0), expected.result(0))

    def test_a_network_agrees_to_rounding(self):
        model = fastddim.models.load("digits")
        stream = fastddim.Stream(model, batch_size=4)
        with torch.no_grad():
            tickets = [stream.submit(s, seed=s, eta=s % 2) for s in (2, 5, 3, 4, 6)]
            stream.run()
            for ticket in tickets:
                s = ticket.steps
                alone = fastddim.sample(model, s, seed=s, eta=s % 2)
                torch.testing.assert_close(ticket.result(0), alone, rtol=1e-3, atol=1e-3)


class Recording:
    """The elementwise model, which keeps the batch sizes and raises or breaks on request."""

    def __init__(self):
        self.sizes, self.error, self.bad = [], None, None

    def __call__(self, x, t):
        self.sizes.append(len(x))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        output = elementwise_model(x, t)
        if self.bad is not None:
            output[self.bad] = torch.nan
        return output


class TestSlots:
    def test_the_batch_is_as_large_as_the_requests_are_many(self):
        model = Recording()
        stream = fastddim.Stream(model, shape=(3, *SHAPE))
        for steps in (1, 3, 2, 2):
            stream.submit(steps)
        assert (stream.pending, stream.running) == (4, 0)
        stream.step()
        assert (stream.pending, stream.running) == (1, 2)
        stream.run()
        assert model.sizes == [3, 3, 2]

    def test_a_captured_batch_is_always_whole_and_idle_slots_hold_zeros(self, captures):
        seen = []

        def model(x, t):
            seen.append((x, t))
            return elementwise_model(x, t)

        stream = fastddim.Stream(model, shape=(3, *SHAPE), graph=True)
        for steps in (1, 4):
            stream.submit(steps)
        for _ in range(3):
            stream.step()
        x, t = seen[-1]
        assert len(x) == 3
        assert t[1:].tolist() == [0, 0]
        assert (x[1:] == 0).all()
        assert (x[0] != 0).all()

    def test_idle_slots_stay_in_the_table(self, captures):
        stream = fastddim.Stream(elementwise_model, shape=(2, *SHAPE), graph=True, max_steps=6)
        for _ in range(3):
            ticket = stream.submit(6, seed=0)
            stream.run()
            assert torch.equal(
                ticket.result(0), drawn_alone(elementwise_model, {"steps": 6}, graph=False)
            )

    def test_tickets_tell_how_far_they_are(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE))
        first, second = stream.submit(2), stream.submit([5, 3, 1])
        assert [(t.index, t.taken, t.steps) for t in (first, second)] == [(0, 0, 2), (1, 0, 3)]
        assert stream.step() == []
        assert (first.taken, second.taken) == (1, 0)
        assert stream.step() == [first]
        assert first.done()
        assert not second.done()
        assert stream.run() == [second]
        assert stream.step() == []

    def test_a_ticket_counts_the_steps_before_its_first(self):
        model = Recording()
        stream = fastddim.Stream(model, shape=(1, *SHAPE))
        ticket = stream.submit(5, x_T=torch.ones(1, *SHAPE), first_step=3)
        assert (ticket.taken, ticket.steps) == (3, 5)
        assert stream.run() == [ticket]
        assert (ticket.taken, model.sizes) == (5, [1, 1])

    def test_iteration_takes_up_what_comes_meanwhile(self):
        stream = fastddim.Stream(elementwise_model, shape=(2, *SHAPE))
        stream.submit(1)
        steps = iter([3, 1, 2])
        seen = []
        for ticket in stream:
            seen.append(ticket.index)
            for S in steps:
                stream.submit(S)
                break
        assert seen == [0, 1, 2, 3]

    def test_tensors_are_those_at_the_time_of_submission(self):
        stream = fastddim.Stream(conditioned, shape=(1, *SHAPE))
        rng = random.Random(0)
        request = with_conditions({**random_request(rng), "x_T": torch.randn(1, *SHAPE)}, 1)
        expected = drawn_alone(conditioned, request)
        ticket = stream.submit(**request)
        request["x_T"].fill_(torch.nan)
        request["model_kwargs"]["shift"].fill_(torch.nan)
        stream.run()
        assert torch.equal(ticket.result(0), expected)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
    def test_results_are_ordinary_tensors_of_the_callers(self, mode):
        with mode():
            stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE))
            tickets = [stream.submit(2, seed=s, x_T=torch.ones(1, *SHAPE)) for s in range(2)]
            stream.run()
        first, second = (ticket.result(0) for ticket in tickets)
        assert not first.is_inference()
        assert not first.requires_grad
        first.zero_()
        assert (second != 0).all()


class TestErrors:
    def test_an_error_fails_the_batch_and_names_it(self):
        model = Recording()
        stream = fastddim.Stream(model, shape=(2, *SHAPE))
        tickets = [stream.submit(2, seed=s) for s in range(3)]
        stream.step()
        model.error = ValueError("boom")
        assert stream.step() == tickets[:2]
        assert (stream.pending, stream.running) == (1, 0)
        timestep = fastddim.select_timesteps(1000, 2)[1]
        for ticket, other in ((tickets[0], 1), (tickets[1], 0)):
            with pytest.raises(RuntimeError) as raised:
                ticket.result(0)
            assert str(raised.value) == (
                f"request {ticket.index} failed at step 1 (timestep {timestep}), in a batch with "
                f"{other}: ValueError: boom"
            )
            assert isinstance(raised.value.__cause__, ValueError)
        assert stream.run() == [tickets[2]]
        expected = drawn_alone(elementwise_model, {"steps": 2, "seed": 2})
        assert torch.equal(tickets[2].result(0), expected)

    def test_a_wrong_output_is_an_error_of_the_model(self):
        stream = fastddim.Stream(lambda x, t: x[:, :1], shape=(1, *SHAPE))
        ticket = stream.submit(2)
        assert stream.run() == [ticket]
        with pytest.raises(RuntimeError, match=r"request 0 .* ValueError: model output: expected"):
            ticket.result(0)

    def test_an_interrupt_is_raised(self):
        model = Recording()
        stream = fastddim.Stream(model, shape=(2, *SHAPE))
        ticket = stream.submit(2)
        model.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            stream.step()
        assert isinstance(ticket.exception(0), RuntimeError)
        again = stream.submit(2, seed=0)
        assert stream.run() == [again]
        assert torch.equal(again.result(0), drawn_alone(elementwise_model, {"steps": 2}))

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("check_finite", [False, True])
    def test_nan_stays_in_its_request(self, impl, check_finite):
        model = Recording()
        stream = fastddim.Stream(
            model, shape=(3, *SHAPE), impl=impl, check_finite=check_finite, order=2
        )
        tickets = [stream.submit(4, seed=s) for s in range(3)]
        stream.step()
        model.bad = 1
        done = stream.step()
        model.bad = None
        later = stream.submit(3, seed=3)
        stream.run()
        assert done == ([tickets[1]] if check_finite else [])
        if check_finite:
            with pytest.raises(ValueError, match=r"got NaN or infinity at step 1 \(timestep 749\)"):
                tickets[1].result(0)
        else:
            assert tickets[1].result(0).isnan().all()
        for ticket, S in ((tickets[0], 4), (tickets[2], 4), (later, 3)):
            request = {"steps": S, "seed": ticket.index}
            expected = drawn_alone(elementwise_model, request, impl=impl, order=2)
            assert torch.equal(ticket.result(0), expected)

    def test_a_capture_that_fails(self, captures):
        def model(x, t):
            return x * float(x.sum())

        stream = fastddim.Stream(model, shape=(1, *SHAPE), graph=True)
        ticket = stream.submit(2)
        stream.run()
        with pytest.raises(RuntimeError, match="graph: expected 'auto' or False where capture"):
            ticket.result(0)
        stream = fastddim.Stream(model, shape=(2, *SHAPE))
        ticket = stream.submit(2, seed=0)
        with pytest.warns(UserWarning, match="runs without a CUDA graph"):
            stream.run()
        assert torch.equal(ticket.result(0), drawn_alone(model, {"steps": 2}, graph=False))


class TestCancel:
    def test_waiting_and_running(self):
        stream = fastddim.Stream(elementwise_model, shape=(2, *SHAPE))
        tickets = [stream.submit(3, seed=s) for s in range(4)]
        stream.step()
        assert tickets[0].cancel()
        assert tickets[2].cancel()
        assert stream.run() == [tickets[1], tickets[3]]
        with pytest.raises(CancelledError):
            tickets[0].result(0)
        for s in (1, 3):
            expected = drawn_alone(elementwise_model, {"steps": 3, "seed": s})
            assert torch.equal(tickets[s].result(0), expected)
        assert not tickets[1].cancel()

    def test_during_the_last_step(self):
        tickets = []

        def model(x, t):
            if len(tickets) == 2 and tickets[0].taken == 1:
                tickets[0].cancel()
            return elementwise_model(x, t)

        stream = fastddim.Stream(model, shape=(2, *SHAPE))
        tickets += [stream.submit(2), stream.submit(2)]
        assert stream.run() == [tickets[1]]
        assert tickets[0].cancelled()

    def test_makes_room(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), max_pending=2)
        first, _ = stream.submit(1), stream.submit(1)
        with pytest.raises(queue.Full, match="max_pending: expected at most 2 waiting requests"):
            stream.submit(1)
        first.cancel()
        stream.submit(1)
        assert len(stream.run()) == 2


class TestThreads:
    def test_one_thread_steps_at_a_time(self):
        def model(x, t):
            with pytest.raises(RuntimeError, match="Stream: expected one call of step at a time"):
                stream.step()
            return elementwise_model(x, t)

        stream = fastddim.Stream(model, shape=(1, *SHAPE))
        ticket = stream.submit(1, seed=0)
        stream.run()
        assert torch.equal(ticket.result(0), drawn_alone(elementwise_model, {"steps": 1}))

    def test_requests_from_many_threads(self):
        stream = fastddim.Stream(elementwise_model, shape=(3, *SHAPE))
        results, stop = {}, threading.Event()

        def ask(seed):
            results[seed] = stream.submit(1 + seed % 4, seed=seed, eta=1.0).result(30)

        def serve():
            while not stop.is_set():
                stream.step()

        server = threading.Thread(target=serve)
        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
        for thread in (server, *clients):
            thread.start()
        for client in clients:
            client.join(30)
        stop.set()
        server.join(30)
        assert set(results) == set(range(12))
        for seed, x in results.items():
            request = {"steps": 1 + seed % 4, "seed": seed, "eta": 1.0}
            assert torch.equal(x, drawn_alone(elementwise_model, request))

    def test_a_callback_may_submit(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE))
        stream.submit(1).add_done_callback(lambda ticket: stream.submit(2))
        assert [ticket.steps for ticket in stream.run()] == [1, 2]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "batch_size: expected the number of slots, or shape, got None for both"),
            ({"shape": (0, 2)}, "shape[0]: expected an integer in [1, 4294967296], got 0"),
            ({"shape": (1, 2), "graph": "loop"}, "graph: expected 'auto', True or False"),
            ({"shape": (1, 2), "max_steps": 1001}, "max_steps: expected an integer in [1, 1000]"),
            ({"shape": (1, 2), "max_pending": 0}, "max_pending: expected an integer in [1, "),
            ({"shape": (1, 2), "guided": 1}, "guided: expected True or False, got 1 (int)"),
            ({"shape": (1, 2), "masked": None}, "masked: expected True or False, got None"),
            ({"shape": (1, 2), "denoised_fn": 3}, "denoised_fn: expected a callable, got int"),
            ({"shape": (1, 2), "order": 3}, "order: expected one of 1, 2, got 3"),
            ({"shape": (1, 2), "guidance_rescale": 0.5}, "guidance_rescale: expected 0 without"),
            ({"shape": (1, 2), "impl": "nothing"}, "impl: expected one of 'auto'"),
        ],
    )
    def test_stream(self, arguments, message):
        with pytest.raises((TypeError, ValueError)) as raised:
            fastddim.Stream(elementwise_model, **arguments)
        assert str(raised.value).startswith(message)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "steps: expected an integer in [1, 1000], got 0"),
            ({"steps": 11}, "steps: expected at most max_steps = 10, got 11"),
            ({"steps": True}, "steps: expected an integer, got True (bool)"),
            ({"eta": -1.0}, "eta: expected a finite number >= 0, got -1.0"),
            ({"eta": [0.1]}, "eta: expected one value a step, 2, got 1 of them"),
            ({"guidance_scale": 2.0}, "guidance_scale: expected None in a stream with guided=Fal"),
            ({"mask": torch.ones(5)}, "mask: expected None in a stream with masked=False, got"),
            ({"known": torch.ones(1, 2, 5)}, "mask: expected a weight of known, got None"),
            ({"seed": [1]}, "seed: expected an integer, got [1] (list)"),
            ({"seed": -1}, "seed: expected an integer in [0, 18446744073709551615], got -1"),
            ({"sample_offset": 2**32}, "sample_offset: expected an integer in [0, 4294967295]"),
            ({"x_T": torch.zeros(2, 5)}, "x_T: expected shape (1, 2, 5), got (2, 5)"),
            ({"first_step": 2}, "first_step: expected an integer in [0, 1], got 2"),
            ({"first_step": 1}, "x_T: expected the state before step 1, the first_step, got None"),
            ({"model_kwargs": {"y": torch.zeros(2)}}, "model_kwargs['y']: expected a tensor [1, "),
            ({"model_kwargs": {"y": torch.zeros(())}}, "model_kwargs['y']: expected a tensor [1"),
            ({"model_kwargs": 3}, "model_kwargs: expected a mapping of names to values, got 3"),
        ],
    )
    def test_submit(self, arguments, message):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), max_steps=10)
        with pytest.raises((TypeError, ValueError)) as raised:
            stream.submit(**{"steps": 2, **arguments})
        assert str(raised.value).startswith(message)
        assert stream.pending == 0

    def test_noise_at_order_2(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), order=2)
        with pytest.raises(ValueError, match="order: expected 1 with eta > 0"):
            stream.submit(2, eta=1.0)

    def test_a_start_in_the_middle_at_order_2(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), order=2)
        with pytest.raises(ValueError, match="first_step: expected 0 at order 2 and with tuned"):
            stream.submit(2, x_T=torch.zeros(1, *SHAPE), first_step=1)

    def test_known_data_in_the_middle_without_a_seed(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), masked=True)
        given = {"x_T": torch.zeros(1, *SHAPE), "known": torch.zeros(1, *SHAPE)}
        with pytest.raises(ValueError, match="seed: expected that of the whole run with mask"):
            stream.submit(2, first_step=1, mask=torch.ones(1), **given)

    def test_guidance_that_lacks(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), guided=True)
        with pytest.raises(ValueError, match="guidance_scale: expected a number in a stream with"):
            stream.submit(2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "mask: expected a tensor in a stream with masked=True, got None"),
            ({"mask": torch.ones(5)}, "known: expected data with mask, got None"),
            ({"mask": torch.ones(3), "known": torch.ones(1, *SHAPE)}, "mask: expected"),
            ({"mask": torch.ones(5), "known": torch.ones(SHAPE)}, "known: expected the shape of"),
        ],
    )
    def test_masks(self, arguments, message):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), masked=True)
        with pytest.raises(ValueError, match=message):
            stream.submit(2, **arguments)
        assert stream.pending == 0

    def test_rederived_epsilon_beside_a_changed_x_0(self):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), denoised_fn=halved)
        with pytest.raises(ValueError, match="rederive_eps: expected False in a stream with"):
            stream.submit(2, rederive_eps=True)

    @pytest.mark.parametrize(
        "other", [{}, {"y": torch.zeros(1, 3)}, {"y": torch.zeros(1, 2), "flag": False}]
    )
    def test_conditions_of_another_kind(self, other):
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE))
        stream.submit(1, model_kwargs={"y": torch.zeros(1, 2), "flag": True})
        with pytest.raises(ValueError, match="model_kwargs: expected the names, shapes, dtypes"):
            stream.submit(1, model_kwargs=other)
