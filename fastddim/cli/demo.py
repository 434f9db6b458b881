"""`fastddim demo`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastddim._version import __version__
from fastddim.cli.options import shows_progress, working_device
from fastddim.cli.program import Command

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from fastddim.images import Images
    from fastddim.models import UNet

SEED = 0
# Numbers of steps that the bundled models have tuned steps for.
TUNED_FASHION, TUNED_DIGITS = 10, 8
DDIM_STEPS, DDPM_STEPS = 50, 1000
# DDPM takes a hundred times as many model evaluations as tuned steps, so few images are compared.
COMPARED, MORE = 4, 32

# Pixels, and levels of grey. The blocks fill the width of a strip.
_MARGIN, _APART, _PADDING = 20, 22, 2
_BLOCK_COLUMNS, _BLOCK_CELL = 2, 140
_STRIP_COLUMNS, _STRIP_CELL = 16, 56
_TITLE_HEIGHT, _CAPTION_HEIGHT = 40, 34
_TITLE_SIZE, _TIME_SIZE, _LABEL_SIZE = 21, 22, 17
_BLACK, _GREY, _WHITE = 0, 96, 255
_TITLE = "The same latents, drawn in three ways"
_NOTE = "DDPM adds noise at each step, so its images differ"


@dataclass(frozen=True)
class Drawn:
    """Images, the steps that drew them, and the seconds from the latents to the pixels."""

    steps: str
    images: Images
    seconds: float

    @property
    def time(self) -> str:
        """The seconds as the picture and the terminal show them."""
        return f"{self.seconds:.2f} s"


@click.command("demo", cls=Command, epilog="\b\nExample:\n  fastddim demo --out demo")
@click.option("--out", type=click.Path(), default="demo", help="Folder for demo.png.")
def command(out: str) -> None:
    """Draw a picture with the bundled models, and time tuned steps, DDIM and DDPM.

    The fashion model draws the same four latents three times: with 10 tuned steps, with 50 steps
    of DDIM and with 1000 steps of DDPM. The picture shows the three times, and they are printed on
    stderr. Larger batches of fashion items and of digits follow, drawn with tuned steps.
    """
    from fastddim import models
    from fastddim.files import check_writable
    from fastddim.images import save_png

    path = Path(out) / "demo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    device = working_device()
    fashion, digits = (models.load(name, device=device) for name in ("fashion", "digits"))
    blocks = [
        _draw(fashion, TUNED_FASHION, COMPARED, tuned=True),
        _draw(fashion, DDIM_STEPS, COMPARED),
        _draw(fashion, DDPM_STEPS, COMPARED, eta=1.0),
    ]
    strips = {
        "fashion items": _draw(fashion, TUNED_FASHION, MORE, tuned=True),
        "digits": _draw(digits, TUNED_DIGITS, MORE, tuned=True),
    }
    times = [f"{drawn.time} with {drawn.steps}" for drawn in blocks]
    text = {
        "model": "fashion, digits",
        "seed": str(SEED),
        "steps": f"{TUNED_FASHION}, {DDIM_STEPS}, {DDPM_STEPS}, {TUNED_DIGITS}",
        "times": ", ".join(times),
        "version": __version__,
    }
    save_png(path, picture(blocks, strips), text=text)
    click.echo(path)
    click.echo(f"{COMPARED} fashion items took {times[0]}, {times[1]} and {times[2]}", err=True)


def _draw(model: UNet, steps: int, count: int, *, eta: float = 0.0, tuned: bool = False) -> Drawn:
    import fastddim
    from fastddim.images import to_uint8

    # The first run on a batch of a new size sets up more than later ones.
    fastddim.sample(model, 1, batch_size=count, seed=SEED, eta=eta)
    taken = model.tuned[steps] if tuned else steps
    sampler = fastddim.Sampler(model, taken, batch_size=count, eta=eta)
    start = time.perf_counter()
    images = to_uint8(sampler(seed=SEED, progress=shows_progress()))
    seconds = time.perf_counter() - start
    kind = "tuned steps" if tuned else "steps of DDPM" if eta else "steps of DDIM"
    return Drawn(f"{steps} {kind}", images, seconds)


def picture(blocks: Sequence[Drawn], strips: Mapping[str, Drawn]) -> Images:
    """The sheet of all images, uint8 `[H, W, 1]`.

    Args:
        blocks: images of the same latents, shown large and side by side.
        strips: images shown in rows below, by what they are.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    squares = [_grid(drawn.images, _BLOCK_COLUMNS, _BLOCK_CELL) for drawn in blocks]
    rows = [_grid(drawn.images, _STRIP_COLUMNS, _STRIP_CELL) for drawn in strips.values()]
    inner = max(row.width for row in rows)
    height = 2 * _MARGIN + _TITLE_HEIGHT + _CAPTION_HEIGHT + squares[0].height
    height += sum(_APART + _CAPTION_HEIGHT + row.height for row in rows)
    sheet = Image.new("L", (inner + 2 * _MARGIN, height), _WHITE)
    canvas = ImageDraw.Draw(sheet)

    left, right, middle = _MARGIN + _PADDING, _MARGIN + inner - _PADDING, _MARGIN + _TITLE_SIZE // 2
    _write(canvas, (left, middle), _TITLE, _TITLE_SIZE)
    _write(canvas, (right, middle), _NOTE, _LABEL_SIZE, fill=_GREY, anchor="rm")
    top, left = _MARGIN + _TITLE_HEIGHT, _MARGIN
    apart = (inner - sum(square.width for square in squares)) // (len(squares) - 1)
    for drawn, square in zip(blocks, squares, strict=True):
        _place(sheet, square, (left, top), drawn.steps, drawn.time)
        left += square.width + apart
    top += _CAPTION_HEIGHT + squares[0].height
    for (name, drawn), row in zip(strips.items(), rows, strict=True):
        top += _APART
        _place(sheet, row, (_MARGIN, top), f"{len(drawn.images)} {name}, {drawn.steps}", drawn.time)
        top += _CAPTION_HEIGHT + row.height
    return np.array(sheet, dtype=np.uint8)[:, :, None]


def _grid(images: Images, columns: int, cell: int) -> Image.Image:
    from PIL import Image

    from fastddim.images import grid

    enlarged = grid(images, columns, scale=cell // images.shape[1], padding=_PADDING)
    return Image.fromarray(enlarged[:, :, 0])


def _place(
    sheet: Image.Image, images: Image.Image, corner: tuple[int, int], label: str, seconds: str
) -> None:
    """Put images on the sheet, under a line with their label and the time that they took."""
    from PIL import ImageDraw

    left, top = corner
    canvas, middle = ImageDraw.Draw(sheet), top + _CAPTION_HEIGHT // 2
    right = left + images.width - _PADDING
    _write(canvas, (left + _PADDING, middle), label, _LABEL_SIZE)
    _write(canvas, (right, middle), seconds, _TIME_SIZE, anchor="rm")
    sheet.paste(images, (left, top + _CAPTION_HEIGHT))


def _write(
    canvas: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    *,
    fill: int = _BLACK,
    anchor: str = "lm",
) -> None:
    from PIL import ImageFont

    canvas.text(place, text, fill=fill, font=ImageFont.load_default(size), anchor=anchor)
