"""Pictures with a row for each case: bars of several parts, and dots on a logarithmic scale."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from fastddim.images import Images

from .plots import between, titles
from .style import FAINT, SMALL, WIDTH, Theme, figure, pixels, save

_TOP, _BOTTOM, _LEGEND = 0.5, 0.2, 0.36
"""Inches above and below the rows, and of the legend."""


@dataclass(frozen=True)
class Bar:
    """The sizes of its parts by their names, and a text at its end."""

    label: str
    parts: Mapping[str, float]
    text: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Group:
    """Bars under a heading; the longest is as long as that of every other group."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Bars:
    """One panel; `colors` are the names of the parts with those of their colours."""

    title: str
    measure: str
    groups: Sequence[Group]
    colors: Mapping[str, str]


@dataclass(frozen=True)
class Mark:
    """The look of the dots of one kind; hollow ones show what lies below them."""

    label: str
    color: str
    marker: str
    hollow: bool = False


@dataclass(frozen=True)
class Dots:
    """One panel: for each row the values of marks by their labels; all are > 0."""

    title: str
    rows: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Scale:
    """Panels of dots over one x axis, with a line at `unit`."""

    panels: Sequence[Dots]
    marks: Sequence[Mark]
    measure: str
    unit: str


def bars(path: str | os.PathLike[str], panels: Sequence[Bars]) -> None:
    """Write panels of bars side by side, above one legend of their parts.

    Raises:
        ValueError: a part is negative or has no colour.
        OSError: a file cannot be written.
    """
    for panel in panels:
        for bar in (bar for group in panel.groups for bar in group.bars):
            if min(bar.parts.values()) < 0 or not set(bar.parts) <= set(panel.colors):
                raise ValueError(f"panels: expected parts >= 0 of {[*panel.colors]}, got {bar}")
    save(path, lambda theme: _bars(panels, theme))


def _bars(panels: Sequence[Bars], theme: Theme) -> Images:
    heading, thick, apart, names, texts = 0.2, 0.17, 0.12, 0.72, 0.62
    tall = max(
        sum(heading + thick * len(group.bars) + apart for group in panel.groups) for panel in panels
    )
    height = _TOP + tall + _LEGEND
    colors = {name: color for panel in panels for name, color in panel.colors.items()}
    with figure(WIDTH, height, theme) as drawn:
        for i, panel in enumerate(panels):
            left = WIDTH * i / len(panels)
            wide = WIDTH / len(panels) - 0.3
            box = (left + 0.15) / WIDTH, _LEGEND / height, wide / WIDTH, tall / height
            ax = drawn.add_axes(box)
            ax.set(xlim=(0, wide), ylim=(tall, 0), xticks=(), yticks=())
            ax.spines[:].set_visible(False)
            titles(ax, panel.title, panel.measure, theme)
            down = 0.0
            for group in panel.groups:
                longest = max(bar.total for bar in group.bars)
                inch = (wide - names - texts) / longest
                ax.text(0, down + heading / 2, group.title, va="center", weight="bold", size=SMALL)
                down += heading
                for bar in group.bars:
                    middle = down + thick / 2
                    ax.text(names - 0.08, middle, bar.label, ha="right", va="center", size=SMALL)
                    start = names
                    for name, size in bar.parts.items():
                        color = _filling(theme, panel.colors[name])
                        ax.barh(middle, size * inch, thick - 0.03, left=start, color=color)
                        start += size * inch
                    ax.text(start + 0.06, middle, bar.text, va="center", size=SMALL)
                    down += thick
                down += apart
        handles = [
            Patch(color=_filling(theme, color), label=name) for name, color in colors.items()
        ]
        style = {"handlelength": 1.0, "handleheight": 1.0, "borderaxespad": 0.4}
        drawn.legend(handles=handles, loc="lower center", ncols=len(handles), **style)
        return pixels(drawn)


def _filling(theme: Theme, name: str) -> str | tuple[float, ...]:
    """The colour of a part; grey in a large area is lighter than in a line."""
    return theme.tinted(name, 0.55) if name == FAINT else theme.color(name)


def dots(path: str | os.PathLike[str], scale: Scale) -> None:
    """Write panels of dots side by side, above one legend of their marks; rows of the first panel
    that another lacks stay empty there.

    Raises:
        ValueError: a value has no logarithm.
        OSError: a file cannot be written.
    """
    for panel in scale.panels:
        for row, values in panel.rows.items():
            if min(values.values()) <= 0:
                raise ValueError(f"scale: expected values > 0, got {values} in {row}")
    save(path, lambda theme: _dots(scale, theme))


def _dots(scale: Scale, theme: Theme) -> Images:
    names, pitch = 2.0, 0.25
    rows = [*scale.panels[0].rows]
    tall = pitch * (len(rows) + 0.6)
    height = _TOP + tall + _BOTTOM + _LEGEND
    wide = (WIDTH - names) / len(scale.panels) - 0.15
    values = [v for panel in scale.panels for row in panel.rows.values() for v in row.values()]
    limits = min(values) / 1.3, max(values) * 1.3
    with figure(WIDTH, height, theme) as drawn:
        for i, panel in enumerate(scale.panels):
            left = names + i * (wide + 0.15)
            box = left / WIDTH, (_LEGEND + _BOTTOM) / height, wide / WIDTH, tall / height
            ax = drawn.add_axes(box)
            _panel(ax, panel, scale, rows, limits, theme)
            ax.set_yticks(range(len(rows)), rows if i == 0 else [""] * len(rows))
        handles = [_dot(mark, theme) for mark in scale.marks]
        style = {"borderaxespad": 0.4, "handletextpad": 0.1}
        drawn.legend(handles=handles, loc="lower center", ncols=len(handles), **style)
        return pixels(drawn)


def _panel(
    ax: Axes,
    panel: Dots,
    scale: Scale,
    rows: Sequence[str],
    limits: tuple[float, float],
    theme: Theme,
) -> None:
    ax.set(xscale="log", xlim=limits, ylim=(len(rows) - 0.5, -1.1))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ticks = between(*limits, (1,))
    ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    titles(ax, panel.title, scale.measure, theme)
    ax.axvline(1, color=theme.text, linewidth=1.0, zorder=1)
    ax.annotate(
        scale.unit,
        (1, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -1),
        textcoords="offset points",
        color=theme.text,
        size=SMALL,
        va="top",
    )
    for y, row in enumerate(rows):
        if row not in panel.rows:
            ax.text(1.15, y, "not measured", va="center", color=theme.faint, size=SMALL)
    for mark in scale.marks:
        found = {
            y: panel.rows[row][mark.label]
            for y, row in enumerate(rows)
            if mark.label in panel.rows.get(row, {})
        }
        style = _dot(mark, theme)
        style.set_data([*found.values()], [*found])
        ax.add_line(style)


def _dot(mark: Mark, theme: Theme) -> Line2D:
    color = theme.color(mark.color)
    return Line2D(
        [],
        [],
        color=color,
        marker=mark.marker,
        markerfacecolor="none" if mark.hollow else color,
        markeredgewidth=1.3,
        markersize=6.5 if mark.hollow else 5,
        linestyle="none",
        label=mark.label,
        clip_on=False,
    )
