"""Images: [−1, 1] tensors to 8-bit arrays and back, grids and PNG files.

Eight-bit images are NumPy arrays `[N, H, W, C]`, as in the `.npz` files of sample-quality
evaluators.
"""

from __future__ import annotations

import io
import math
import os
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastddim.files import atomic_file

Images: TypeAlias = NDArray[np.uint8]

_PIL_MODES = {1: "L", 3: "RGB"}
# Pillow cuts 16-bit and float images off at 255 instead of scaling them, so those are refused.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


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
    scale: int = 1,
    padding: int = 2,
    background: int = 255,
) -> Images:
    """One image of all, filled row by row.

    Args:
        images: uint8 `[N, H, W, C]`, N ≥ 1.
        columns: images per row; by default the grid is about square.
        scale: each pixel becomes `scale × scale` pixels.
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


def save_png(path: str | os.PathLike[str], image: Images) -> None:
    """Write one image, uint8 `[H, W, C]` with C = 1 (grey) or 3 (RGB), through `atomic_file`.

    Raises:
        TypeError, ValueError: `image` is not such an array.
        OSError: `path` cannot be written.
    """
    content = encode_png(image)
    with atomic_file(path) as file:
        file.write(content)


def encode_png(image: Images) -> bytes:
    """The content of the file that `save_png` writes."""
    _check_uint8("image", image, 3, "[H, W, C]")
    if image.shape[2] not in _PIL_MODES:
        raise ValueError(f"image: expected 1 or 3 channels, got {image.shape[2]}")
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def load_png(path: str | os.PathLike[str] | BinaryIO, shape: tuple[int, int, int]) -> Images:
    """Read one image as uint8 `[H, W, C]`.

    Args:
        path: of a file, or an open one.
        shape: the (C, H, W) it must have. Grey and colour are converted into each other, and
            transparency is dropped; the size must fit.

    Raises:
        OSError: `path` cannot be read.
        ValueError: it is not a PNG image of that size with 8 bits a channel, or C is not 1 or 3.
    """
    channels, height, width = shape
    if channels not in _PIL_MODES:
        raise ValueError(f"shape: expected 1 or 3 channels, got {channels}")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != (width, height):
                got = f"{image.size[0]}x{image.size[1]}"
                raise ValueError(f"{path}: expected an image of {width}x{height} pixels, got {got}")
            if image.mode not in _EIGHT_BIT_MODES:
                raise ValueError(f"{path}: expected 8 bits a channel, got mode {image.mode}")
            pixels = np.array(image.convert(_PIL_MODES[channels]), dtype=np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: expected a PNG image, got {error}") from error
    return pixels.reshape(height, width, channels)


def _check_uint8(name: str, images: Any, ndim: int, form: str) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise TypeError(
            f"{name}: expected a uint8 array, got {getattr(images, 'dtype', type(images))}"
        )
    if images.ndim != ndim:
        raise ValueError(f"{name}: expected {form}, got shape {images.shape}")
