"""Arrivals of policies by steps: their count, and the committed numbers."""

from __future__ import annotations

import itertools
import json

import figures
import numpy as np
import pytest
import success_tables
import torch
from cpu_results import result_of
from paper.plots import plots
from policies import success
from policies.success import navigation
from torch import nn

import fastddim


class Planner(nn.Module):
    """A planner that returns ε of its own chunks, from the observed position and goal."""

    def __init__(self, side: float | None) -> None:
        super().__init__()
        self.schedule = fastddim.Schedule.cosine(T=100)
        self.side = side

    def chunk(self, observation):
        seen = observation.double().numpy()
        episodes = navigation.Episodes(seen[:, :2], seen[:, 4:])
        sides = np.full((len(seen), len(navigation.DISCS)), self.side or 0.0)
        actions = []
        for _ in range(navigation.HORIZON):
            actions.append(navigation.planned(episodes, sides) * (self.side is not None))
            episodes.tick(actions[-1])
        return torch.from_numpy(np.stack(actions, 1)).float()

    def forward(self, actions, t, observation):
        a = self.schedule.alphas_cumprod[t].float()[:, None, None]
        return (actions - a.sqrt() * self.chunk(observation)) / (1 - a).sqrt()


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return navigation.Policy(16, 1).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def work():
    tuning = {"teacher_steps": 10, "samples": 8}
    return success.Work(steps=(2, 3), episodes=4, observations=8, tuning=tuning)


@pytest.mark.parametrize(("side", "expected"), [(1.0, 1.0), (-1.0, 1.0), (None, 0.0)])
def test_arrivals_are_those_of_the_chunks_that_are_executed(side, expected):
    """Arrivals are those of the executed chunks: the planner as a policy arrives, in every way of
    sampling, and a policy that stays does not.
    """
    planner = Planner(side).eval()
    work = success.Work(episodes=12)
    found = success.arrivals(planner, 2, work)
    assert found == {"success": expected, "error": 0.0, "crashed": 0.0}


def test_a_chunk_is_executed_by_half(monkeypatch):
    """A chunk is executed by half: the planner is asked as often as the episode has halves of
    chunks, each time at its position.
    """
    asked, count = [], 3
    monkeypatch.setattr(Planner, "chunk", lambda self, seen: asked.append(seen) or _ahead(seen))
    episodes = navigation.Episodes.draw(count, 0)
    start = torch.from_numpy(episodes.position).float()
    navigation.drive(navigation.sampler_of(Planner(1.0).eval(), count, 2, 0), episodes)
    assert len(asked) == 2 * navigation.LIMIT // navigation.EXECUTED
    places = torch.stack(asked[::2])[:, :, :2]
    assert torch.equal(places[0], start)
    moved = torch.full((count,), 0.01 * navigation.SPEED * navigation.EXECUTED)
    for before, after in itertools.pairwise(places[:, :, 0]):
        torch.testing.assert_close(after - before, moved, rtol=1e-2, atol=0)


def _ahead(seen):
    """A chunk that goes slowly ahead in its executed part, and back in the rest."""
    chunk = torch.zeros(len(seen), navigation.HORIZON, 2)
    chunk[:, : navigation.EXECUTED, 0] = 0.01
    chunk[:, navigation.EXECUTED :, 0] = -1.0
    return chunk


def test_the_error_is_that_of_so_many_tosses():
    assert success.share(90, 100) == {"success": 0.9, "error": 0.03}
    assert success.share(0, 7) == {"success": 0.0, "error": 0.0}


def test_observations_to_tune_by_are_not_those_to_measure_by():
    tuned_by = success.observations(50, success.TUNED_SEED)
    held_out = success.observations(50, success.HELD_OUT_SEED)
    assert tuned_by.shape == held_out.shape == (50, navigation.OBSERVED)
    assert torch.equal(tuned_by, success.observations(50, success.TUNED_SEED))
    assert torch.cdist(tuned_by, held_out).min() > 0
    assert success.SEED != navigation.Recipe().seed not in (success.TUNED_SEED,)


def test_every_way_is_measured_by_steps(policy, work, monkeypatch):
    monkeypatch.setattr(navigation, "LIMIT", navigation.EXECUTED)
    rows = list(success.measure("trained", policy, work, drive=True))
    assert [(row["way"], row["steps"]) for row in rows] == [
        (way.label, steps) for way, steps in work.cells()
    ]
    found = {(row["way"], row["steps"]): row for row in rows}
    assert len(found) == len(rows) == 6 * 2 + 4
    for (way, steps), row in found.items():
        assert "success" in row
        compared = way not in ("η = 1", "warm start") and (way, steps) != ("order 2", success.ALL)
        assert ("distance" in row) == compared
    for way in ("order 1", "order 2", "tuned"):
        assert found[way, 3]["distance"] < found[way, 2]["distance"]
    assert found["order 1", success.ALL]["distance"] < found["order 1", 3]["distance"] / 5
    assert found["tuned", 2]["distance"] < found["order 1", 2]["distance"]
    assert len(found["tuned", 3]["timesteps"]) == 3


