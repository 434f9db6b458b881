"""The README's picture: images of the same latents in ten calls of the model and in a thousand, and
the Fréchet distance of such samples by calls.

The label of a row has the colour of its curve, on which its point is ringed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from quality.grid import ALL_STEPS, Cell, fingerprint
from quality_tables import FEW_KINDS, TUNED, Kind, baseline_of

import fastddim
from fastddim.images import Images, to_uint8

from .sheets import tiled
from .style import BLUE, DPI, ORANGE, PURPLE, SMALL, TEXT, WIDTH, Theme, figure, pixels, save

FIRST, COUNT = 16, 8
"""The samples of seed 0 that are shown."""


@dataclass(frozen=True)
class Way:
    """A way of sampling, and the name of its colour; each has a row of images."""

    name: str
    cell: Cell
    color: str

    @property
    def label(self) -> str:
        """Its calls of the model and its name."""
        return f"{self.cell.steps} calls, {self.name}"


WAYS = (
    Way("DDIM", Cell(ALL_STEPS), TEXT),
    Way("tuned", Cell(10, spacing="tuned"), PURPLE),
    Way("DDIM", Cell(10, spacing="trailing"), BLUE),
    Way("η = 1", Cell(10, 1.0, spacing="trailing"), ORANGE),
)

_NOISY, _DDIM, *_ = FEW_KINDS
# All of the timesteps are the same ones in any spacing.
_EXACT = Kind("all timesteps", "uniform")
_CURVES = ((_NOISY, ORANGE), (_DDIM, BLUE), (TUNED, PURPLE))

LEFT, TOP, CELL, PADDING = 284, 62, 112, 4
"""Pixels: the corner of the table of images, the side of an image, and what lies between two."""
_BOTTOM, _LINE = 92, 30
# The axes, from the table's right and the page's, and ticks that do not touch each other.
_BEFORE, _AFTER = 92, 34
_CALLS, _DISTANCES = (5, 10, 20, 100, 1000), (1, 2, 5, 10, 20, 50, 100, 200)


def hero(
    path: str | os.PathLike[str],
    quality: Mapping[str, Any],
    ways: Sequence[Way] = WAYS,
    count: int = COUNT,
) -> None:
    """Draw the samples of the model that was measured, and write the picture.

    Args:
        path: of the picture for light pages; that for dark ones is next to it.
        quality: the result file of a bundled model.
        ways: the rows, from the top.
        count: of the columns.

    Raises:
        LookupError: the weights or the tuned steps of a way are not those that were measured.
        OSError: a file cannot be written.
    """
    rows = [row_of(quality, way.cell) for way in ways]
    images = samples(quality["data"], ways, count)
    save(path, lambda theme: picture(images, ways, rows, quality, theme))


def row_of(quality: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """The measured row of a cell, of whatever number of samples.

    Raises:
        LookupError: there is none with the bundled weights and tuned steps.
    """
    name = quality["data"]
    wanted = cell.entry(fingerprint(name), fastddim.models.load(name))
    del wanted["count"]
    for row in quality["rows"]:
        if wanted.items() <= row.items():
            found: dict[str, Any] = row
            return found
    raise LookupError(f"quality: expected a row of {name} with {wanted}, found none")


def samples(name: str, ways: Sequence[Way], count: int) -> Images:
    """Images of the same latents, a row for each way: uint8 `[ways, count, H, W, C]`."""
    model = fastddim.models.load(name)
    return np.stack([to_uint8(way.cell.draw(model, FIRST, FIRST + count)) for way in ways])


def distance_label(row: Mapping[str, Any]) -> str:
    """The Fréchet distance of a row with its error."""
    cell = row["classifier"]
    digits = 0 if cell["distance"] >= 10 else 1
    return f"distance {cell['distance']:.{digits}f} ± {cell['error']:.{digits}f}"


def notes(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The lines under the images."""
    judged = max(row["classifier"]["count"] for row in rows)
    return (
        "η = 1 adds noise at each step, as DDPM does, so its images differ.",
        f"Lower distances are better; {judged:,} samples, features of a classifier, "
        "± standard deviation.",
    )


