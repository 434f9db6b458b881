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
from matplotlib.colors import to_rgb
from paper import experiments, speed, timeline
from paper.plots import Line, Plot, plots, spread
from paper.rows import Bar, Bars, Dots, Group, Mark, Scale, bars, dots
from paper.sheets import CELL, Panel, sheet
from paper.style import (
    BLUE,
    DARK,
    DPI,
    DRAWN_BY,
    FAINT,
    GREEN,
    ORANGE,
    PURPLE,
    SMALL,
    TEXT,
    THEMES,
    Theme,
    themed,
)
from PIL import Image
from quality import data

import fastddim
from fastddim.images import to_uint8

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
COMMITTED = (
    "consistency",
    "consistency-distance",
    "interpolation",
    "interpolation-square",
    "quality",
    "reconstruction",
    "reconstruction-error",
    "requests",
    "sampling",
    "time",
    "timeline",
    "update",
)
MEASURED = {"quality", "requests", "sampling", "time", "update"}
"""Those of results that nothing here makes."""
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
    """All pictures except those of results that are measured elsewhere."""
    small = work(tmp_path_factory.mktemp("figures"))
    figures.draw(["consistency", "interpolation", "reconstruction", "timeline"], small)
    return small


@pytest.fixture(scope="module")
def model() -> Any:
    return fastddim.models.load("digits")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB") if image.mode == "P" else image)


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
    names = set(COMMITTED) - MEASURED
    assert {path.stem for path in found} == {n + theme.suffix for n in names for theme in THEMES}
    for path in found:
        image = pixels(path)
        assert image.shape[1] > 3 * CELL / 2
        assert image.std() > 15, path


def test_light_and_dark_show_the_same(drawn: figures.Work) -> None:
    """The page is one colour of each theme, around a picture of one size."""
    for light in drawn.figures.glob("*.png"):
        if light.stem.endswith(DARK.suffix):
            continue
        pair = [pixels(themed(light, theme)) for theme in THEMES]
        assert pair[0].shape[:2] == pair[1].shape[:2]
        for image, theme in zip(pair, THEMES, strict=True):
            edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            page = [round(255 * part) for part in to_rgb(theme.page)]
            assert (edge.reshape(len(edge), -1) == page[: edge[0].size]).all(), light


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
    (drawn.results / "quality-digits.json").unlink()
    for theme in THEMES:
        themed(drawn.figures / "quality.png", theme).unlink()


def test_the_note_of_quality_is_where_tuned_steps_reach_ddpm() -> None:
    """By the rule of the tables: a difference within its error, as 8 tuned steps have it first."""
    result = figures.Work().read("quality-digits")
    (note,) = figures.quality_plot(result).notes
    assert note.x == 8
    assert note.text.startswith("8 tuned calls")
    tuned = next(r for r in result["rows"] if (r["spacing"], r["steps"]) == ("tuned", 8))
    assert note.y == tuned["classifier"]["distance"]
    assert figures.quality_plot(figures.Work().read("quality-fashion")).notes == []


@pytest.mark.parametrize(
    ("total", "network", "update", "expected"),
    [
        (10.0, 6.0, 3.0, (6.0, 3.0, 1.0)),
        (10.0, 6.0, 5.0, (6.0, 4.0, 0.0)),
        (10.0, 12.0, 3.0, (10.0, 0.0, 0.0)),
        (10.0, 0.0, 4.0, (0.0, 4.0, 6.0)),
    ],
)
def test_parts_of_a_step(
    total: float, network: float, update: float, expected: tuple[float, ...]
) -> None:
    assert tuple(speed.parts(total, network, update).values()) == expected


