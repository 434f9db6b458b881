"""The figures of the paper, drawn small: what they show is true, and each is a picture."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
import torch
from paper import experiments, timeline
from paper.plots import CELL, Line, Panel, Plot, plots, sheet
from PIL import Image
from quality import data

import fastddim
from fastddim.images import to_uint8

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = (
    "consistency",
    "consistency-distance",
    "interpolation",
    "interpolation-square",
    "quality",
    "reconstruction",
    "reconstruction-error",
    "sampling",
    "timeline",
    "timeline-dark",
)
STEPS = (5, 10, 20, 100)


def work(folder: Path) -> figures.Work:
    return figures.Work(
        names=("digits",),
        consistency_steps=STEPS,
        consistency_counts={"digits": 5},
        between_steps=10,
        frames=4,
        square=2,
        reconstruction_steps={"digits": (10, 20)},
        reconstruction_counts={"digits": 3},
        shown=3,
        shown_steps=(10, 20),
        results=folder,
        figures=folder,
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> figures.Work:
    """Everything except quality and sampling, whose numbers are not measured here."""
    small = work(tmp_path_factory.mktemp("figures"))
    figures.draw(["consistency", "interpolation", "reconstruction", "timeline"], small)
    return small


@pytest.fixture(scope="module")
def model() -> Any:
    return fastddim.models.load("digits")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        return np.array(image)


def test_the_image_belongs_to_the_latent_without_noise_alone(drawn: figures.Work) -> None:
    distances: dict[float, list[float]] = {0.0: [], 1.0: []}
    for row in drawn.read("consistency")["rows"]:
        assert (row["reference_steps"], row["count"]) == (100, 5)
        distances[row["eta"]].append(row["distance"])
    ddim, ddpm = distances[0.0], distances[1.0]
    assert len(ddim) == len(ddpm) == len(STEPS) - 1
    assert all(later < earlier / 1.3 for earlier, later in itertools.pairwise(ddim)), ddim
    assert all(0.6 < d < 1.4 for d in ddpm), ddpm
    assert all(own < other / 2 for own, other in zip(ddim, ddpm, strict=True))


def test_interpolation_is_a_path_between_the_samples(model: Any) -> None:
    seeds, frames, steps = (0, 1), 9, 10
    path = experiments.between(model, seeds, frames, steps)
    ends = torch.cat(
        [fastddim.sample(model, steps, seed=seed, spacing="uniform") for seed in seeds]
    )
    # The network rounds differently in batches of different sizes.
    torch.testing.assert_close(path[[0, -1]], ends, rtol=0, atol=1e-3)
    across = (path[0] - path[-1]).norm()
    assert (path.diff(dim=0).flatten(1).norm(dim=1) < across).all()
    assert (path.diff(dim=0).flatten(1).norm(dim=1) > 0).all()
    middle = (path[0] + path[-1]) / 2
    assert (path[frames // 2] - middle).norm() > across / 4


def test_the_square_has_the_samples_in_its_corners(model: Any) -> None:
    seeds, frames, steps = (0, 1, 2, 3), 3, 10
    square = experiments.between(model, seeds, frames, steps)
    assert len(square) == frames**2
    corners = torch.cat(
        [fastddim.sample(model, steps, seed=seed, spacing="uniform") for seed in seeds]
    )
    torch.testing.assert_close(square[[0, 2, 6, 8]], corners, rtol=0, atol=1e-3)


def test_reconstruction_gets_better_with_steps_and_refinement(drawn: figures.Work) -> None:
    errors: dict[int, list[float]] = {0: [], 2: []}
    for row in drawn.read("reconstruction")["rows"]:
        errors[row["refine"]].append(row["mse"])
        assert row["weights"] == figures.fingerprint("digits")
    for values in errors.values():
        assert all(later < earlier / 2 for earlier, later in itertools.pairwise(values)), values
    assert all(r < plain / 3 for plain, r in zip(errors[0], errors[2], strict=True)), errors


def test_error_is_that_of_images_from_0_to_1() -> None:
    images = data.load("digits").held_out_images[:3]
    mean, error = experiments.reconstruction_error(images + 0.2, images)
    assert mean == pytest.approx(0.01, rel=1e-5)
    assert error == pytest.approx(0, abs=1e-7)


def test_every_picture_shows_something(drawn: figures.Work) -> None:
    found = sorted(drawn.figures.glob("*.png"))
    assert {path.stem for path in found} == set(COMMITTED) - {"quality", "sampling"}
    for path in found:
        image = pixels(path)
        assert image.shape[1] > 3 * CELL / 2
        assert image.std() > 15, path


def test_the_same_numbers_give_the_same_pixels(drawn: figures.Work) -> None:
    before = {p.name: p.read_bytes() for p in drawn.figures.glob("*.png")}
    figures.draw(["consistency", "reconstruction", "timeline"], drawn, only_plots=True)
    figures.draw(["interpolation"], drawn)
    assert {p.name: p.read_bytes() for p in drawn.figures.glob("*.png")} == before


def test_the_plot_of_quality_shows_tuned_steps(drawn: figures.Work) -> None:
    """The plot of quality shows tuned steps, by one more line if they were measured, and one line
    of DDPM's distance with its error.
    """
    result = figures.Work().read("quality-digits")
    rows = [row for row in result["rows"] if row["spacing"] != "tuned"]
    tuned = [{**rows[0], "steps": steps, "spacing": "tuned"} for steps in (10, 4)]
    labels = ["η = 1", "order 1", "order 2"]
    pictures = []
    for more, expected in (([], labels), (tuned, [*labels, "tuned"])):
        path = drawn.results / "quality-digits.json"
        path.write_text(json.dumps({**result, "rows": [*rows, *more]}))
        plot = figures.quality_plot(drawn.read("quality-digits"))
        assert [line.label for line in plot.lines] == expected
        assert (plot.levels[0].y, plot.levels[0].error) == (0.861, 0.164)
        figures.draw(["quality"], drawn)
        pictures.append(pixels(drawn.figures / "quality.png"))
    assert plot.lines[-1].x == [4, 10]
    assert (pictures[0].shape, pictures[0].tobytes()) != (pictures[1].shape, pictures[1].tobytes())
    for path in (drawn.results / "quality-digits.json", drawn.figures / "quality.png"):
        path.unlink()


def test_the_timeline_is_that_of_an_action_sampler(drawn: figures.Work) -> None:
    """The timeline is that of an action sampler: chunks take over when their loops end, and weigh
    the one before as guidance does.
    """
    actions = [timeline.executed_chunk(tick) for tick in range(timeline.TICKS)]
    assert actions == [0] * 11 + [1] * 8 + [2] * 13
    weights = timeline.soft_mask()
    ratio = 5 / 6  # 5 old actions from this one on, of 8 - 3 + 1
    assert weights[:3] == pytest.approx([1, 1, 1], rel=1e-12)
    assert weights[3] == pytest.approx(ratio * math.expm1(ratio) / math.expm1(1), rel=1e-12)
    assert sorted(weights[3:8], reverse=True) == weights[3:8]
    assert weights[8:] == [0] * 8
    light, dark = (pixels(drawn.figures / f"timeline{name}.png") for name in ("", "-dark"))
    assert light.shape == dark.shape
    assert (np.median(light), np.median(dark)) == (255, 33)


def test_a_sheet_holds_the_images_pixel_by_pixel(tmp_path: Path) -> None:
    """A sheet holds the images pixel by pixel, each enlarged by a whole factor, in its row and
    column.
    """
    images = to_uint8(torch.rand(6, 1, 8, 8) * 2 - 1).reshape(2, 3, 8, 8, 1)
    sheet(tmp_path / "a.png", [[Panel("a", images, ["x", "y", "z"], ["1", "2"])]])
    drawn = pixels(tmp_path / "a.png")
    large = images[..., 0].repeat(CELL // 8, axis=2).repeat(CELL // 8, axis=3)
    windows = np.lib.stride_tricks.sliding_window_view(drawn, (CELL, CELL))
    places = {}
    for row, column in itertools.product(range(2), range(3)):
        corner = large[row, column, 0, 0]
        for top, left in np.argwhere(drawn[: len(windows), : windows.shape[1]] == corner):
            if (windows[top, left] == large[row, column]).all():
                places[row, column] = top, left
    assert len(places) == 6
    assert places[0, 0][0] == places[0, 2][0] < places[1, 0][0]
    assert places[0, 0][1] == places[1, 0][1] < places[0, 1][1] < places[0, 2][1]


def test_plots_of_other_results(tmp_path: Path) -> None:
    line = Line("a", [1, 10], [1.0, 0.1], "#0072B2", error=[0.1, 0.01])
    steeper = Line("a", [1, 10], [1.0, 0.01], "#0072B2")
    for name, shown in (("a", line), ("b", steeper)):
        plots(tmp_path / f"{name}.png", [Plot("t", [shown], "x", "y")], columns=1)
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [1.0, 0.0]), ([0, 2], [1.0, 2.0])])
def test_lines_without_logarithm(tmp_path: Path, x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="panels: expected points > 0"):
        plots(tmp_path / "a.png", [Plot("t", [Line("a", x, y, "k")], "x", "y")])
    assert not list(tmp_path.iterdir())


def test_pages_show_the_committed_pictures() -> None:
    shown = set()
    for page, folder in (
        ("docs/results/quality.md", "../figures"),
        ("docs/results/speed.md", "../figures"),
        ("docs/tasks/latents.md", "../figures"),
        ("docs/third-party.md", "figures"),
        ("docs/policies.md", "figures"),
        ("docs/results/policy-success.md", "../figures"),
    ):
        # One of a light and a dark picture is shown, by what follows the #.
        picture = rf"!\[[^\]]+\]\({folder}/([\w-]+)\.png(?:#[\w-]+)?\)"
        shown |= set(re.findall(picture, (ROOT / page).read_text()))
    there = {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert shown == there == {*COMMITTED, "third-party", "policy-success"}
    for name in there:
        path = ROOT / "docs" / "figures" / f"{name}.png"
        assert path.stat().st_size < 200_000
        assert pixels(path).std() > 15


@pytest.mark.parametrize("name", ["consistency", "reconstruction"])
def test_committed_numbers_are_of_the_bundled_models(name: str) -> None:
    result = figures.Work().read(name)
    assert result["machine"]["modified"] is False
    assert {(row["data"], row["weights"]) for row in result["rows"]} == {
        (model, figures.fingerprint(model)) for model in ("digits", "fashion")
    }
