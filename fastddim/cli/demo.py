"""`fastddim demo`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastddim._version import __version__
from fastddim.cli.options import shows_progress, working_device
from fastddim.cli.program import Command

if TYPE_CHECKING:
    from fastddim.images import Images
    from fastddim.models import UNet

SEED = 0
DDIM_STEPS, DDPM_STEPS = 50, 1000
DIGITS, FASHION = 64, 32
# DDPM takes 20 times as many model evaluations, so it draws fewer images, and small ones.
COMPARED = 16

_COLUMNS = 16
_CELL = 56
_LABEL_HEIGHT, _LABEL_SIZE = 26, 15


@click.command("demo", cls=Command, epilog="\b\nExample:\n  fastddim demo --out demo")
@click.option("--out", type=click.Path(), default="demo", help="Folder for demo.png.")
def command(out: str) -> None:
    """Draw a picture with DDIM, and time DDIM against DDPM.

    The digits and the fashion model draw with 50 steps of DDIM. Then the digits model draws one
    batch with 50 steps of DDIM and as large a batch with 1000 steps of DDPM, and the two times are
    printed on stderr.
    """
    from fastddim import models
    from fastddim.files import check_writable
    from fastddim.images import save_png

    path = Path(out) / "demo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    device = working_device()
    digits, fashion = (models.load(name, device=device) for name in ("digits", "fashion"))
    panels = {
        f"Digits: DDIM, {DDIM_STEPS} steps": _draw(digits, DDIM_STEPS, DIGITS)[0],
        f"Fashion: DDIM, {DDIM_STEPS} steps": _draw(fashion, DDIM_STEPS, FASHION)[0],
    }
    # The first run on a batch of a new size sets up more than later ones.
    _draw(digits, 1, COMPARED, eta=1.0)
    _, ddim = _draw(digits, DDIM_STEPS, COMPARED)
    slow, ddpm = _draw(digits, DDPM_STEPS, COMPARED, eta=1.0)
    panels[f"Digits: DDPM, {DDPM_STEPS} steps"] = slow
    text = {"model": "digits, fashion", "seed": str(SEED), "version": __version__}
    save_png(path, _sheet(panels), text={**text, "steps": f"{DDIM_STEPS}, {DDPM_STEPS}"})
    click.echo(path)
    click.echo(
        f"{COMPARED} digits took {ddim:.2f} s with {DDIM_STEPS} steps of DDIM "
        f"and {ddpm:.2f} s with {DDPM_STEPS} steps of DDPM: "
        f"DDIM was {ddpm / ddim:.1f} times faster",
        err=True,
    )


def _draw(model: UNet, steps: int, count: int, *, eta: float = 0.0) -> tuple[Images, float]:
    """The images, and the seconds from the latents to the pixels."""
    import fastddim
    from fastddim.images import to_uint8

    sampler = fastddim.Sampler(model, steps, batch_size=count, eta=eta)
    start = time.perf_counter()
    images = to_uint8(sampler(seed=SEED, progress=shows_progress()))
    return images, time.perf_counter() - start


def _sheet(panels: Mapping[str, Images]) -> Images:
    """The panels below each other, each under its label; uint8 `[H, W, 1]`."""
    import numpy as np

    from fastddim.images import grid

    parts = []
    for label, images in panels.items():
        sheet = grid(images, _COLUMNS, scale=_CELL // images.shape[1])
        parts += [_label(label, sheet.shape[1]), sheet]
    return np.concatenate(parts)


def _label(text: str, width: int) -> Images:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (width, _LABEL_HEIGHT), 255)
    font = ImageFont.load_default(_LABEL_SIZE)
    ImageDraw.Draw(image).text((2, _LABEL_HEIGHT // 2), text, fill=0, font=font, anchor="lm")
    return np.array(image, dtype=np.uint8)[:, :, None]