def test_the_time_of_a_step_on_a_cpu_is_that_of_the_results() -> None:
    read = figures.Work().read
    loops, steps, policies = (read(n)["rows"] for n in ("loops-cpu", "step-cpu", "policies-cpu"))
    panel = speed.cpu_time(loops, steps, policies)
    null, *others = panel.groups
    row = next(row for row in loops if (row["case"], row["eta"]) == ("null model", 0))
    update = next(row for row in steps if row["case"] == "η = 0, 1×4×64×64")["timings"]
    for bar, step in zip(null.bars, ("diffusers", "Stepper"), strict=True):
        assert bar.total == pytest.approx(row["timings"][bar.label]["seconds"] / 50, rel=1e-12)
        assert bar.parts[speed.UPDATE] == update[step]["seconds"]
        assert bar.parts[speed.NETWORK] == 0
    assert [group.title.partition(",")[0] for group in others] == [*speed.POLICIES]
    for group, case in zip(others, speed.POLICIES, strict=True):
        timings = next(row for row in policies if row["case"] == case)["timings"]
        floor = timings["network alone"]["seconds"] / 10
        for bar, loop in zip(group.bars, ("LeRobot", "fastddim"), strict=True):
            assert bar.total == pytest.approx(floor * timings[loop]["ratio"], rel=1e-12)
            assert bar.parts[speed.NETWORK] == min(floor, bar.total)


def test_the_time_of_a_step_on_a_gpu_is_that_of_the_results() -> None:
    rows = figures.Work().read("gpu-h100")["rows"]
    seconds = {row["measure"]: row["seconds"]["median"] for row in rows if "measure" in row}
    panel = speed.gpu_time(rows)
    names = [f"loop, {case}, eta 0" for case in speed.GPU_NETWORKS] + ["latent U-Net"]
    for group, name in zip(panel.groups, names, strict=True):
        theirs, own = group.bars
        assert theirs.total == pytest.approx(seconds[f"{name}, diffusers"], rel=1e-12)
        assert own.total == pytest.approx(seconds[f"{name}, graph=True"], rel=1e-12)
        assert theirs.parts[speed.NETWORK] == own.parts[speed.NETWORK] <= own.total
        assert own.parts[speed.NETWORK] <= seconds[f"{name}, graph=loop"]


def test_the_dots_of_an_update_are_the_ratios_of_the_results() -> None:
    rows = figures.Work().read("step-cpu")["rows"]
    scale = speed.update_dots(rows)
    drawn = {
        f"{eta}, {case}": values
        for eta, panel in zip(("η = 0", "η = 1"), scale.panels, strict=True)
        for case, values in panel.rows.items()
    }
    assert set(drawn) == {row["case"] for row in rows}
    for row in rows:
        for mark in scale.marks:
            assert drawn[row["case"]][mark.label] == row["timings"][mark.label]["ratio"]
    cases = [*scale.panels[0].rows]
    assert cases[: len(scale.panels[1].rows)] == [*scale.panels[1].rows]


def test_labels_are_moved_apart_no_further_than_needed() -> None:
    assert spread([0.0, 20.0, 40.0], 10) == [0.0, 20.0, 40.0]
    assert spread([5.0, 5.0], 10) == [0.0, 10.0]
    assert spread([0.0, 1.0, 2.0, 50.0], 10) == [-9.0, 1.0, 11.0, 50.0]
    assert spread([], 10) == []


def test_bars_without_a_length_or_colour(tmp_path: Path) -> None:
    for parts in ({"a": -1.0}, {"b": 1.0}):
        panel = Bars("t", "m", [Group("g", [Bar("x", parts, "1 s")])], {"a": BLUE})
        with pytest.raises(ValueError, match=r"panels: expected parts >= 0 of \['a'\], got"):
            bars(tmp_path / "a.png", [panel])
    scale = Scale([Dots("t", {"x": {"a": 0.0}})], [Mark("a", BLUE, "o")], "m", "u")
    with pytest.raises(ValueError, match="scale: expected values > 0, got"):
        dots(tmp_path / "a.png", scale)
    assert not list(tmp_path.iterdir())


# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as it is seen by most, and with
# deuteranopia, protanopia and tritanopia.
SEEN = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
)


LUMINANCE = (0.2126, 0.7152, 0.0722)


