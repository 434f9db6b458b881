"""Plots of lines, for light and for dark pages."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fastddim.images import Images

from .style import CHARACTER, FAINT, SMALL, WIDTH, Theme, figure, pixels, save

# Inches around a pair of axes, of a panel, and of the legend.
_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT, _LEGEND = 0.53, 0.13, 0.5, 0.47, 3.0, 0.3


@dataclass(frozen=True)
class Line:
    """Points of one kind, joined; `error` is half the length of their bars.

    `color` is the name of one of a theme's, such as `style.BLUE`. The label stands at the first
    point where `named` is "start", at the last where it is "end", and else in the legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    marker: str = "o"
    dashes: str | tuple[int, tuple[int, ...]] = "-"
    error: Sequence[float] | None = None
    named: str = ""


@dataclass(frozen=True)
class Level:
    """A horizontal line to read the others against, labelled above or below its left end, or its
    right one; `error` is half the width of a band around it.
    """

    label: str
    y: float
    color: str = FAINT
    below: bool = False
    right: bool = False
    error: float = 0.0


@dataclass(frozen=True)
class Note:
    """A sentence with an arrow to a point: it begins at `offset` points of type from there."""

    text: str
    x: float
    y: float
    color: str
    offset: tuple[float, float]


@dataclass(frozen=True)
class Plot:
    """One pair of axes: x logarithmic, and y unless it is `linear`, as shares are."""

    title: str
    lines: Sequence[Line]
    xlabel: str
    ylabel: str
    levels: Sequence[Level] = ()
    notes: Sequence[Note] = ()
    linear: bool = False


def plots(path: str | os.PathLike[str], panels: Sequence[Plot], *, columns: int = 2) -> None:
    """Write plots side by side, `columns` in a row, above a legend of the lines without a name.

    Raises:
        ValueError: no panel, or a line without points or with one that has no logarithm.
        OSError: a file cannot be written.
    """
    if not panels:
        raise ValueError("panels: expected at least one, got none")
    for panel in panels:
        for line in panel.lines:
            if not line.x or min(line.x if panel.linear else (*line.x, *line.y)) <= 0:
                raise ValueError(f"panels: expected points > 0, got {line}")
    save(path, lambda theme: _plots(panels, columns, theme))


def _plots(panels: Sequence[Plot], columns: int, theme: Theme) -> Images:
    rows = math.ceil(len(panels) / columns)
    legend = any(not line.named for panel in panels for line in panel.lines)
    bottom = _LEGEND if legend else 0.0
    height = _HEIGHT * rows + bottom
    with figure(WIDTH, height, theme) as drawn:
        handles = {}
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            left = WIDTH * column / columns + _LEFT
            low = bottom + _HEIGHT * (rows - 1 - row) + _BOTTOM
            wide, tall = WIDTH / columns - _LEFT - _RIGHT, _HEIGHT - _BOTTOM - _TOP
            box = left / WIDTH, low / height, wide / WIDTH, tall / height
            ax = drawn.add_axes(box)
            _plot(ax, panel, theme, wide)
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if legend:
            _legend(drawn, handles)
        return pixels(drawn)


def _legend(drawn: Figure, handles: dict[str, object]) -> None:
    place = {"loc": "lower center", "borderaxespad": 0.4, "handletextpad": 0.5}
    drawn.legend(handles.values(), handles.keys(), ncols=len(handles), **place)


