"""`fastddim.tune` against closed forms, full walks and brute force."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim.options import TuneOptions, Update
from fastddim.plan import make_plan
from fastddim.tuning.candidate import (
    Candidate,
    Steps,
    broad_changes,
    timestep_changes,
    weight_changes,
)
from fastddim.tuning.network import Network
from fastddim.tuning.search import EFFORTS
from fastddim.tuning.teacher import jump_costs, shortest_path
from fastddim.tuning.trials import Task, Trials
from fastddim.tuning.tuner import FIRST_SAMPLE, Tuner

SCHEDULE = fastddim.Schedule.linear()
QUICKLY: dict[str, Any] = {"samples": 64, "progress": False}


class Mixture:
    """ε of points around fixed centres, in closed form.

    With N(x; √ᾱ·c, ᾱ·s² + 1 − ᾱ) for each centre c, ε is −√(1 − ᾱ) times the score of their mean.
    """

    def __init__(
        self, shape: tuple[int, ...] = (6,), schedule: Any = SCHEDULE, prediction: str = "epsilon"
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.sample_shape = shape
        self.schedule = schedule
        self.prediction = prediction
        self.centres = 1.5 * torch.randn((5, *shape), generator=generator)
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        ones = [1] * (x.ndim - 1)
        a = self.schedule.alphas_cumprod[t].to(x).reshape(-1, *ones)
        variance = a * 0.3**2 + 1 - a
        apart = x[:, None] - a.sqrt()[:, None] * self.centres.to(x)
        nearness = -apart.square().flatten(2).sum(2) / (2 * variance.reshape(-1, 1))
        weights = nearness.softmax(1).reshape(*nearness.shape, *ones)
        score = -(weights * apart).sum(1) / variance
        epsilon = -(1 - a).sqrt() * score
        if self.prediction == "epsilon":
            return epsilon
        x_0 = (x + (1 - a) * score) / a.sqrt().clamp_min(1e-6)
        at_noise = (1 - a).sqrt() * x - x_0
        return torch.where(a > 0, a.sqrt() * epsilon - (1 - a).sqrt() * x_0, at_noise)


def exact(model: Any, x_T: Tensor, **options: Any) -> Tensor:
    return fastddim.sample(model, 800, x_T=x_T, order=2, **options)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().square().mean().sqrt())


@pytest.fixture(scope="module")
def tuned() -> dict[int, fastddim.TunedSteps]:
    return fastddim.tune(Mixture(), [4, 8], **QUICKLY)  # type: ignore[return-value]


@pytest.mark.parametrize("steps", [4, 8])
def test_tuned_steps_beat_orders_1_and_2_on_other_latents(
    tuned: dict[int, fastddim.TunedSteps], steps: int
) -> None:
    model = Mixture()
    x_T = fastddim.philox.initial_latents((1000, 6), seed=99)
    solution = exact(model, x_T)
    own = distance(fastddim.sample(model, tuned[steps], x_T=x_T), solution)  # type: ignore[arg-type]
    for order in (1, 2):
        plain = fastddim.sample(model, steps, x_T=x_T, order=order)
        assert own < 0.5 * distance(plain, solution)  # type: ignore[arg-type]


def test_the_error_reported_is_that_of_sample(tuned: dict[int, fastddim.TunedSteps]) -> None:
    steps = tuned[8]
    count = steps.record["samples"]
    x_T = fastddim.philox.initial_latents((count, 6), 0, sample_offset=FIRST_SAMPLE + 2 * count)
    model = Mixture()
    teacher = fastddim.sample(model, steps.record["teacher_steps"], x_T=x_T, order=2)
    for name, asked in (("tuned", steps), ("order 2", 8)):
        result = fastddim.sample(model, asked, x_T=x_T, order=1 if asked is steps else 2)
        assert distance(result, teacher) == pytest.approx(steps.errors[name], rel=1e-4)  # type: ignore[arg-type]


def test_arguments_decide_the_steps(tuned: dict[int, fastddim.TunedSteps]) -> None:
    again = fastddim.tune(Mixture(), 4, **QUICKLY)
    other = fastddim.tune(Mixture(), 4, seed=1, **QUICKLY)
    first = tuned[4]
    assert isinstance(again, fastddim.TunedSteps)
    assert isinstance(other, fastddim.TunedSteps)
    assert (again.timesteps, again.direction, again.history, again.errors) == (
        first.timesteps,
        first.direction,
        first.history,
        first.errors,
    )
    assert other.direction != first.direction


def test_a_file_holds_all(tuned: dict[int, fastddim.TunedSteps], tmp_path: Any) -> None:
    tuned[8].save(tmp_path / "steps.json")
    assert fastddim.load_steps(tmp_path / "steps.json") == tuned[8]


def test_one_teacher_serves_all_numbers() -> None:
    model = Mixture()
    found = fastddim.tune(model, [2, 3], **QUICKLY)
    assert isinstance(found, dict)
    records = [steps.record for steps in found.values()]
    assert records[0]["teacher_evaluations"] == records[1]["teacher_evaluations"]
    evaluations = records[0]["teacher_evaluations"] + sum(r["evaluations"] for r in records)
    batch = min(64, records[0]["samples"])
    assert model.calls * batch == evaluations


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 2.0},
        {"clip": 2.0, "rederive_eps": True},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "guidance_rescale": 0.5},
        {"dynamic_thresholding_ratio": 0.9},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_steps_are_tuned_for_the_options_of_sample(options: dict[str, Any]) -> None:
    model = Mixture((4,))
    steps = fastddim.tune(model, 4, samples=32, progress=False, **options)
    assert isinstance(steps, fastddim.TunedSteps)
    if options == {"dtype": torch.float64}:
        assert steps.errors["tuned"] < steps.errors["order 2"]
        return
    x_T = fastddim.philox.initial_latents((2, 4), seed=5)
    fastddim.sample(model, steps, x_T=x_T, **options)
    with pytest.raises(ValueError, match=f"steps: expected {next(iter(options))}"):
        fastddim.sample(model, steps, x_T=x_T)


def test_conditions_of_a_batch_reach_the_model() -> None:
    seen = []

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append((x.shape[0], label.shape[0]))
        return x * (0.5 + 0.1 * label[:, None])

    label = torch.arange(16.0)
    fastddim.tune(
        model,
        3,
        shape=(8, 4),
        guidance_scale=2.0,
        model_kwargs={"label": label},
        samples=16,
        progress=False,
    )
    assert set(seen) == {(16, 16)}


def test_pure_noise_at_first() -> None:
    """Pure noise at first is possible: ᾱ_T = 0, where x/√ᾱ is infinite."""
    schedule = SCHEDULE.zero_terminal_snr()
    model = Mixture((6,), schedule, "v_prediction")
    steps = fastddim.tune(model, 5, prediction="v_prediction", **QUICKLY)
    assert isinstance(steps, fastddim.TunedSteps)
    assert steps.chosen == "tuned"
    assert steps.errors["tuned"] < 0.7 * steps.errors["order 2"]


@pytest.mark.parametrize("prediction", ["sample", "score", "v_prediction"])
def test_what_the_model_predicts_makes_no_difference(prediction: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod[t].to(x)[:, None]
        epsilon = Mixture((4,))(x, t)
        x_0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        return {
            "sample": x_0,
            "score": -epsilon / (1 - a).sqrt(),
            "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * x_0,
        }[prediction]

    few = {"samples": 16, "dtype": torch.float64, "teacher_steps": 40, "progress": False}
    own = fastddim.tune(Mixture((4,)), 4, **few)
    other = fastddim.tune(model, 4, shape=(16, 4), prediction=prediction, **few)
    assert other.timesteps == own.timesteps  # type: ignore[union-attr]
    assert other.errors == pytest.approx(own.errors, rel=1e-6)  # type: ignore[union-attr]


def test_what_cannot_be_better_stays() -> None:
    """Steps that cannot be better stay. With one point as data, DDIM's own step is exact."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod[t].to(x)[:, None]
        return (x - a.sqrt() * 0.5) / (1 - a).sqrt()

    with pytest.warns(UserWarning, match="did not help") as caught:
        steps = fastddim.tune(
            model, 4, shape=(16, 3), samples=16, dtype=torch.float64, progress=False
        )
    assert caught[0].filename == __file__
    assert isinstance(steps, fastddim.TunedSteps)
    assert steps.chosen in ("order 1", "order 2")
    order = int(steps.chosen[-1])
    x_T = torch.randn(3, 3)
    plain = fastddim.sample(model, 4, x_T=x_T, order=order)
    assert torch.equal(fastddim.sample(model, steps, x_T=x_T), plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("T", [4, 10, 1000])
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_and_short_schedules(T: int, steps: int) -> None:
    model = Mixture((3,), fastddim.Schedule.linear(T, 1e-4, 0.5 if T < 100 else 0.02))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = fastddim.tune(model, steps, **QUICKLY)
    assert isinstance(found, fastddim.TunedSteps)
    assert found.steps == steps


@pytest.mark.parametrize("effort", list(EFFORTS))
def test_the_bar_knows_the_end(effort: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Mixture((4,))
    fastddim.tune(model, [3], effort=effort, samples=16, teacher_steps=20)
    assert "100%" in capsys.readouterr().err
    tuner = Tuner(TuneOptions(model, 3, effort=effort, samples=16, teacher_steps=20))
    steps = tuner.tuned(3)
    assert steps.record["evaluations"] <= 16 * (EFFORTS[effort].evaluations(3, 3) + 3 * 3)


def test_an_interruption_closes_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model = Mixture()

    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        if model.calls > 50:
            raise KeyboardInterrupt
        return model(x, t)

    with pytest.raises(KeyboardInterrupt):
        fastddim.tune(interrupted, 4, shape=(16, 6), schedule=SCHEDULE)
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.filterwarnings("ignore:tuning 3 steps did not help")
@pytest.mark.parametrize("every", [2, 5])
def test_candidates_may_leave_the_range_of_the_model(every: int) -> None:
    """Candidates may leave the range of the model: it must be finite only on the teacher's path."""
    model = Mixture((4,))

    def limited(x: Tensor, t: Tensor) -> Tensor:
        epsilon = model(x, t)
        failing = model.calls > 3 * 20 and model.calls % every == 0
        return (
            torch.where(torch.arange(16)[:, None] == 3, torch.nan, epsilon) if failing else epsilon
        )

    few = {"shape": (16, 4), "samples": 16, "teacher_steps": 20, "progress": False}
    if every == 2:
        with pytest.raises(ValueError, match="got NaN or infinity in 3 steps of every kind"):
            fastddim.tune(limited, 3, schedule=SCHEDULE, **few)
        return
    steps = fastddim.tune(limited, 3, schedule=SCHEDULE, **few)
    assert np.isfinite(list(steps.errors.values())).all()  # type: ignore[union-attr]


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "message", "changes"),
        [
            (ValueError, "eta: expected 0", {"eta": 0.5}),
            (ValueError, "steps: expected at most 50, half of the teacher's 100", {"steps": 51}),
            (ValueError, "steps: expected at most 5, half of", {"steps": 6, "teacher_steps": 10}),
            (TypeError, "steps: expected an integer or a sequence", {"steps": "10"}),
            (TypeError, "steps: expected an integer or a sequence", {"steps": []}),
            (ValueError, r"steps: expected an integer in \[1, ", {"steps": [4, 0]}),
            (ValueError, "samples: expected at least 8 of 6 elements for 4", {"samples": 7}),
            (
                ValueError,
                r"teacher_steps: expected an integer in \[2, 1000\]",
                {"teacher_steps": 1001},
            ),
            (ValueError, "effort: expected", {"effort": "endless"}),
            (ValueError, "prediction: expected", {"prediction": "image"}),
            (TypeError, "guidance_scale: expected a number", {"guidance_scale": [1.0, 2.0]}),
            (TypeError, "model: expected a callable", {"model": 3}),
            (ValueError, "seed: expected", {"seed": -1}),
            (TypeError, "progress: expected", {"progress": 1}),
            (ValueError, "batch_size: expected", {"batch_size": 0}),
            (ValueError, "shape: expected samples that are not empty", {"shape": (0, 6)}),
        ],
    )
    def test_is_named(self, error: Any, message: str, changes: dict[str, Any]) -> None:
        arguments = {"model": Mixture(), "steps": 4, "progress": False} | changes
        with pytest.raises(error, match=message):
            fastddim.tune(**arguments)

    def test_a_model_that_returns_nan(self) -> None:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return x * torch.where(t < 300, torch.nan, 1.0)[:, None]

        with pytest.raises(ValueError, match="model output: expected finite values, got NaN"):
            fastddim.tune(model, 4, shape=(16, 6), progress=False)