def linear(color: str) -> np.ndarray:
    """The linear RGB of an sRGB colour."""
    levels = np.array(to_rgb(color))
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def cielab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB under D65, in which 2 are just told apart."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(to_xyz @ rgb.clip(1e-3, 1) / (0.9505, 1.0, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_colours_stand_out_for_the_colour_blind_too(theme: Theme) -> None:
    names = (BLUE, ORANGE, GREEN, PURPLE, FAINT, TEXT)
    colors = [linear(theme.color(name)) for name in names]
    for one, other in itertools.combinations(colors, 2):
        for seen in SEEN:
            assert (
                np.linalg.norm(cielab(np.array(seen) @ one) - cielab(np.array(seen) @ other)) > 20
            )
    # WCAG 2.1: contrast of 3 for graphics, and of 4.5 for text.
    for name, color in zip(names, colors, strict=True):
        bright = [np.dot(LUMINANCE, c) + 0.05 for c in (color, linear(theme.page))]
        assert max(bright) / min(bright) > (4.5 if name in (FAINT, TEXT) else 3)


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
    line = Line("a", [1, 10], [1.0, 0.1], BLUE, error=[0.1, 0.01])
    steeper = Line("a", [1, 10], [1.0, 0.01], BLUE)
    for name, shown in (("a", line), ("b", steeper)):
        plots(tmp_path / f"{name}.png", [Plot("t", [shown], "x", "y")], columns=1)
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [1.0, 0.0]), ([0, 2], [1.0, 2.0])])
def test_lines_without_logarithm(tmp_path: Path, x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="panels: expected points > 0"):
        plots(tmp_path / "a.png", [Plot("t", [Line("a", x, y, BLUE)], "x", "y")])
    assert not list(tmp_path.iterdir())


def test_pages_show_the_committed_pictures() -> None:
    """A page shows one of a light and a dark picture, by what follows the #."""
    pair = re.compile(
        r"!\[([^\]]+)\]\((?:\.\./)?figures/([\w-]+)\.png#gh-light-mode-only\)\n"
        r"!\[\1\]\((?:\.\./)?figures/\2-dark\.png#gh-dark-mode-only\)\n"
    )
    shown, there = set(), {path.name for path in FIGURES.glob("*.png")}
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text()
        names = [name for _, name in pair.findall(text)]
        assert text.count("/figures/") + text.count("(figures/") == 2 * len(names), page
        shown |= {f"{name}{theme.suffix}.png" for name in names for theme in THEMES}
    hero = {"hero.png", "hero-dark.png"}  # the README's
    assert shown - hero == there - hero
    assert shown - hero == {
        f"{name}{theme.suffix}.png"
        for name in (*COMMITTED, "third-party", "policy-success")
        for theme in THEMES
    }


@pytest.mark.parametrize("name", [*COMMITTED, "third-party", "policy-success"])
def test_committed_pictures_are_small_and_can_be_read(name: str) -> None:
    """The smallest text has 9 pixels where a picture is shown 800 pixels wide."""
    pair = [themed(FIGURES / f"{name}.png", theme) for theme in THEMES]
    drawn = [pixels(path) for path in pair]
    assert drawn[0].shape[:2] == drawn[1].shape[:2]
    for path, image in zip(pair, drawn, strict=True):
        assert path.stat().st_size < 200_000
        assert image.std() > 15
        assert 800 / max(800, image.shape[1]) * SMALL * DPI / 72 >= 9


def test_committed_plots_are_those_of_the_committed_results(tmp_path: Path) -> None:
    """The same versions draw the same plots; sheets, which show images, are left out."""
    figures.draw([*figures.PLOTS], figures.Work(figures=tmp_path), only_plots=True)
    paths = sorted(tmp_path.glob("*.png"))
    assert len(paths) == 2 * len(figures.PLOTS)
    for path in paths:
        with Image.open(FIGURES / path.name) as image:
            if image.text["Software"] != DRAWN_BY:
                pytest.skip(f"drawn by {image.text['Software']}, here is {DRAWN_BY}")
        same = np.array_equal(pixels(path), pixels(FIGURES / path.name))
        assert same, f"{path.name}: python benchmarks/figures.py --plots draws it anew"


@pytest.mark.parametrize("name", ["consistency", "reconstruction"])
def test_committed_numbers_are_of_the_bundled_models(name: str) -> None:
    result = figures.Work().read(name)
    assert result["machine"]["modified"] is False
    assert {(row["data"], row["weights"]) for row in result["rows"]} == {
        (model, figures.fingerprint(model)) for model in ("digits", "fashion")
    }