def _plot(ax: Axes, panel: Plot, theme: Theme, wide: float) -> None:
    for line in panel.lines:
        ax.errorbar(
            line.x,
            line.y,
            line.error,
            label="_" if line.named else line.label,
            color=theme.color(line.color),
            marker=line.marker,
            linestyle=line.dashes,
            elinewidth=1.0,
        )
    ax.set_xscale("log")
    ax.set_yscale("linear" if panel.linear else "log")
    ax.set_xlabel(panel.xlabel, labelpad=3)
    titles(ax, panel.title, panel.ylabel, theme)
    _limits(ax, panel, wide)
    values = sorted({x for line in panel.lines for x in line.x})
    if any(x != round(x) for x in values):
        values = between(*ax.get_xlim())
    ticks = _apart(values, ax, wide)
    ax.set_xticks(ticks, [f"{x:,g}" for x in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    if not panel.linear:
        _decades(ax)
    for level in panel.levels:
        _level(ax, level, theme)
    for note in panel.notes:
        _note(ax, note, theme)
    for named in ("start", "end"):
        _names(ax, [line for line in panel.lines if line.named == named], named, theme)


def titles(ax: Axes, title: str, measure: str, theme: Theme) -> None:
    """Write the title of a panel, and below it what is measured and in which unit."""
    ax.set_title(title, pad=21)
    ax.annotate(
        measure,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        color=theme.faint,
    )


def _limits(ax: Axes, panel: Plot, wide: float) -> None:
    """Room for the names at the ends of lines, and above and below all."""
    xs = [x for line in panel.lines for x in line.x]
    first, last = math.log(min(xs)), math.log(max(xs))
    room = {
        named: max(
            (CHARACTER * len(line.label) + 0.12 for line in panel.lines if line.named == named),
            default=0.16,
        )
        for named in ("start", "end")
    }
    inch = (last - first) / (wide - room["start"] - room["end"])
    ax.set_xlim(math.exp(first - room["start"] * inch), math.exp(last + room["end"] * inch))
    lowest, highest = ax.get_ylim()
    ax.set_ymargin(0.15 if panel.levels and not panel.linear else 0.06)
    if panel.notes:
        # A note stands below all.
        ax.set_ylim(lowest / (highest / lowest) ** 0.35, highest)


def _apart(values: Sequence[float], ax: Axes, wide: float) -> list[float]:
    """Of the values those whose labels do not touch, the rounder ones first."""
    low, high = map(math.log, ax.get_xlim())
    kept: list[float] = []
    for value in sorted(values, key=_roundness):
        place = wide * (math.log(value) - low) / (high - low)
        free = (
            abs(place - wide * (math.log(other) - low) / (high - low))
            > CHARACTER * (len(f"{value:,g}") + len(f"{other:,g}")) / 2 + 0.04
            for other in kept
        )
        if all(free):
            kept.append(value)
    return sorted(kept)


def _roundness(value: float) -> tuple[int, bool, float]:
    digits = f"{value:.0f}".rstrip("0")
    return len(digits), digits not in ("1", "2", "5"), value


def _decades(ax: Axes) -> None:
    """Ticks at powers of ten, and between them where there are few."""
    low, high = ax.get_ylim()
    few = math.log10(high / low) < 2
    ax.set_yticks(between(low, high, (1, 2, 5) if few else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    if low > 5e-5:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))


def between(low: float, high: float, parts: Sequence[int] = (1, 2, 5)) -> list[float]:
    """The powers of ten from low to high, times each of `parts`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{part}e{power}") for power in powers for part in parts]
    return [tick for tick in ticks if low <= tick <= high]


def _level(ax: Axes, level: Level, theme: Theme) -> None:
    color = theme.color(level.color)
    if level.error:
        edges = level.y - level.error, level.y + level.error
        ax.axhspan(*edges, color=color, alpha=0.15, linewidth=0, zorder=0)
    ax.axhline(level.y, color=color, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    ax.annotate(
        level.label,
        (1 if level.right else 0, level.y),
        xycoords=("axes fraction", "data"),
        xytext=(-4 if level.right else 4, -4 if level.below else 3),
        textcoords="offset points",
        ha="right" if level.right else "left",
        va="top" if level.below else "bottom",
        color=color,
        size=SMALL,
    )


def _note(ax: Axes, note: Note, theme: Theme) -> None:
    color = theme.color(note.color)
    ax.annotate(
        note.text,
        (note.x, note.y),
        xytext=note.offset,
        textcoords="offset points",
        ha="center",
        va="center",
        color=color,
        size=SMALL,
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 0.9, "shrinkB": 5},
    )


def _names(ax: Axes, lines: Sequence[Line], named: str, theme: Theme) -> None:
    """Labels at the ends of lines, moved apart where they would overlap."""
    end = 0 if named == "start" else -1
    points = 72 / ax.figure.dpi
    lines = sorted(lines, key=lambda line: line.y[end])
    heights = [points * ax.transData.transform((x.x[end], x.y[end]))[1] for x in lines]
    for line, height, own in zip(lines, spread(heights, 10.5), heights, strict=True):
        ax.annotate(
            line.label,
            (line.x[end], line.y[end]),
            xytext=(-7 if named == "start" else 7, height - own),
            textcoords="offset points",
            ha="right" if named == "start" else "left",
            va="center_baseline",
            color=theme.color(line.color),
            bbox={"facecolor": theme.page, "edgecolor": "none", "pad": 1.0},
        )


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """The nearest heights that are `apart` at least, of heights in ascending order."""
    blocks: list[tuple[float, int]] = []  # mean of what is moved together, and its length
    for i, height in enumerate(heights):
        mean, length = height - i * apart, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean = (mean * length + other * count) / (length + count)
            length += count
        blocks.append((mean, length))
    moved = [mean for mean, length in blocks for _ in range(length)]
    return [mean + i * apart for i, mean in enumerate(moved)]