def trials(model: Any = None, **options: Any) -> Trials:
    update = Update(**options).checked(None)
    network = Network(model or Mixture((4,)), update, torch.float64)
    return Trials(network, SCHEDULE, update)


def a_candidate(generator: np.random.Generator, steps: int = 6) -> Candidate:
    timesteps = np.sort(generator.choice(1000, steps, replace=False))[::-1].astype(np.float64)
    additions = 0.1 * generator.standard_normal((2, steps))
    additions[1, 0] = 0
    return Candidate(timesteps, *additions)


class TestWalks:
    x_T = fastddim.philox.initial_latents((9, 4), 0, dtype=torch.float64)

    def test_without_additions_is_order_2(self) -> None:
        timesteps = [999, 640, 333, 12]
        own = trials()
        table = own.table(own.steps.course(Candidate.at_order_2(timesteps)), self.x_T)
        plan = make_plan(SCHEDULE, timesteps, Update().checked(None), order=2)
        assert torch.equal(table, plan.table)

    def test_a_branch_ends_where_its_whole_way_does(self) -> None:
        own, generator = trials(clip=1.0), np.random.default_rng(0)
        candidate = a_candidate(generator)
        walk = own.walk(own.steps.course(candidate), self.x_T)
        changes = [*timestep_changes(candidate, 1000), *weight_changes(candidate)]
        changes += broad_changes(candidate, own.steps)
        for change in changes:
            other = own.steps.course(change.apply(candidate, change.probe).settled(1000))
            assert torch.equal(own.branch(other, walk), own.walk(other, self.x_T).end)
            assert torch.equal(own.branch(other, walk), own.trace(other, self.x_T).end)

    def test_derivatives_are_differences_of_whole_ways(self) -> None:
        own, generator = trials(), np.random.default_rng(1)
        candidate = a_candidate(generator)
        changes = weight_changes(candidate)
        tasks = [Task(part, torch.randn_like(part)) for part in self.x_T.split(5)]
        scale = 2.0
        got = own.normal_equations(candidate, changes, tasks, scale)

        def end(candidate: Candidate) -> Tensor:
            return own.walk(own.steps.course(candidate), self.x_T).end

        target = torch.cat([task.x_0 for task in tasks])
        residual = end(candidate) - target
        weights = 1 / (1 + residual.square().mean(1, keepdim=True) / scale)
        derivatives = torch.stack(
            [(end(c.apply(candidate, c.probe)) - end(candidate)) / c.probe for c in changes]
        )
        gram = torch.einsum("pnd,qnd,nd->pq", derivatives, derivatives, weights.expand(9, 4)) / 36
        slope = torch.einsum("pnd,nd->p", derivatives, weights * residual) / 36
        np.testing.assert_allclose(got.gram, gram.numpy(), rtol=1e-9)
        np.testing.assert_allclose(got.slope, slope.numpy(), rtol=1e-9)
        assert got.error == pytest.approx(float((weights * residual.square()).mean()))

    def test_jump_costs_are_those_of_single_steps(self) -> None:
        own = trials()
        timesteps = [999, 700, 400, 150, 20]
        trace = own.trace(own.steps.untuned(timesteps, 2), self.x_T, kept=9)
        alphas = own.steps.alphas(timesteps)
        costs = jump_costs(trace, alphas)
        for i, j in itertools.combinations(range(6), 2):
            model = Mixture((4,))
            epsilon = model(trace.states[i], torch.full((9,), timesteps[i]))
            y, y_end = trace.states[i] / alphas[i] ** 0.5, trace.states[j] / alphas[j] ** 0.5
            sigma, sigma_end = (((1 - a) / a) ** 0.5 for a in (alphas[i], alphas[j]))
            error = distance(y + (sigma_end - sigma) * epsilon, y_end)
            assert costs[i, j] == pytest.approx(error, rel=1e-6, abs=1e-6)
        assert np.isinf(costs[np.tril_indices(6)]).all()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_shortest_path_is_the_shortest_of_all(steps: int, power: int) -> None:
    costs = np.random.default_rng(steps).random((8, 8))
    costs[np.tril_indices(8)] = np.inf

    def length(path: tuple[int, ...]) -> float:
        return float(sum(costs[i, j] ** power for i, j in itertools.pairwise((*path, 7))))

    paths = [(0, *rest) for rest in itertools.combinations(range(1, 7), steps - 1)]
    assert tuple(shortest_path(costs, steps, power)) == min(paths, key=length)


@given(
    st.integers(1, 30).flatmap(
        lambda T: st.tuples(st.just(T), st.lists(st.floats(-50, 80), min_size=1, max_size=T))
    )
)
def test_settled_timesteps_are_distinct(case: tuple[int, list[float]]) -> None:
    T, given_timesteps = case
    settled = Candidate.at_order_2(given_timesteps).settled(T).timesteps
    assert (np.diff(settled) < 0).all()
    assert settled.min() >= 0
    assert settled.max() < T
    assert (settled == np.rint(settled)).all()


def test_timesteps_that_are_settled_stay() -> None:
    candidate = a_candidate(np.random.default_rng(2), 50)
    assert np.array_equal(candidate.settled(1000).timesteps, candidate.timesteps)


def test_noise_levels_and_timesteps() -> None:
    steps = Steps(SCHEDULE)
    timesteps = np.array([0.0, 17, 500, 999])
    assert np.allclose(steps.at(steps.noise_levels[timesteps.astype(int)]), timesteps)
