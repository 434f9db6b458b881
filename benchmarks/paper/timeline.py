"""A picture of how a robot acts and plans at the same time: ticks, observations, loops and chunks.

It shows the arguments of one call of `fastddim.ActionSampler` and measures nothing.
"""

from __future__ import annotations

import os

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fastddim.actions.chunks import Chunks
from fastddim.images import Images

from .style import BLUE, GREEN, ORANGE, WIDTH, Theme, figure, pixels, save

HORIZON, EXECUTED, FROZEN, STEPS = 16, 8, 3, 10
"""Actions of a chunk, ticks between two observations, ticks of a loop, and its network calls."""
CHUNKS = 3
TICKS = EXECUTED * (CHUNKS - 1) + HORIZON
HEIGHT = 4.1

# From the top; a chunk takes the lines from its own on.
_CONTROL, _OBSERVATION, _LOOP, _CHUNK, _APART, _END = 0.0, 1.35, 2.15, 3.5, 1.75, 8.75
_TALL = 0.62


CHUNK_COLORS = (BLUE, ORANGE, GREEN)


def executed_chunk(tick: int) -> int:
    """The chunk that the action of a tick is taken from: the newest whose loop has ended."""
    return min(max(0, (tick - FROZEN) // EXECUTED), CHUNKS - 1)


def soft_mask() -> list[float]:
    """The weight of each action of the chunk before in the next one with `"guide"`."""
    chunks = Chunks((1, HORIZON, 1), torch.float64, torch.device("cpu"))
    chunks.shift(EXECUTED, FROZEN)
    weights: list[float] = chunks.weights.flatten().tolist()
    return weights


def timeline(path: str | os.PathLike[str]) -> None:
    """Write the picture.

    Raises:
        OSError: a file cannot be written.
    """
    save(path, _timeline)


def _timeline(theme: Theme) -> Images:
    with figure(WIDTH, HEIGHT, theme) as drawn:
        ax = drawn.add_axes((0.135, 0.1, 0.855, 0.885))
        ax.set(xlim=(-0.2, TICKS + 0.2), ylim=(_END, -0.25), yticks=())
        ax.set_xticks(range(0, TICKS + 1, 4))
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("control tick", labelpad=1)
        _control(ax, theme)
        for chunk in range(CHUNKS):
            _loop(ax, theme, chunk)
            _chunk(ax, theme, chunk)
        _spans(ax, theme)
        return pixels(drawn)


def _control(ax: Axes, theme: Theme) -> None:
    _name(ax, theme, _CONTROL, "executed\nactions")
    for tick in range(TICKS):
        _cell(ax, theme, tick, _CONTROL, _color(theme, executed_chunk(tick)))


def _loop(ax: Axes, theme: Theme, chunk: int) -> None:
    """The observation of a chunk and the loop that makes it; those of the first are over."""
    if chunk == 0:
        _name(ax, theme, _OBSERVATION, "observation")
        _name(ax, theme, _LOOP, f"loop of {STEPS}\nnetwork calls")
        return
    start, color = EXECUTED * chunk, _color(theme, chunk)
    ax.plot(start, _OBSERVATION + _TALL / 2, "o", color=color, markersize=6)
    arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.0}
    loop, first = _LOOP, _CHUNK + _APART * chunk
    ax.annotate("", (start, loop), (start, _OBSERVATION + _TALL / 2), arrowprops=arrow)
    for step in range(STEPS):
        left = start + FROZEN * step / STEPS
        ax.add_patch(
            Rectangle(
                (left, loop), FROZEN / STEPS, _TALL, facecolor=color, edgecolor=theme.page, lw=0.8
            )
        )
    end = start + FROZEN
    ax.annotate("", (end, first), (end, loop + _TALL), arrowprops=arrow)


def _chunk(ax: Axes, theme: Theme, chunk: int) -> None:
    """The actions of a chunk at the ticks that they are due at."""
    start, top, color = EXECUTED * chunk, _CHUNK + _APART * chunk, _color(theme, chunk)
    _name(ax, theme, top, f"chunk {chunk + 1}")
    for i in range(HORIZON):
        frozen = chunk > 0 and i < FROZEN
        taken = executed_chunk(start + i) == chunk
        own = color if taken else theme.tinted(CHUNK_COLORS[chunk], 0.25)
        face = _color(theme, chunk - 1) if frozen else own
        _cell(ax, theme, start + i, top, face, hatch="////" if frozen else None)
    if chunk > 0:
        bottom = top + _TALL + 0.55
        for i, weight in enumerate(soft_mask()):
            ax.add_patch(
                Rectangle(
                    (start + i + 0.06, bottom - 0.45 * weight),
                    0.88,
                    0.45 * weight,
                    facecolor=theme.faint,
                )
            )
        ax.plot([start, start + HORIZON], [bottom, bottom], color=theme.faint, linewidth=0.6)
        _note(ax, theme, start - 0.25, bottom - 0.22, "weight of the chunk before", ha="right")


def _spans(ax: Axes, theme: Theme) -> None:
    """The three numbers of the call that draws the second chunk."""
    y = _CHUNK - 0.22
    for first, last, text in (
        (0, EXECUTED, f"executed = {EXECUTED}"),
        (EXECUTED, EXECUTED + FROZEN, f"frozen = {FROZEN}"),
    ):
        arrow = {"arrowstyle": "<->", "color": theme.text, "linewidth": 0.9, "shrinkA": 0}
        ax.annotate("", (last, y), (first, y), arrowprops={**arrow, "shrinkB": 0})
        _note(ax, theme, (first + last) / 2, y - 0.27, text, ha="center")


def _color(theme: Theme, chunk: int) -> str:
    return theme.color(CHUNK_COLORS[chunk])


def _cell(
    ax: Axes,
    theme: Theme,
    left: float,
    top: float,
    face: str | tuple[float, ...],
    hatch: str | None = None,
) -> None:
    ax.add_patch(
        Rectangle(
            (left + 0.06, top),
            0.88,
            _TALL,
            facecolor=face,
            edgecolor=theme.page,
            linewidth=0.0,
            hatch=hatch,
        )
    )


def _name(ax: Axes, theme: Theme, top: float, text: str) -> None:
    ax.annotate(
        text,
        (0, top + _TALL / 2),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=theme.text,
        annotation_clip=False,
    )


def _note(ax: Axes, theme: Theme, x: float, y: float, text: str, *, ha: str) -> None:
    ax.text(x, y, text, ha=ha, va="center", color=theme.text)
