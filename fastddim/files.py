"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_PART = ".fastddim-{}.part"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing; it always holds either the old content or the whole new one.

    The content is written to a hidden file in the same folder. That file takes the name `path` once
    it has reached the disk, and is removed on any error, including Ctrl-C. A link is followed.

    Raises:
        OSError: the folder is missing or cannot be written, or `path` exists and is not an ordinary
            file.
    """
    with _part_beside(path) as (part, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, os.path.realpath(path))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OSError that `atomic_file(path)` would raise, and leave nothing behind."""
    with _part_beside(path):
        pass


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk; `atomic_file` waits for contents only."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: str | os.PathLike[str]) -> None:
    """Remove the unfinished files of killed processes; no other process may be writing there."""
    for part in Path(folder).glob(_PART.format("*")):
        part.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of an ordinary file; a link is not followed.

    Raises:
        OSError: there is no such file, or it is a link or not an ordinary file.
    """
    # Without O_NONBLOCK this would wait for the other end of a named pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path}: expected an ordinary file, got something else")
        return file.read()


@contextmanager
def _part_beside(path: str | os.PathLike[str]) -> Iterator[tuple[Path, BinaryIO]]:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: expected an ordinary file or a new name, got something else there")
    part = target.with_name(_PART.format(secrets.token_hex(8)))
    try:
        file = part.open("xb")
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    try:
        with file:
            yield part, file
    finally:
        part.unlink(missing_ok=True)
