"""A lock on the folder of a run."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from pathlib import Path

FILE = ".fastddim-lock"

# A killed process still holds its lock until the kernel has cleared it away.
_PATIENCE = 10.0


class FolderLock:
    """Keeps two runs out of one folder; the ranks of one run share it.

    The lock ends with the process that holds it, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._descriptor: int | None = None

    def take_alone(self) -> None:
        """Take the lock for this process alone.

        Raises:
            BlockingIOError: another run holds it, and still does after some seconds.
        """
        self._take(fcntl.LOCK_EX)

    def share(self) -> None:
        """Take the lock together with other ranks; raises as `take_alone` does."""
        self._take(fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the lock back, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _take(self, kind: int) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                lock_at_once(self._descriptor, kind, self._path, "run uses the folder")
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        error.errno, "another run is using this folder", str(self._path.parent)
                    ) from error
                time.sleep(0.05)


def lock_at_once(descriptor: int, kind: int, path: str | Path, others: str) -> None:
    """Lock an open file, or warn where its file system has no locks.

    Args:
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
        path: the file's, for the warning.
        others: the end of the warning, such as "run uses the folder": no other process may do so.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(
            f"fastddim: {path}: this file system has no locks ({error.strerror}); make sure that "
            f"no other {others}",
            stacklevel=3,
        )
