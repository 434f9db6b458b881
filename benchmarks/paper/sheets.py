"""Sheets: tables of images with their labels, for light and for dark pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fastddim.images import Images

from .style import CHARACTER, DPI, Theme, figure, pixels, save

CELL = 144
"""Pixels of an image's longer side, at most where it has fewer than this."""

# Pixels around a panel's images.
_MARGIN, _TITLE, _COLUMN_LABEL, _GAP, _PADDING = 18, 50, 36, 38, 5


@dataclass(frozen=True)
class Panel:
    """A table of images `[rows, columns, H, W, C]`, uint8, with what its rows and columns are."""

    title: str
    images: Images
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()


def sheet(path: str | os.PathLike[str], layout: Sequence[Sequence[Panel]]) -> None:
    """Write tables of images: each row of `layout` below the last, its panels side by side.

    An image is enlarged by a whole factor, as near to `CELL` pixels as fits, and not smoothed.

    Raises:
        ValueError: no panel.
        OSError: a file cannot be written.
    """
    if not layout or not all(layout):
        raise ValueError("layout: expected a panel in each row, got none")
    save(path, lambda theme: _sheet(layout, theme))


def _sheet(layout: Sequence[Sequence[Panel]], theme: Theme) -> Images:
    boxes = [
        [_Box.of(panel, theme, max(_shown_height(other) for other in row)) for panel in row]
        for row in layout
    ]
    widths = [max(box.width for box in column if box) for column in zip_longest(*boxes)]
    heights = [max(box.height for box in row) for row in boxes]
    width, total = (sum(sizes) + _GAP * (len(sizes) - 1) for sizes in (widths, heights))
    inches = (width + 2 * _MARGIN) / DPI, (total + 2 * _MARGIN) / DPI
    with figure(*inches, theme) as drawn:
        top = _MARGIN
        for row, height in zip(boxes, heights, strict=True):
            left = _MARGIN
            for box, wide in zip(row, widths, strict=False):
                box.place(drawn, left, top)
                left += wide + _GAP
            top += height + _GAP
        return pixels(drawn)


@dataclass(frozen=True)
class _Box:
    """A panel's images as one, and the pixels that they take with their labels."""

    panel: Panel
    tiled: Images
    left: int
    top: int

    @classmethod
    def of(cls, panel: Panel, theme: Theme, height: int) -> _Box:
        return cls(
            panel,
            tiled(panel.images, theme, _scale(panel), _PADDING, height),
            left=round(CHARACTER * DPI * max(map(len, panel.rows), default=-1)) + 14,
            top=_TITLE + (_COLUMN_LABEL if panel.columns else 0),
        )

    @property
    def width(self) -> int:
        return self.left + self.tiled.shape[1]

    @property
    def height(self) -> int:
        return self.top + self.tiled.shape[0]

    def place(self, drawn: Figure, left: int, top: int) -> None:
        """Draw with the upper left corner at these pixels of the figure."""
        width, height = (round(inches * DPI) for inches in drawn.get_size_inches())
        x, y = left + self.left, top + self.top
        drawn.figimage(self.tiled, x, height - y - len(self.tiled), origin="upper")

        def write(text: str, across: float, down: float, **style: str) -> None:
            drawn.text(across / width, 1 - down / height, text, va="center", **style)

        write(self.panel.title, x + _PADDING, top + _TITLE / 2, weight="bold", size="large")
        rows, columns = self.panel.images.shape[:2]
        for i, label in enumerate(self.panel.columns):
            across = x + (i + 0.5) * self.tiled.shape[1] / columns
            write(label, across, y - _COLUMN_LABEL / 2, ha="center")
        for i, label in enumerate(self.panel.rows):
            down = y + (i + 0.5) * self.tiled.shape[0] / rows
            write(label, x - 8, down, ha="right")


def _scale(panel: Panel) -> int:
    return max(1, CELL // max(panel.images.shape[2:4]))


def _shown_height(panel: Panel) -> int:
    """Pixels of an image from its top to its bottom."""
    return panel.images.shape[2] * _scale(panel)


def tiled(images: Images, theme: Theme, scale: int, padding: int, tall: int = 0) -> Images:
    """One image of all, enlarged by `scale`, with the page between them: uint8 `[H, W, 3]`.

    Args:
        images: uint8 `[rows, columns, H, W, C]`.
        theme: that of the page.
        scale: a whole factor.
        padding: pixels between two images, and around all.
        tall: pixels in whose middle each image lies, if it has fewer from top to bottom.
    """
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    rows, columns, height, width, _ = large.shape
    tall = max(tall, height)
    apart = np.array([tall, width]) + padding
    page = np.round(255 * np.array(to_rgb(theme.page))).astype(np.uint8)
    whole = np.full((*(apart * (rows, columns) + padding), 3), page)
    for row, column in np.ndindex(rows, columns):
        top, left = apart * (row, column) + (padding + (tall - height) // 2, padding)
        whole[top : top + height, left : left + width] = large[row, column]
    return whole
