"""The README's picture: its images are samples, and its numbers those of the result file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from paper import hero
from paper.style import DARK, DRAWN_BY, LIGHT, SMALL, THEMES, Theme, themed
from PIL import Image
from quality.grid import Cell

import fastddim
from fastddim.images import Images, read_text, to_uint8

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "docs" / "figures" / "hero.png"
ROWS, COLUMNS = len(hero.WAYS), hero.COUNT
PITCH = hero.CELL + hero.PADDING
# A palette of 256 colours moves those at the edges of lines by less than this, and a pixel of text
# that is not there by more.
ROUNDED = 100


def quality_of(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"quality-{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def colours(path: Path) -> Images:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def image_at(picture: Images, row: int, column: int) -> Images:
    """An image of the table as it is enlarged there, `[H, W, 3]`."""
    top = hero.TOP + hero.PADDING + row * PITCH
    left = hero.LEFT + hero.PADDING + column * PITCH
    return picture[top : top + hero.CELL, left : left + hero.CELL]


def outside(picture: Images, rows: int, columns: int) -> Images:
    """A copy with the images blackened."""
    rest = picture.copy()
    for row in range(rows):
        for column in range(columns):
            image_at(rest, row, column)[:] = 0
    return rest


def figure_of(
    monkeypatch: pytest.MonkeyPatch, quality: dict[str, Any], theme: Theme = LIGHT
) -> Figure:
    """The picture of all ways with blank images, before it becomes pixels."""
    kept: list[Figure] = []
    drawn = hero.pixels
    monkeypatch.setattr(hero, "pixels", lambda figure: kept.append(figure) or drawn(figure))
    images = np.zeros((ROWS, COLUMNS, 28, 28, 1), dtype=np.uint8)
    rows = [hero.row_of(quality, way.cell) for way in hero.WAYS]
    hero.picture(images, hero.WAYS, rows, quality, theme)
    return kept[0]


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_labels_are_those_of_the_result_file(monkeypatch: pytest.MonkeyPatch) -> None:
    quality = quality_of("fashion")
    expected = []
    for steps, spacing, eta, name in (
        (1000, "uniform", 0.0, "DDIM"),
        (10, "tuned", 0.0, "tuned"),
        (10, "trailing", 0.0, "DDIM"),
        (10, "trailing", 1.0, "η = 1"),
    ):
        wanted = {"steps": steps, "spacing": spacing, "eta": eta, "order": 1, "variance": "small"}
        (row,) = (row for row in quality["rows"] if wanted.items() <= row.items())
        cell = row["classifier"]
        assert cell["count"] == 2000
        expected += [f"{steps} calls, {name}"]
        expected += [f"distance {cell['distance']:.0f} ± {cell['error']:.0f}"]
    found = [text.get_text() for text in texts(figure_of(monkeypatch, quality))]
    assert [text for text in found if " calls, " in text or "distance " in text] == expected
    assert any("2,000 samples" in text for text in found)
    assert "DDPM, 1000 calls: 12.5" in found
    assert f"samples {hero.FIRST} to {hero.FIRST + hero.COUNT - 1} of seed 0" in found


def test_curves_are_those_of_the_result_file(monkeypatch: pytest.MonkeyPatch) -> None:
    quality = quality_of("fashion")
    (ax,) = figure_of(monkeypatch, quality).axes
    drawn = {
        (x, y) for line in ax.get_lines() for x, y in np.asarray(line.get_xydata()).tolist() if x
    }
    for steps, spacing, eta in (
        *((steps, "trailing", eta) for steps in (5, 10, 20, 50, 100) for eta in (0.0, 1.0)),
        *((steps, "tuned", 0.0) for steps in (4, 5, 6, 8, 10, 12, 15, 20)),
        (1000, "uniform", 0.0),
    ):
        wanted = {"steps": steps, "spacing": spacing, "eta": eta, "order": 1, "variance": "small"}
        (row,) = (row for row in quality["rows"] if wanted.items() <= row.items())
        assert (steps, row["classifier"]["distance"]) in drawn


@pytest.mark.parametrize("theme", THEMES, ids=("light", "dark"))
def test_text_is_large_enough_and_apart(monkeypatch: pytest.MonkeyPatch, theme: Theme) -> None:
    """Ten pixels where the picture is shown 800 wide; no text touches another or the edge."""
    figure = figure_of(monkeypatch, quality_of("fashion"), theme)
    width, height = figure.canvas.get_width_height()
    assert width == 1640
    boxes = []
    for text in texts(figure):
        size = float(text.get_fontsize())
        assert size >= SMALL
        assert size / 72 * figure.dpi * 800 / width >= 10
        boxes.append((text.get_text(), text.get_window_extent()))
    for i, (name, box) in enumerate(boxes):
        assert box.x0 >= 8, name
        assert box.y0 >= 4, name
        assert box.x1 <= width - 8, name
        assert box.y1 <= height - 4, name
        for other, there in boxes[:i]:
            assert not box.overlaps(there), (name, other)


@pytest.mark.parametrize("changed", ["weights", "tuned"])
def test_another_model_is_refused(tmp_path: Path, changed: str) -> None:
    """Numbers that were measured with other weights, or other tuned steps, are not drawn."""
    quality = quality_of("digits")
    for row in quality["rows"]:
        if changed in row:
            row[changed] = "0" * 16
    with pytest.raises(LookupError, match="expected a row of digits with"):
        hero.hero(tmp_path / "hero.png", quality)
    assert not list(tmp_path.iterdir())


def test_each_row_has_the_samples_of_its_way(tmp_path: Path) -> None:
    """In both themes, and pixel by pixel before a file's palette rounds them."""
    ways = (
        hero.Way("tuned", Cell(5, spacing="tuned"), "purple"),
        hero.Way("η = 1", Cell(5, 1.0, spacing="trailing"), "orange"),
    )
    quality = quality_of("digits")
    path = tmp_path / "hero.png"
    hero.hero(path, quality, ways, 3)
    model = fastddim.models.load("digits")
    which = {"batch_size": 3, "sample_offset": hero.FIRST, "seed": 0}
    expected = [
        to_uint8(fastddim.sample(model, model.tuned[5], **which)),
        to_uint8(fastddim.sample(model, 5, eta=1.0, **which)),
    ]
    rows = [hero.row_of(quality, way.cell) for way in ways]
    images = hero.samples("digits", ways, 3)
    scale = hero.CELL // 8
    for theme in THEMES:
        picture = hero.picture(images, ways, rows, quality, theme)
        assert picture.shape[2] == 3
        for row, own in enumerate(expected):
            for column, image in enumerate(own):
                large = image.repeat(scale, axis=0).repeat(scale, axis=1)
                assert (image_at(picture, row, column) == large).all(), (row, column)
        written = colours(themed(path, theme))
        assert written.shape == picture.shape
        assert np.abs(written.astype(int) - picture).max() <= ROUNDED


