"""Sheets of images and plots of lines, as PNG files that are the same whenever they are drawn.

Nothing here keeps state: figures are made without pyplot, and their style holds for one figure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fastddim.images import Images, grid, save_png

DPI = 150
WIDTH = 8.2
CELL = 112
# Okabe and Ito's colours, which the colour-blind tell apart.
BLACK, BLUE, ORANGE, GREEN, PURPLE, GREY = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#777777",
)

# Pixels around a panel's images.
_MARGIN, _TITLE, _COLUMN_LABEL, _ROW_LABEL, _GAP, _PADDING = 14, 36, 26, 96, 28, 4

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """Points of one kind, joined; `error` is half the length of their bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    marker: str = "o"
    dashes: str = "-"
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line to read the others against, labelled above or below its left end; `error`
    is half the width of a band around it.
    """

    label: str
    y: float
    color: str = GREY
    below: bool = False
    error: float = 0.0


@dataclass(frozen=True)
class Plot:
    """One pair of axes: x logarithmic, and y unless it is `linear`, as shares are."""

    title: str
    lines: Sequence[Line]
    xlabel: str
    ylabel: str
    levels: Sequence[Level] = ()
    linear: bool = False


@dataclass(frozen=True)
class Panel:
    """A table of images `[rows, columns, H, W, C]`, uint8, with what its rows and columns are."""

    title: str
    images: Images
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()


def plots(path: str | os.PathLike[str], panels: Sequence[Plot], *, columns: int = 2) -> None:
    """Write plots side by side, `columns` in a row, above one legend of all their lines.

    Raises:
        ValueError: no panel, or a line without points or with one that has no logarithm.
        OSError: `path` cannot be written.
    """
    if not panels:
        raise ValueError("panels: expected at least one, got none")
    for panel in panels:
        for line in panel.lines:
            if not line.x or min(line.x if panel.linear else (*line.x, *line.y)) <= 0:
                raise ValueError(f"panels: expected points > 0, got {line}")
    rows = math.ceil(len(panels) / columns)
    with _figure(WIDTH, 3.0 * rows + 0.3, layout="constrained") as figure:
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
        axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes, panels, strict=False):
            _plot(ax, panel)
        handles = {
            label: handle
            for ax in axes
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
        )
        save_png(path, _pixels(figure))


def sheet(path: str | os.PathLike[str], layout: Sequence[Sequence[Panel]]) -> None:
    """Write tables of images: each row of `layout` below the last, its panels side by side.

    An image is enlarged by a whole factor, as near to `CELL` pixels as fits, and not smoothed.

    Raises:
        ValueError: no panel.
        OSError: `path` cannot be written.
    """
    if not layout or not all(layout):
        raise ValueError("layout: expected a panel in each row, got none")
    boxes = [[_Box.of(panel) for panel in row] for row in layout]
    width = max(sum(box.width for box in row) + _GAP * (len(row) - 1) for row in boxes)
    heights = [max(box.height for box in row) for row in boxes]
    total = sum(heights) + _GAP * (len(boxes) - 1)
    with _figure((width + 2 * _MARGIN) / DPI, (total + 2 * _MARGIN) / DPI) as figure:
        top = _MARGIN
        for row, height in zip(boxes, heights, strict=True):
            left = _MARGIN
            for box in row:
                box.place(figure, left, top)
                left += box.width + _GAP
            top += height + _GAP
        save_png(path, _pixels(figure))


@dataclass(frozen=True)
class _Box:
    """A panel's images as one, and the pixels that they take with their labels."""

    panel: Panel
    tiled: Images
    left: int
    top: int

    @classmethod
    def of(cls, panel: Panel) -> _Box:
        rows, columns, height, width, channels = panel.images.shape
        images = panel.images.reshape(rows * columns, height, width, channels)
        scale = max(1, CELL // max(height, width))
        tiled = grid(images, columns, scale=scale, padding=_PADDING)
        return cls(
            panel,
            tiled,
            left=_ROW_LABEL if panel.rows else 0,
            top=_TITLE + (_COLUMN_LABEL if panel.columns else 0),
        )

    @property
    def width(self) -> int:
        return self.left + self.tiled.shape[1]

    @property
    def height(self) -> int:
        return self.top + self.tiled.shape[0]

    def place(self, figure: Figure, left: int, top: int) -> None:
        """Draw with the upper left corner at these pixels of the figure."""
        width, height = (round(inches * DPI) for inches in figure.get_size_inches())
        x, y = left + self.left, top + self.top
        pixels = np.broadcast_to(self.tiled, (*self.tiled.shape[:2], 3))
        figure.figimage(pixels, x, height - y - len(pixels), origin="upper")

        def write(text: str, across: float, down: float, **style: str) -> None:
            figure.text(across / width, 1 - down / height, text, va="center", **style)

        write(self.panel.title, x + _PADDING, top + _TITLE / 2, weight="bold", size="large")
        rows, columns = self.panel.images.shape[:2]
        for i, label in enumerate(self.panel.columns):
            across = x + (i + 0.5) * self.tiled.shape[1] / columns
            write(label, across, y - _COLUMN_LABEL / 2, ha="center")
        for i, label in enumerate(self.panel.rows):
            down = y + (i + 0.5) * self.tiled.shape[0] / rows
            write(label, x - 8, down, ha="right")


def _plot(ax: Axes, panel: Plot) -> None:
    for line in panel.lines:
        ax.errorbar(
            line.x,
            line.y,
            line.error,
            label=line.label,
            color=line.color,
            marker=line.marker,
            linestyle=line.dashes,
        )
    ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    ax.set_xscale("log")
    ax.set_yscale("linear" if panel.linear else "log")
    ticks = sorted({x for line in panel.lines for x in line.x})
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    if panel.levels:
        ax.set_ymargin(0.15)
    for level in panel.levels:
        if level.error:
            edges = level.y - level.error, level.y + level.error
            ax.axhspan(*edges, color=level.color, alpha=0.15, linewidth=0, zorder=0)
        ax.axhline(level.y, color=level.color, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
        ax.annotate(
            level.label,
            (0, level.y),
            xycoords=("axes fraction", "data"),
            xytext=(4, -3 if level.below else 3),
            textcoords="offset points",
            ha="left",
            va="top" if level.below else "bottom",
            color=level.color,
            size="small",
        )


@contextmanager
def _figure(width: float, height: float, **options: str) -> Iterator[Figure]:
    """A figure of these inches, in the style of all."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield Figure((width, height), dpi=DPI, **options)


def _pixels(figure: Figure) -> Images:
    """The figure drawn: uint8 `[H, W, 1]` if all of it is grey, else `[H, W, 3]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    colours = np.asarray(canvas.buffer_rgba())[:, :, :3]
    grey = bool((colours == colours[:, :, :1]).all())
    return np.ascontiguousarray(colours[:, :, :1] if grey else colours)
