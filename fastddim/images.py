"""Images: [−1, 1] tensors to 8-bit arrays and back, grids, PNG files and animated GIFs.

Eight-bit images are NumPy arrays `[N, H, W, C]`, as in the `.npz` files of sample-quality
evaluators.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastddim.files import atomic_file

if TYPE_CHECKING:
    # Imported where it is used: `import fastddim` imports this module, but not Pillow.
    from PIL import Image

Images: TypeAlias = NDArray[np.uint8]
"""Eight-bit images `[N, H, W, C]`."""

_PIL_MODES = {1: "L", 3: "RGB"}
# Pillow clips 16-bit and float images at 255 instead of scaling them, so those are refused.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")

# Below this side an image is too small to look at.
_VISIBLE = 64


def to_uint8(x: Tensor) -> Images:
    """Images in [−1, 1] as 8-bit numbers, each rounded to the nearest; values outside are clamped.

    Args:
        x: floating point `[N, C, H, W]`, on any device.

    Returns:
        uint8 array `[N, H, W, C]`.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: `x` does not have four dimensions, or holds a NaN.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if x.ndim != 4:
        raise ValueError(f"x: expected images [N, C, H, W], got shape {tuple(x.shape)}")
    wide = x.detach().to("cpu", torch.float64)
    if wide.isnan().any():
        image = int(wide.isnan().nonzero()[0, 0])
        raise ValueError(f"x: expected no NaN, got one in image {image}")
    levels = ((wide.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


def from_uint8(images: Images) -> Tensor:
    """The inverse of `to_uint8`: float32 `[N, C, H, W]` in [−1, 1] from uint8 `[N, H, W, C]`.

    Raises:
        TypeError: `images` is not a uint8 array.
        ValueError: it does not have four dimensions.
    """
    _check_uint8("images", images, 4, "[N, H, W, C]")
    levels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return (levels.double() / 127.5 - 1).float()


def grid(
    images: Images,
    columns: int | None = None,
    *,
    scale: int | None = 1,
    padding: int = 2,
    background: int = 255,
) -> Images:
    """Arrange images as one, row by row.

    Args:
        images: uint8 `[N, H, W, C]`, N ≥ 1.
        columns: images per row; by default the grid is about square.
        scale: each pixel becomes `scale × scale` pixels; None enlarges images of less than 64
            pixels to at least that many.
        padding: pixels between the images and around them.
        background: level of the padding and of empty cells.

    Returns:
        uint8 array `[H', W', C]`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or range.
    """
    _check_uint8("images", images, 4, "[N, H, W, C]")
    count, height, width, channels = images.shape
    if count == 0:
        raise ValueError("images: expected at least one, got none")
    scale = max(1, math.ceil(_VISIBLE / max(height, width, 1))) if scale is None else scale
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    for name, value, low in (("columns", columns, 1), ("scale", scale, 1), ("padding", padding, 0)):
        if value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value}")
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = math.ceil(count / columns)
    cell_height, cell_width = height * scale + padding, width * scale + padding
    shape = (rows * cell_height + padding, columns * cell_width + padding, channels)
    sheet = np.full(shape, background, dtype=np.uint8)
    for i, image in enumerate(enlarged):
        top = i // columns * cell_height + padding
        left = i % columns * cell_width + padding
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def save_png(
    path: str | os.PathLike[str],
    x: Tensor | Images,
    *,
    columns: int | None = None,
    scale: int | None = None,
    text: Mapping[str, str] | None = None,
) -> None:
    """Write an image, or a grid of several, as a PNG file, whole or not at all.

    Args:
        path: the file's.
        x: floating point in [−1, 1] on any device, values outside clamped: `[C, H, W]` is one
            image, written as it is; `[B, C, H, W]` is the `grid` that `fastddim sample` draws. Or
            8-bit levels, a uint8 array `[H, W, C]` or `[B, H, W, C]`. C is 1 (grey) or 3 (RGB).
        columns: images per row of a grid; by default it is about square.
        scale: each pixel of a grid becomes `scale × scale` pixels; by default images of less than
            64 pixels are enlarged to at least that many.
        text: written into the file under these names; `read_text` reads it.

    Raises:
        TypeError: `x` is neither a floating-point tensor nor a uint8 array.
        ValueError: it is of another shape, or holds a NaN; or an argument is out of range.
        OSError: `path` cannot be written.
    """
    forms, last = ("[C, H, W]", "[B, C, H, W]"), ("[H, W, C]", "[B, H, W, C]")
    levels = _levels("x", x, forms, last)
    image = grid(levels, columns, scale=scale) if levels.ndim == 4 else levels
    content = encode_png(image, text)
    with atomic_file(path) as file:
        file.write(content)


def encode_png(image: Images, text: Mapping[str, str] | None = None) -> bytes:
    """The content of a PNG file: one image, uint8 `[H, W, C]`, and `text` under its names."""
    from PIL.PngImagePlugin import PngInfo

    _check_uint8("image", image, 3, "[H, W, C]")
    _check_channels("image", image)
    held = PngInfo()
    for name, value in (text or {}).items():
        held.add_text(name, value)
    buffer = io.BytesIO()
    _pillow(image).save(buffer, format="PNG", pnginfo=held)
    return buffer.getvalue()


def read_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text in a PNG file, by name.

    Raises:
        OSError: `path` cannot be read.
        ValueError: it is not a PNG image.
    """
    with _opened(path) as image:
        image.load()  # text may also follow the pixels
        found = {str(name): value for name, value in image.info.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def save_gif(
    path: str | os.PathLike[str],
    trajectory: Tensor | Images,
    *,
    columns: int | None = None,
    scale: int | None = None,
    frame_ms: int = 80,
    last_ms: int = 2000,
) -> None:
    """Write the states of a run as an animated GIF that repeats, whole or not at all.

    Grey images keep every level. Each frame of an RGB image has the 256 colours that suit it best,
    without dithering, which would flicker.

    Args:
        path: the file's.
        trajectory: `[F, B, C, H, W]` for F frames of a grid, as
            `sample(..., return_trajectory=True)` returns it, or `[F, C, H, W]` for one image;
            floating point, on any device. States are clamped to [−1, 1], which cuts off the
            extremes of the noise of early steps. Or 8-bit levels, a uint8 array `[F, B, H, W, C]`
            or `[F, H, W, C]`. C is 1 (grey) or 3 (RGB).
        columns: images per row of a grid; by default it is about square.
        scale: each pixel becomes `scale × scale` pixels; by default images of less than 64 pixels
            are enlarged to at least that many.
        frame_ms: milliseconds that a frame is shown for, a multiple of 10 in [20, 60000].
        last_ms: the same for the last frame, the sample.

    Raises:
        TypeError: `trajectory` is neither a floating-point tensor nor a uint8 array.
        ValueError: it is of another shape, or holds a NaN; or an argument is out of range.
        OSError: `path` cannot be written.
    """
    for name, value in (("frame_ms", frame_ms), ("last_ms", last_ms)):
        if value not in range(20, 60001, 10):
            raise ValueError(f"{name}: expected a multiple of 10 in [20, 60000], got {value!r}")
    forms, last = ("[F, C, H, W]", "[F, B, C, H, W]"), ("[F, H, W, C]", "[F, B, H, W, C]")
    levels = _levels("trajectory", trajectory, forms, last)
    if not len(levels):
        raise ValueError("trajectory: expected at least one frame, got none")
    if levels.ndim == 4:
        sheets = [grid(frame[None], scale=scale, padding=0) for frame in levels]
    else:
        sheets = [grid(frame, columns, scale=scale) for frame in levels]
    frames = [_paletted(_pillow(sheet)) for sheet in sheets]
    durations = [frame_ms] * (len(frames) - 1) + [last_ms]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=False,
    )
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def load_png(path: str | os.PathLike[str] | BinaryIO, shape: tuple[int, int, int]) -> Images:
    """Read one image as uint8 `[H, W, C]`.

    Args:
        path: the file's, or an open file.
        shape: the (C, H, W) that it must have. Grey and colour are converted into each other, and
            transparency is dropped; the size must fit.

    Raises:
        OSError: `path` cannot be read.
        ValueError: it is not a PNG image of that size with 8 bits a channel, or C is not 1 or 3.
    """
    channels, height, width = shape
    if channels not in _PIL_MODES:
        raise ValueError(f"shape: expected 1 or 3 channels, got {channels}")
    with _opened(path) as image:
        if image.size != (width, height):
            got = f"{image.size[0]}x{image.size[1]}"
            raise ValueError(f"{path}: expected an image of {width}x{height} pixels, got {got}")
        if image.mode not in _EIGHT_BIT_MODES:
            raise ValueError(f"{path}: expected 8 bits a channel, got mode {image.mode}")
        pixels = np.array(image.convert(_PIL_MODES[channels]), dtype=np.uint8)
    return pixels.reshape(height, width, channels)


@contextmanager
def _opened(path: str | os.PathLike[str] | BinaryIO) -> Iterator[Image.Image]:
    """Open a PNG file; any fault in its content is a ValueError that names the file."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: expected a PNG image, got {error}") from error


