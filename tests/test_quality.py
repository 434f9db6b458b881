"""The distances of `benchmarks/quality`, and the orderings of the paper's table 1."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from quality import classifier, data, features, frechet, grid

import fastddim

from .support.tuned import steps_of_order


def gaussian(seed: int, count: int, size: int) -> np.ndarray:
    """Correlated normal features `[count, size]`."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(size, size))
    values: np.ndarray = generator.normal(size=(count, size)) @ mix + generator.normal(size=size)
    return values


@pytest.mark.parametrize("size", [1, 2, 17, 64])
def test_distance_is_that_of_a_matrix_square_root(size: int) -> None:
    a, b = (frechet.statistics(gaussian(seed, 200, size)) for seed in (1, 2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    gap = a.mean - b.mean
    expected = gap @ gap + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-8)


def test_distance_of_a_singular_set() -> None:
    """Fewer images than features, where a plain square root goes complex."""
    few = frechet.statistics(gaussian(1, 20, 64))
    moved = frechet.Statistics(few.mean + 0.5, few.covariance)
    assert frechet.distance(few, moved) == pytest.approx(64 * 0.25, rel=1e-4)


def test_bootstrap_is_the_spread_over_sets() -> None:
    reference = frechet.statistics(gaussian(0, 5000, 4))
    whole = gaussian(0, 40_000, 4)[5000:]
    sets = [frechet.statistics(part) for part in np.split(whole, 70)]
    spread = np.std([frechet.distance(part, reference) for part in sets], ddof=1)
    estimate = np.mean(
        [frechet.bootstrap(whole[i : i + 500], reference) for i in range(0, 5000, 500)]
    )
    assert spread / 2 < estimate < spread * 2.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((1, 3)), r"expected \[N, D\] with N >= 2, got \[1, 3\]"),
        (np.zeros(3), r"expected \[N, D\] with N >= 2, got \[3\]"),
        (np.array([[1.0], [np.nan]]), "expected finite values"),
    ],
)
def test_features_that_are_none(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet.statistics(values)


def test_images_are_judged_as_saved() -> None:
    levels = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    torch.testing.assert_close(features.quantized(levels), levels, rtol=0, atol=1e-6)
    outside, edges = torch.tensor([[-3.0, 2.0], [-1.0, 1.0]]).view(2, 1, 1, 1, 2)
    assert torch.equal(features.quantized(outside), edges)
    ramp = torch.linspace(-1, 1, 10_001).view(1, 1, 1, -1)
    assert len(features.quantized(ramp).unique()) == 256


def test_the_classifier_is_as_good_as_its_record_says() -> None:
    digits = data.load("digits")
    record = json.loads((classifier.FOLDER / "digits.json").read_text())
    model = classifier.load("digits")
    share = classifier.accuracy(model, digits.held_out_images, digits.held_out_classes)
    assert share == pytest.approx(record["test_accuracy"], abs=0.006)
    assert share > 0.97


def test_a_new_classifier_learns() -> None:
    digits = data.load("digits")
    model = classifier.fit(digits.images, digits.classes, epochs=3)
    assert classifier.accuracy(model, digits.held_out_images, digits.held_out_classes) > 0.8


def test_bfloat16_is_for_cpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastddim.models.load("digits")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(grid, "has_bfloat16", lambda has=has: has)
        network = grid.Network("digits", compiled=False)
        assert network.precision == precision
        assert network(x, t).dtype == torch.float32
        assert torch.equal(network(x, t), model(x, t)) != has


KINDS = {"0": (0.0, "small"), "1": (1.0, "small"), "σ̂": (1.0, "large")}


@functools.cache
def distance(steps: int, kind: str, seed: int, count: int) -> float:
    """The distance of so many digits."""
    network = grid.Network("digits", compiled=False)
    cell = grid.Cell(steps, *KINDS[kind], count=count, seed=seed)
    row = grid.measure(cell, network, "digits", ("classifier",))
    found: float = row["classifier"]["distance"]
    return found


def cells(*steps: int) -> Any:
    """A few dozen digits in five steps, enough for each of four seeds, and 600 for the rest."""
    deep = [pytest.param(S, seed, 600, marks=pytest.mark.deep) for S in steps for seed in (1, 2)]
    return pytest.mark.parametrize(("steps", "seed", "count"), [(5, 1, 96), *deep])


@cells(5)
def test_at_five_steps_ddim_is_ahead_of_ddpm(steps: int, seed: int, count: int) -> None:
    assert distance(steps, "0", seed, count) < distance(steps, "1", seed, count)


@cells(5, 10, 20)
def test_the_large_variance_is_worst_by_far(steps: int, seed: int, count: int) -> None:
    others = max(distance(steps, kind, seed, count) for kind in ("0", "1"))
    assert distance(steps, "σ̂", seed, count) > 2 * others


def test_a_stopped_grid_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[grid.Cell] = []

    def measure(cell: grid.Cell, *_: object) -> dict[str, Any]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(cell)
        return {"seconds": 0.0}

    monkeypatch.setattr(grid, "measure", measure)
    monkeypatch.setattr(grid, "_context", lambda name: {})
    wanted = [grid.Cell(steps, count=10) for steps in (5, 10, 20)]
    path = tmp_path / "quality.json"
    with pytest.raises(KeyboardInterrupt):
        grid.run("digits", path, iter(wanted), compiled=False)
    assert len(json.loads(path.read_text())["rows"]) == 2
    monkeypatch.setattr(grid, "measure", lambda cell, *_: drawn.append(cell) or {"seconds": 0.0})
    result = grid.run("digits", path, iter(wanted), compiled=False)
    assert drawn == wanted
    assert [row["steps"] for row in result["rows"]] == [5, 10, 20]
    # Another seed is another configuration.
    grid.run("digits", path, iter([grid.Cell(5, count=10, seed=1)]), compiled=False)
    assert len(drawn) == 4


def test_samples_may_be_drawn_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [grid.Cell(2, eta, count=70) for eta in (0.0, 1.0)]
    spaces = ("classifier",)
    network = grid.Network("digits", compiled=False)
    expected = [grid.measure(cell, network, "digits", spaces) for cell in wanted]

    grid.draw_all("digits", iter(wanted), tmp_path / "all", "cpu")
    assert len(list((tmp_path / "all").iterdir())) == 2
    monkeypatch.setattr(grid, "draw", None)
    grid.draw_all("digits", iter(wanted), tmp_path / "all", "cpu")
    monkeypatch.setattr(grid, "SPACES", spaces)
    monkeypatch.setattr(grid, "_context", lambda name: {})
    result = grid.run(
        "digits",
        tmp_path / "quality.json",
        iter(wanted),
        compiled=False,
        images=tmp_path / "all",
    )
    for row, own in zip(result["rows"], expected, strict=True):
        assert row["classifier"] == own["classifier"]
        assert row["network"] == network.precision
        assert row["seconds"] >= 0


def network_with(*tuned: fastddim.TunedSteps) -> grid.Network:
    network = grid.Network("digits", compiled=False)
    network.tuned = {steps.steps: steps for steps in tuned}
    return network


def test_tuned_steps_are_those_of_the_model() -> None:
    network = network_with(steps_of_order(2, [999, 700, 300, 20]))
    cell = grid.Cell(4, spacing="tuned", count=6)
    images, row = grid.draw(cell, network)
    assert torch.equal(images, fastddim.sample(network, network.tuned[4], batch_size=6, seed=0))
    assert row["network"] == network.precision
    # The weights are those of order 2, whose terms add up in another order.
    second = fastddim.sample(network, [999, 700, 300, 20], order=2, batch_size=6, seed=0)
    assert (images - second).abs().mean() < 0.02


def test_tuned_cells_are_drawn_again_for_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[grid.Cell] = []
    monkeypatch.setattr(grid, "measure", lambda cell, *_: drawn.append(cell) or {"seconds": 0.0})
    monkeypatch.setattr(grid, "_context", lambda name: {})
    path, plain = tmp_path / "quality.json", grid.Cell(4, count=10)

    def rows(steps: fastddim.TunedSteps) -> list[dict[str, Any]]:
        network = network_with(steps)
        # The model has tuned steps of no other number.
        wanted = [plain, *grid.tuned_cells(10, long=False)]
        with monkeypatch.context() as patched:
            patched.setattr(grid, "Network", lambda *_, **__: network)
            found: list[dict[str, Any]] = grid.run("digits", path, iter(wanted))["rows"]
        return found

    first, others = (steps_of_order(order, [999, 700, 300, 20]) for order in (1, 2))
    assert ["tuned" in row for row in rows(first)] == [False, True]
    # A record says where numbers are from, and changes no sample.
    before = rows(dataclasses.replace(first, record={"seed": 1}))
    assert drawn == [plain, grid.Cell(4, spacing="tuned", count=10)]
    after = rows(others)
    assert drawn == [plain, *[grid.Cell(4, spacing="tuned", count=10)] * 2]
    assert after[0] == before[0]
    assert len(after) == 2
    assert after[1]["tuned"] == grid.tuned_digest(others) != before[1]["tuned"]


def test_no_cell_is_begun_after_the_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    result = grid.run("digits", path, iter([grid.Cell(5)]), seconds=-1, compiled=False)
    assert result["rows"] == []


def test_the_grid_has_each_cell_once() -> None:
    cells = list(grid.cells(1000, long=True))
    assert len(set(cells)) == len(cells)
    assert [cell.steps for cell in cells if cell.tuned] == list(grid.FEW_STEPS)
    for order, eta in ((1, 0.0), (2, 0.0), (1, 1.0)):
        compared = {grid.Cell(S, eta, "small", "trailing", order, 1000) for S in grid.FEW_STEPS}
        assert compared < set(cells)
    uniform = {
        (c.steps, c.eta, c.variance) for c in cells if (c.spacing, c.order) == ("uniform", 1)
    }
    assert len(uniform) == 6 * 5
