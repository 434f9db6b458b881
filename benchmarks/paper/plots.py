"""Plots of lines, for light and for dark pages."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from fastddim.images import Images

from .style import FAINT, SMALL, WIDTH, Theme, figure, pixels, save


@dataclass(frozen=True)
class Line:
    """Points of one kind, joined; `error` is half the length of their bars.

    `color` is the name of one of a theme's, such as `style.BLUE`.
    """

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
    color: str = FAINT
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
    save(path, lambda theme: _plots(panels, columns, theme))


def _plots(panels: Sequence[Plot], columns: int, theme: Theme) -> Images:
    rows = math.ceil(len(panels) / columns)
    with figure(WIDTH, 3.0 * rows + 0.3, theme, layout="constrained") as drawn:
        drawn.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
        axes = drawn.subplots(rows, columns, squeeze=False).flatten().tolist()
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes, panels, strict=False):
            _plot(ax, panel, theme)
        handles = {
            label: handle
            for ax in axes
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
        )
        return pixels(drawn)


def _plot(ax: Axes, panel: Plot, theme: Theme) -> None:
    for line in panel.lines:
        ax.errorbar(
            line.x,
            line.y,
            line.error,
            label=line.label,
            color=theme.color(line.color),
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
        color = theme.color(level.color)
        if level.error:
            edges = level.y - level.error, level.y + level.error
            ax.axhspan(*edges, color=color, alpha=0.15, linewidth=0, zorder=0)
        ax.axhline(level.y, color=color, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
        ax.annotate(
            level.label,
            (0, level.y),
            xycoords=("axes fraction", "data"),
            xytext=(4, -3 if level.below else 3),
            textcoords="offset points",
            ha="left",
            va="top" if level.below else "bottom",
            color=color,
            size=SMALL,
        )