def _levels(name: str, x: Any, forms: tuple[str, str], last: tuple[str, str]) -> Images:
    """8-bit levels with the channels last.

    Args:
        forms: the shapes that a tensor in [−1, 1] may have.
        last: the shapes of an array that already holds levels.
    """
    if isinstance(x, Tensor) and x.is_floating_point():
        _check_form(name, x, forms)
        flat = to_uint8(x.reshape(-1, *x.shape[-3:]))
        levels: Images = flat.reshape(*x.shape[:-3], *flat.shape[1:])
    elif isinstance(x, np.ndarray) and x.dtype == np.uint8:
        _check_form(name, x, last)
        levels = x
    else:
        raise TypeError(
            f"{name}: expected a floating-point tensor {' or '.join(forms)} in [-1, 1], or a uint8 "
            f"array {' or '.join(last)}, got {getattr(x, 'dtype', type(x))}"
        )
    _check_channels(name, levels)
    return levels


def _check_form(name: str, x: Any, forms: tuple[str, str]) -> None:
    if x.ndim not in [form.count(",") + 1 for form in forms]:
        raise ValueError(f"{name}: expected {' or '.join(forms)}, got shape {tuple(x.shape)}")


def _check_channels(name: str, images: Images) -> None:
    channels = images.shape[-1]
    if channels not in _PIL_MODES:
        raise ValueError(f"{name}: expected 1 (grey) or 3 (RGB) channels, got {channels}")


def _pillow(image: Images) -> Image.Image:
    from PIL import Image

    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    return Image.fromarray(np.ascontiguousarray(pixels))


def _paletted(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "L":
        return image
    return image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def _check_uint8(name: str, images: Any, ndim: int, form: str) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise TypeError(
            f"{name}: expected a uint8 array, got {getattr(images, 'dtype', type(images))}"
        )
    if images.ndim != ndim:
        raise ValueError(f"{name}: expected {form}, got shape {images.shape}")
