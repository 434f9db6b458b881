"""The style of all pictures: fonts, sizes, and the colours of light and of dark pages.

`save` writes every picture twice, NAME.png for light pages and NAME-dark.png for dark ones. Nothing
here keeps state: figures are made without pyplot, and their style holds for one figure.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ft2font
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastddim.files import atomic_file
from fastddim.images import Images

DPI = 200
WIDTH = 8.2
"""Inches of a wide picture: 1640 pixels, so 8.5 points are 11 pixels where it is shown 800 wide."""
SMALL = 7.5
"""Points of the smallest text, 10 pixels there."""
CHARACTER = 0.068
"""Inches of a character of 8.5 points, more or less."""

BLUE, ORANGE, GREEN, PURPLE, TEXT, FAINT = "blue", "orange", "green", "purple", "text", "faint"
"""The names of the colours that each theme has."""

DRAWN_BY = f"matplotlib {matplotlib.__version__}, FreeType {ft2font.__freetype_version__}"
"""The programs that decide on a picture's pixels; each file says it under `Software`."""

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "mathtext.fontset": "dejavusans",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "ytick.minor.width": 0.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Theme:
    """The colours of a picture on light or on dark pages.

    `suffix` ends the name of its file. The colours stand out from the page, and the colour-blind
    tell them apart.
    """

    suffix: str
    page: str
    text: str
    faint: str
    grid: str
    blue: str
    orange: str
    green: str
    purple: str

    def color(self, name: str) -> str:
        """The colour of a name, such as `BLUE`."""
        if name not in (BLUE, ORANGE, GREEN, PURPLE, TEXT, FAINT):
            raise ValueError(f"name: expected the name of a colour, got {name!r}")
        color: str = getattr(self, name)
        return color

    def tinted(self, name: str, part: float) -> tuple[float, ...]:
        """A colour of which only `part` is left, over the page."""
        pairs = zip(to_rgb(self.color(name)), to_rgb(self.page), strict=True)
        return tuple(part * own + (1 - part) * page for own, page in pairs)


LIGHT = Theme(
    suffix="",
    page="#FFFFFF",
    text="#1A1A1A",
    faint="#555555",
    grid="#E6E6E6",
    blue="#1362C5",
    orange="#D55E00",
    green="#00A77A",
    purple="#AC74A8",
)
# The page is that of MkDocs Material's `slate`; on GitHub's darker one a picture is a raised card.
DARK = Theme(
    suffix="-dark",
    page="#1E2129",
    text="#E6E6E6",
    faint="#8A8D95",
    grid="#343843",
    blue="#3483FF",
    orange="#DE780F",
    green="#34DC80",
    purple="#EFA3F6",
)
THEMES = (LIGHT, DARK)


def save(path: str | os.PathLike[str], draw: Callable[[Theme], Images]) -> None:
    """Write a picture for light pages to `path`, and one for dark pages next to it.

    Args:
        path: of the picture for light pages, NAME.png; the other is NAME-dark.png.
        draw: called with each theme.

    Raises:
        OSError: a file cannot be written.
    """
    for theme in THEMES:
        content = _encoded(draw(theme))
        with atomic_file(themed(path, theme)) as file:
            file.write(content)


def themed(path: str | os.PathLike[str], theme: Theme) -> Path:
    """The path of a picture in a theme."""
    path = Path(path)
    return path.with_stem(path.stem + theme.suffix)


@contextmanager
def figure(width: float, height: float, theme: Theme, **options: Any) -> Iterator[Figure]:
    """A figure of these inches in the style of all; it is drawn inside the context."""
    colors = {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "text.color": theme.text,
        "grid.color": theme.grid,
        "hatch.color": theme.page,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | colors)
        yield Figure((width, height), dpi=DPI, **options)


def pixels(figure: Figure) -> Images:
    """The figure drawn: uint8 `[H, W, 1]` if all of it is grey, else `[H, W, 3]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    colours = np.asarray(canvas.buffer_rgba())[:, :, :3]
    grey = bool((colours == colours[:, :, :1]).all())
    return np.ascontiguousarray(colours[:, :, :1] if grey else colours)


def _encoded(image: Images) -> bytes:
    """The content of a PNG file, of grey levels or with a palette."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text("Software", DRAWN_BY)
    if image.shape[2] == 1:
        drawn = Image.fromarray(image[:, :, 0])
    else:
        places, palette = _paletted(image)
        drawn = Image.fromarray(places)
        drawn.putpalette(palette.tobytes())
    drawn.save(buffer, format="PNG", pnginfo=text, optimize=True)
    return buffer.getvalue()


def _paletted(image: Images) -> tuple[Images, Images]:
    """The 256 most frequent colours `[256, 3]`, and the nearest of them at each pixel `[H, W]`.

    The others are shades at the edges of text and lines, and no eye tells them from their nearest.
    """
    packed = image.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    found, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.int32)
    frequent = colors[np.argsort(-counts, kind="stable")[:256]]
    nearest = np.square(colors[:, None] - frequent).sum(2).argmin(1)
    return nearest.astype(np.uint8)[places.reshape(image.shape[:2])], frequent.astype(np.uint8)
