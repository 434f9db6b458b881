"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing, so that it is always either the old file or the whole new one.

    The content goes to a hidden file beside it, which reaches the disk before it takes the name,
    and which is removed on any error, Ctrl-C included. A link is followed.

    Raises:
        OSError: the folder is missing or cannot be written, or `path` is there and is no ordinary
            file.
    """
    with _part_beside(path) as (part, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, os.path.realpath(path))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now the OSError that `atomic_file(path)` would raise; leaves nothing behind."""
    with _part_beside(path):
        pass


@contextmanager
def _part_beside(path: str | os.PathLike[str]) -> Iterator[tuple[Path, BinaryIO]]:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: expected an ordinary file or a new name, got something else there")
    part = target.with_name(f".fastddim-{secrets.token_hex(8)}.part")
    try:
        file = part.open("xb")
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    try:
        with file:
            yield part, file
    finally:
        part.unlink(missing_ok=True)