def test_a_changed_number_changes_its_label_alone() -> None:
    quality = quality_of("fashion")
    images = np.zeros((ROWS, COLUMNS, 28, 28, 1), dtype=np.uint8)
    rows = [hero.row_of(quality, way.cell) for way in hero.WAYS]
    other = copy.deepcopy(rows)
    other[1]["classifier"]["distance"] = 31.4
    first, second = (hero.picture(images, hero.WAYS, r, quality, DARK) for r in (rows, other))
    changed = [
        bool(
            (first[top : top + PITCH, : hero.LEFT] != second[top : top + PITCH, : hero.LEFT]).any()
        )
        for top in range(hero.TOP, hero.TOP + ROWS * PITCH, PITCH)
    ]
    assert changed == [False, True, False, False]


class TestCommitted:
    """The picture in docs/figures is of the bundled weights and of the committed numbers."""

    def test_images(self) -> None:
        """The rows of few calls, drawn again; another processor rounds the network otherwise."""
        few = [way for way in hero.WAYS if way.cell.steps <= 10]
        images = hero.samples("fashion", few, COLUMNS)
        for theme in THEMES:
            picture = colours(themed(COMMITTED, theme))
            for row, own in zip(range(ROWS - len(few), ROWS), images, strict=True):
                for column, image in enumerate(own):
                    shown = image_at(picture, row, column)[2::4, 2::4].astype(int)
                    assert np.abs(shown - image).mean() < 3, (row, column)

    def test_numbers(self) -> None:
        """All around the images is as it is drawn now."""
        if read_text(COMMITTED)["Software"] != DRAWN_BY:
            pytest.skip(f"drawn by {read_text(COMMITTED)['Software']}, and here is {DRAWN_BY}")
        quality = quality_of("fashion")
        rows = [hero.row_of(quality, way.cell) for way in hero.WAYS]
        images = np.zeros((ROWS, COLUMNS, 28, 28, 1), dtype=np.uint8)
        for theme in THEMES:
            drawn = hero.picture(images, hero.WAYS, rows, quality, theme)
            shown = outside(colours(themed(COMMITTED, theme)), ROWS, COLUMNS)
            assert shown.shape == drawn.shape
            assert np.abs(shown.astype(int) - outside(drawn, ROWS, COLUMNS)).max() <= ROUNDED
