"""Files that the commands read and write."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastddim.bundled import WEIGHTS
from fastddim.cli.record import Record, Rows
from fastddim.files import atomic_file, check_writable
from fastddim.images import Images, grid, load_png, save_gif, save_png, to_uint8

LATENTS = "latents"


class Sink(Protocol):
    """Takes images in order; all of them are in place after `finish`."""

    def add(self, images: Images) -> None: ...

    def finish(self) -> None: ...


def open_sink(
    out: str, record: Record, *, first: int, columns: int | None, scale: int | None
) -> Sink:
    """The destination for images that `--out` names: a grid (.png), an archive (.npz) or a folder.

    Args:
        record: the record for PNG files.
        first: number of the first image in a folder.
        columns, scale: layout of a grid; a scale of None enlarges small images.

    Raises:
        click.UsageError: the name does not tell which of these it is.
        OSError: the destination cannot be written.
    """
    path = Path(out)
    suffix = path.suffix.lower()
    if out.endswith(("/", os.sep)) or path.is_dir() or not suffix:
        return _Folder(path, record, first)
    if suffix == ".png":
        return _Grid(path, record, columns, scale)
    if suffix == ".npz":
        return _Archive(path)
    raise click.UsageError(
        f"--out: expected a name that ends in .png, .npz or / (a folder), got {out!r}"
    )


class _Grid:
    def __init__(self, path: Path, record: Record, columns: int | None, scale: int | None) -> None:
        check_writable(path)
        self._path, self._text = path, record.text()
        self._columns, self._scale = columns, scale
        self._parts: list[Images] = []

    def add(self, images: Images) -> None:
        self._parts.append(images)

    def finish(self) -> None:
        sheet = grid(np.concatenate(self._parts), self._columns, scale=self._scale)
        save_png(self._path, sheet, text=self._text)


class _Archive:
    """uint8 `arr_0` `[N, H, W, C]`, as evaluators of sample quality read it."""

    def __init__(self, path: Path) -> None:
        check_writable(path)
        self._path = path
        self._parts: list[Images] = []

    def add(self, images: Images) -> None:
        self._parts.append(images)

    def finish(self) -> None:
        with atomic_file(self._path) as file:
            np.savez(file, np.concatenate(self._parts))


class _Folder:
    def __init__(self, path: Path, record: Record, first: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        check_writable(path / "000000.png")
        self._path, self._record, self._first = path, record, first
        self._added = 0

    def add(self, images: Images) -> None:
        start, self._added = self._added, self._added + len(images)
        for i, image in enumerate(images, start):
            text = self._record.text(Rows(start, self._added, i))
            save_png(self._path / f"{self._first + i:06d}.png", image, text=text)

    def finish(self) -> None:
        pass


class Animation:
    """The states of all images, as the frames of a GIF file.

    Raises:
        click.UsageError: the name of the file does not end in .gif.
        OSError: the file cannot be written.
    """

    def __init__(self, out: str, *, columns: int | None, scale: int | None) -> None:
        if not out.lower().endswith(".gif"):
            raise click.UsageError(f"--gif: expected a name that ends in .gif, got {out!r}")
        check_writable(out)
        self._out, self._columns, self._scale = out, columns, scale
        self._parts: list[Images] = []

    def add(self, states: Tensor) -> None:
        """Take the states `[S + 1, b, C, H, W]` of the next images."""
        self._parts.append(np.stack([to_uint8(state) for state in states]))

    def finish(self) -> None:
        frames = np.concatenate(self._parts, axis=1)
        save_gif(self._out, frames, columns=self._columns, scale=self._scale)


class Pictures:
    """The files of a command: its images, and the states up to them if requested.

    Args:
        rows: the part of the drawn images that is kept; None for all.
    """

    def __init__(self, sink: Sink, animation: Animation | None, rows: Rows | None) -> None:
        self._sink, self._animation = sink, animation
        self._kept = slice(None)
        if rows is not None:
            self._kept = slice(rows.image - rows.start, rows.image - rows.start + 1)

    def add(self, drawn: Tensor) -> None:
        """Take a batch of samples `[b, C, H, W]` or, for an animation, all their states."""
        if self._animation is None:
            self._sink.add(to_uint8(drawn[self._kept]))
        else:
            self._sink.add(to_uint8(drawn[-1, self._kept]))
            self._animation.add(drawn[:, self._kept])

    def finish(self) -> None:
        self._sink.finish()
        if self._animation is not None:
            self._animation.finish()


def read_images(names: Sequence[str], sample_shape: tuple[int, int, int]) -> Images:
    """uint8 `[N, H, W, C]` from PNG files, folders of them (by name) and .npz archives, in order.

    Raises:
        click.ClickException: a name is none of these, or there are no images.
        ValueError, OSError: an image does not fit the model, or cannot be read.
    """
    parts = [_read_images(Path(name), sample_shape) for name in names]
    images = np.concatenate(parts)
    if not len(images):
        raise click.ClickException("IMAGES: expected at least one image, got none")
    return images


def _read_images(path: Path, sample_shape: tuple[int, int, int]) -> Images:
    if path.is_dir():
        files = sorted(path.glob("*.png"))
        if not files:
            raise click.ClickException(f"{path}: expected .png files in the folder, got none")
        return np.stack([load_png(file, sample_shape) for file in files])
    if path.suffix.lower() == ".png":
        return load_png(path, sample_shape)[None]
    if path.suffix.lower() != ".npz":
        raise click.ClickException(
            f"{path}: expected a .png file, a folder of them or an .npz file"
        )
    images = _read_array(path, "arr_0")
    channels, height, width = sample_shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        raise click.ClickException(
            f"{path}: expected uint8 images [N, {height}, {width}, {channels}] in arr_0, "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images


def latents_path(option: str, name: str) -> Path:
    """The path of a file of latents, given with `option`.

    Raises:
        click.UsageError: its name does not tell the format.
    """
    path = Path(name)
    if path.suffix.lower() not in (".npz", WEIGHTS):
        raise click.UsageError(
            f"{option}: expected a name that ends in .npz or {WEIGHTS}, got {name!r}"
        )
    return path


def write_latents(path: Path, latents: Tensor) -> None:
    """Write `latents` `[N, C, H, W]` in float64 if they are, else in float32."""
    wide = latents.cpu() if latents.dtype == torch.float64 else latents.cpu().float()
    with atomic_file(path) as file:
        if path.suffix.lower() == WEIGHTS:
            file.write(safetensors.torch.save({LATENTS: wide.contiguous()}))
        else:
            np.savez(file, latents=wide.numpy())


def read_latents(path: Path, sample_shape: tuple[int, int, int]) -> Tensor:
    """Read a file that `write_latents` wrote.

    Raises:
        click.ClickException: the file is corrupt, or holds no latents of that shape.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() == WEIGHTS:
        latents = _read_tensor(path, LATENTS)
    else:
        array = _read_array(path, LATENTS)
        latents = torch.from_numpy(array) if array.dtype.kind == "f" else torch.empty(0)
    if (
        tuple(latents.shape[1:]) != sample_shape
        or not latents.is_floating_point()
        or not len(latents)
    ):
        expected = ", ".join(map(str, ("N", *sample_shape)))
        raise click.ClickException(
            f"{path}: expected floating-point latents [{expected}], got {list(latents.shape)}"
        )
    if not latents.isfinite().all():
        raise click.ClickException(f"{path}: expected finite latents, got NaN or infinity")
    return latents


def _read_array(path: Path, key: str) -> np.ndarray[Any, Any]:
    try:
        # NumPy leaves a file that it opens itself open if the file is not an archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            array: np.ndarray[Any, Any] = archive[key]
            return array
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise click.ClickException(
            f"{path}: expected an .npz archive with {key}, got: {error}"
        ) from error


def _read_tensor(path: Path, key: str) -> Tensor:
    try:
        return safetensors.torch.load_file(path)[key]
    except (SafetensorError, KeyError) as error:
        raise click.ClickException(
            f"{path}: expected a safetensors file with {key}, got: {error}"
        ) from error
