"""A budget of time chooses the most steps whose ticks fit; tests count evaluations as time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import ActionSampler
from fastddim.actions import ActionLog, budget
from fastddim.actions.budget import candidates_of, most_that_fit, quantile, time_of

from .support.models import elementwise_model
from .support.tuned import LINEAR, random_steps

SHAPE = (1, 4, 2)
CPU = torch.device("cpu")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def forward(self, ms: float) -> None:
        self.now += ms / 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(budget, "clock", made)
    return made


class Network:
    """The elementwise model; an evaluation takes 1 ms, and a backward pass `backward` ms."""

    def __init__(self, clock: Clock, backward: float = 0.0) -> None:
        self.clock, self.backward = clock, backward
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        self.clock.forward(1.0)
        self.evaluations += 1
        output = elementwise_model(x, t)
        if output.requires_grad:
            output.register_hook(lambda _: self.clock.forward(self.backward))
        return output


def sampler_of(network: Any, steps: Any, **options: Any) -> ActionSampler:
    return ActionSampler(network, steps, **{"shape": SHAPE, "schedule": LINEAR} | options)


def test_the_most_of_any_number_of_candidates() -> None:
    for n in range(1, 18):
        for most in range(1, n + 1):
            chosen, measured = most_that_fit(list(range(1, n + 1)), lambda s: 2.0 * s, 2 * most)
            assert chosen == most
            assert all(ms == 2.0 * s for s, ms in measured.items())
            assert measured[most] <= 2 * most
            assert most == n or measured[most + 1] > 2 * most
            assert len(measured) <= 2 + math.ceil(math.log2(n))


@pytest.mark.parametrize(("budget_ms", "expected"), [(10.5, 10), (99, 10), (4.5, 4), (1.5, 1)])
def test_the_most_steps_that_fit(clock: Clock, budget_ms: float, expected: int) -> None:
    network = Network(clock)
    sampler = sampler_of(network, 10, budget_ms=budget_ms)
    assert sampler.steps == sampler.plan.steps == expected
    assert sampler.measured == {s: pytest.approx(s) for s in sampler.measured}
    assert {expected, 10} <= set(sampler.measured)
    alone = sampler_of(network, expected)
    assert alone.measured == {}
    assert sampler.tick == alone.tick == 0
    for _ in range(2):
        assert torch.equal(sampler(), alone())


def test_the_fewest_do_not_fit(clock: Clock) -> None:
    message = r"^budget_ms: expected time for the fewest steps, got 0\.5 ms; measured were "
    with pytest.raises(ValueError, match=message + "6 ms for 6 steps, 1 ms for 1 steps$"):
        sampler_of(Network(clock), 6, budget_ms=0.5)
    with pytest.raises(ValueError, match=message + "1 ms for 1 steps$"):
        sampler_of(Network(clock), 1, budget_ms=0.5)


def test_ticks_of_every_kind_fit(clock: Clock) -> None:
    """Ticks of every kind fit: the first tick of an episode takes all steps, a guided one a
    backward pass in each.
    """
    assert sampler_of(Network(clock), 8, warm_start=2, budget_ms=5.5).steps == 5
    with pytest.raises(ValueError, match=r"measured were 8 ms for 8 steps, 3 ms for 3 steps$"):
        sampler_of(Network(clock), 8, warm_start=2, budget_ms=2.5)
    network = Network(clock, backward=3.0)
    assert sampler_of(network, 4, budget_ms=4.5).steps == 4
    sampler = sampler_of(network, 4, chunking="guide", budget_ms=4.5)
    assert sampler.steps == 1
    assert sampler.measured == {4: pytest.approx(16), 1: pytest.approx(4), 2: pytest.approx(8)}
    assert sampler_of(network, 4, chunking="guide", warm_start=1, budget_ms=4.5).steps == 4


def test_candidates_of_ones_own(clock: Clock) -> None:
    tuned = [random_steps(S) for S in (3, 5)]
    network = Network(clock)
    for budget_ms, expected in ((20, 9), (8, 5), (4, 3), (2.5, 2)):
        sampler = sampler_of(network, [9, *tuned, 2], budget_ms=budget_ms)
        assert sampler.steps == expected
        assert set(sampler.measured) <= {2, 3, 5, 9}
    sampler = sampler_of(network, [9, *tuned, 2], budget_ms=8)
    assert torch.equal(sampler(), sampler_of(network, tuned[1])())
    assert sampler_of(network, tuned[0], budget_ms=3).measured == {3: pytest.approx(3)}


def test_the_observation_is_the_given_one(clock: Clock) -> None:
    seen = []

    def network(x: Tensor, t: Tensor, *, y: Tensor) -> Tensor:
        seen.append(y)
        clock.forward(1.0)
        return elementwise_model(x, t)

    y = torch.ones(1, 3)
    assert sampler_of(network, 4, budget_ms=2.5, model_kwargs={"y": y}).steps == 2
    assert all(torch.equal(it, y) for it in seen)


def test_a_log_has_no_tick_that_was_measured(clock: Clock, tmp_path: Any) -> None:
    path = tmp_path / "run.jsonl"
    sampler = sampler_of(Network(clock), 4, budget_ms=2.5, log=path)
    sampler()
    log = ActionLog(path)
    assert [it.tick for it in log] == [0]
    assert len(log.header["plan"]["timesteps"]) == 2


class TestTime:
    def test_is_what_95_percent_of_ticks_keep_to(self, clock: Clock) -> None:
        times = [50.0] * budget.WARM_UPS + [2.0] * 17 + [3.0, 4.0, 90.0]
        given = iter(times)
        assert time_of(lambda: clock.forward(next(given)), CPU) == pytest.approx(4.0)
        assert next(given, None) is None

    @pytest.mark.parametrize(
        ("share", "expected"), [(0.05, 1.0), (0.5, 10.0), (0.95, 19.0), (0.96, 20.0), (1.0, 20.0)]
    )
    def test_quantiles(self, share: float, expected: float) -> None:
        assert quantile([float(v) for v in range(20, 0, -1)], share) == expected

    def test_waits_for_the_device_at_both_ends(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The measurement waits for the device at both ends: work that is still under way belongs
        to its own tick.
        """
        queued: list[float] = []

        def wait(device: torch.device) -> None:
            assert device == CPU
            clock.forward(sum(queued))
            queued.clear()

        monkeypatch.setattr(budget.transfer, "wait", wait)
        assert time_of(lambda: queued.append(5.0), CPU) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget_ms": 0}, ValueError, "budget_ms: expected a finite number > 0, got 0"),
        ({"budget_ms": "5"}, TypeError, "budget_ms: expected a"),
        ({"steps": torch.tensor([9, 3])}, TypeError, "steps: expected a number, TunedSteps, or a"),
        ({"steps": []}, TypeError, "steps: expected a number, TunedSteps, or a sequence of them"),
        ({"steps": True}, TypeError, "steps: expected a number, TunedSteps, or a sequence"),
        ({"steps": [4, True]}, TypeError, "steps[1]: expected a number of steps or TunedSteps"),
        ({"steps": [4, 2.0]}, TypeError, "steps[1]: expected a number of steps or TunedSteps"),
        ({"steps": [5, random_steps(5)]}, ValueError, "steps: expected candidates of different"),
        ({"steps": [0, 5]}, ValueError, "steps: expected an integer in [1, 1000], got 0"),
        ({"steps": 0}, ValueError, "steps: expected an integer in [1, 1000], got 0"),
        ({"warm_start": 4}, ValueError, "warm_start: expected an integer in [1, 3], got 4"),
        ({"chunking": "frozen"}, ValueError, "chunking: expected one of None, 'freeze', 'guide'"),
    ],
)
def test_refusals(
    options: dict[str, Any], error: type[Exception], message: str, clock: Clock
) -> None:
    given = {"steps": 4, "budget_ms": 0.5 if "steps" in options else 5.0, **options}
    with pytest.raises(error) as raised:
        sampler_of(Network(clock), given.pop("steps"), **given)
    assert str(raised.value).startswith(message)


def test_candidates_go_up() -> None:
    assert candidates_of(4) == [1, 2, 3, 4]
    assert candidates_of(4, least=3) == [3, 4]
    assert candidates_of((8, 2, 4)) == [2, 4, 8]


def test_options_are_those_of_the_choice(clock: Clock) -> None:
    """All other options go to the sampler that is chosen."""
    given: dict[str, Any] = {"eta": 1.0, "seed": 3, "clip": 1.0, "warm_start": 1}
    network = Network(clock)
    sampler = sampler_of(network, 6, budget_ms=3.5, **given)
    alone = sampler_of(network, 3, **given)
    assert repr(sampler) == repr(alone)
    assert sampler.header() == alone.header()
    for _ in range(3):
        assert torch.equal(sampler(executed=1), alone(executed=1))