def picture(
    images: Images,
    ways: Sequence[Way],
    rows: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    theme: Theme,
) -> Images:
    """The images with their labels, and the curves to the right of them."""
    table = tiled(images, theme, CELL // max(images.shape[2:4]), PADDING)
    height, width = TOP + len(table) + _BOTTOM, round(WIDTH * DPI)
    with figure(WIDTH, height / DPI, theme) as drawn:

        def write(text: str, across: float, down: float, **style: Any) -> None:
            drawn.text(across / width, 1 - down / height, text, va="center", **style)

        drawn.figimage(table, LEFT, _BOTTOM, origin="upper")
        title = "Each column starts from one latent"
        write(title, LEFT + PADDING, TOP / 2, weight="bold", size=9.5)
        which = f"samples {FIRST} to {FIRST + images.shape[1] - 1} of seed {ways[0].cell.seed}"
        right = LEFT + table.shape[1] - PADDING
        write(which, right, TOP / 2, ha="right", size=SMALL, color=theme.faint)
        for i, (way, row) in enumerate(zip(ways, rows, strict=True)):
            middle, color = TOP + (i + 0.5) * len(table) / len(ways), theme.color(way.color)
            x = LEFT - 14
            write(way.label, x, middle - 17, ha="right", weight="bold", size=9.5, color=color)
            write(distance_label(row), x, middle + 18, ha="right", color=theme.faint)
        for i, note in enumerate(notes(rows)):
            down = TOP + len(table) + (i + 1) * _LINE
            write(note, LEFT + PADDING, down, size=SMALL, color=theme.faint)

        x = LEFT + table.shape[1] + _BEFORE
        write("Fréchet distance", x, TOP / 2, weight="bold", size=9.5)
        bottom, across, up = _BOTTOM + PADDING, width - x - _AFTER, len(table) - 2 * PADDING
        ax = drawn.add_axes((x / width, bottom / height, across / width, up / height))
        _curves(ax, ways, rows, quality, theme)
        return pixels(drawn)


def _curves(
    ax: Axes,
    ways: Sequence[Way],
    rows: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    theme: Theme,
) -> None:
    """Distances by calls of the model, with those of the rows ringed and DDPM's level."""
    for kind, color in _CURVES:
        own = kind.rows(quality)
        if kind is _DDIM:
            own += [row for row in _EXACT.rows(quality) if row["steps"] == ALL_STEPS]
        ax.errorbar(
            *_points(own),
            [row["classifier"]["error"] for row in own],
            color=theme.color(color),
            marker="o",
            markersize=3.5,
        )
    for way, row in zip(ways, rows, strict=True):
        color = theme.color(way.color)
        ring = {"markersize": 9.5, "markerfacecolor": "none", "markeredgecolor": color}
        ax.plot(*_points([row]), "o", **ring, markeredgewidth=1.6, clip_on=False)
    distance, error = baseline_of(dict(quality))
    ax.axhspan(distance - error, distance + error, color=theme.faint, alpha=0.15, linewidth=0)
    ax.axhline(distance, color=theme.faint, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.annotate(
        f"DDPM, {ALL_STEPS} calls: {distance:.3g}",
        (1, distance - error),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color=theme.faint,
        size=SMALL,
    )
    ax.set(xscale="log", yscale="log", xlabel="calls of the model")
    ax.set_ylim(bottom=(distance - error) / 1.35)
    low, high = ax.get_ylim()
    shown = [distance for distance in _DISTANCES if low <= distance <= high]
    ax.set_xticks(_CALLS, [str(calls) for calls in _CALLS])
    ax.set_yticks(shown, [str(distance) for distance in shown])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_tick_params(labelsize=SMALL)


def _points(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    return [row["steps"] for row in rows], [row["classifier"]["distance"] for row in rows]