def test_distance_is_that_of_the_same_latents(policy, work):
    held = success.Held(policy, work)
    assert held.missed(success.ALL, order=2) == {"distance": 0.0, "median": 0.0}
    held.solution = held.chunks(success.ALL, order=2) + 0.25
    assert held.missed(success.ALL, order=2) == {"distance": 0.25, "median": 0.25}


def test_a_run_says_what_it_measured(tmp_path, monkeypatch):
    recipe = navigation.Recipe(width=16, blocks=1)
    weights = tmp_path / "policy.safetensors"
    navigation.save(success.untrained(recipe), weights, recipe, "made here")
    monkeypatch.setattr(success, "machine", lambda: {"commit": "0123456"})
    row = {"way": "order 1", "steps": 2}
    monkeypatch.setattr(
        success, "measure", lambda name, policy, work, drive: iter([{"policy": name, **row}])
    )
    result = success.run(tmp_path / "result.json", weights, success.Work())
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["weights"] == success.fingerprint(weights)
    assert result["recipe"]["width"] == 16
    assert [row["policy"] for row in result["rows"]] == ["trained", "untrained"]


@pytest.fixture(scope="module")
def committed():
    return result_of("policy-success")


def test_the_committed_numbers_are_of_the_committed_weights(committed):
    assert committed["machine"]["modified"] is False, "measured on uncommitted code"
    assert committed["weights"] == success.fingerprint(success.WEIGHTS)
    assert success.WEIGHTS.stat().st_size < 300_000
    assert navigation.recipe_of(success.WEIGHTS) == navigation.Recipe()
    work = success.Work()
    assert (committed["episodes"], committed["observations"]) == (work.episodes, work.observations)
    rows = [row for row in committed["rows"] if row["policy"] == "trained"]
    assert [(row["way"], row["steps"]) for row in rows] == [
        (way.label, steps) for way, steps in work.cells()
    ]


def test_the_committed_weights_arrive_as_often(committed):
    """The committed weights arrive as often; on another processor a robot or two may come to the
    other side of a disc.
    """
    found = success.arrivals(navigation.load(success.WEIGHTS), 4, success.Work())
    (row,) = (
        row
        for row in committed["rows"]
        if (row["policy"], row["way"], row["steps"]) == ("trained", "order 1", 4)
    )
    assert found["success"] == pytest.approx(row["success"], abs=0.005)


def test_tables_have_a_column_for_each_number_of_steps():
    row = {"policy": "trained", "way": "order 1", "steps": 2}
    rows = [
        row | {"success": 0.4, "error": 0.011, "distance": 0.25, "median": 0.1},
        row | {"success": 0.912, "error": 0.006, "distance": 0.031, "median": 0.02, "steps": 10},
        {"policy": "trained", "way": "η = 1", "steps": 10, "success": 0.95, "error": 0.005},
        {"policy": "untrained", "way": "order 1", "steps": 2, "distance": 0.5, "median": 0.5},
    ]
    result = {**result_of("policy-success"), "rows": rows}
    lines = success_tables.success_as_markdown(result).splitlines()
    assert lines[2:4] == [
        "| order 1 | 40.0 ± 1.1 | 91.2 ± 0.6 |",
        "| η = 1 | – | 95.0 ± 0.5 |",
    ]
    lines = success_tables.actions_as_markdown(result).splitlines()
    assert lines[2:4] == [
        "| trained | order 1 | 0.25<br>0.1 | 0.031<br>0.02 |",
        "| untrained | order 1 | 0.5<br>0.5 | – |",
    ]


def test_the_plot_shows_every_way_and_the_level_of_ddpm(committed, tmp_path):
    plot = figures.arrivals_plot(committed)
    assert [line.label for line in plot.lines] == [way.label for way in success.WAYS]
    (level,) = plot.levels
    assert 85 < level.y < 97
    assert 0 < level.error < 1
    for line in plot.lines:
        warm = line.label == "warm start"
        assert list(line.x) == [s for s in success.STEPS if not warm or s < success.WARM_OF]
        assert line.error is not None
    actions = figures.actions_plot(committed)
    assert [line.label for line in actions.lines] == [way.label for way in success.WAYS[1:-1]]
    # Shares may be 0, which a logarithm may not.
    plots(tmp_path / "a.png", [plot, actions])
    assert (tmp_path / "a.png").stat().st_size > 10_000
