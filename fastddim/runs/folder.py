"""The folder of a run, as the ranks find it and share it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from fastddim.files import check_writable, remove_parts, sync_folder
from fastddim.runs import lock
from fastddim.runs.differences import Manifest
from fastddim.runs.lock import FolderLock
from fastddim.runs.manifest import (
    FILE,
    read_manifest,
    refuse_differences,
    write_manifest,
)
from fastddim.runs.shards import Batch, Sharding, read_batch


class RunFolder:
    """The folder of a run, kept from other runs until the end of the `with` block.

    Rank 0 calls `open` and `begin`, and then every rank calls `join`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FolderLock(path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def open(self) -> Manifest | None:
        """Make the folder if needed, lock it for this process alone, and read its manifest.

        Raises:
            ValueError: the manifest is damaged.
            OSError: the folder cannot be written, or another run is using it.
        """
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.resolve().parent)
        self._lock.take_alone()
        remove_parts(self.path)
        # `read_manifest` refuses a link, which `check_writable` would follow.
        found = read_manifest(self.path)
        check_writable(self.path / FILE)
        return found

    def check_empty(self) -> None:
        """Refuse a folder without a manifest that is in use for something else.

        Raises:
            ValueError: the folder holds files.
        """
        others = [name for name in sorted(os.listdir(self.path)) if name != lock.FILE]
        if others:
            raise ValueError(
                f"out: expected a new or empty folder, or one with {FILE}, "
                f"got {len(others)} files in {self.path}, among them {others[0]}"
            )

    def begin(self, found: Manifest | None, earlier: Manifest, manifest: Manifest) -> None:
        """Write the manifest of a new run, or of one that grows, after a comparison with `found`.

        Args:
            found: the manifest in the folder, if there is one.
            earlier: the manifest expected there: `manifest`, with fewer samples if the run grows.

        Raises:
            ManifestMismatchError: the folder holds another run.
        """
        if found is not None:
            refuse_differences(found, earlier, self.path)
        if found != manifest:
            write_manifest(self.path, manifest)

    def remove_leftovers(self, sharding: Sharding) -> None:
        """Remove the last batch of a run that has grown, which is part of a larger one by now."""
        left = sharding.leftovers(os.listdir(self.path))
        # Records go first: a file without its record counts as not written.
        for name in sorted(left, key=lambda name: not name.endswith(".sha256")):
            (self.path / name).unlink(missing_ok=True)

    def join(self, rank: int, manifest: Manifest) -> None:
        """Share the lock with the other ranks.

        Raises:
            OSError: this rank sees another folder than rank 0.
        """
        self._lock.share()
        if rank > 0 and read_manifest(self.path) != manifest:
            raise OSError(f"{self.path}: expected a folder that all ranks share, got another one")

    def holds(self, sharding: Sharding, batch: Batch) -> bool:
        """True if the files of `batch` are complete; damaged ones are reported as a warning."""
        try:
            return read_batch(self.path, sharding, batch) is not None
        except ValueError as error:
            warnings.warn(f"fastddim: corrupt, so drawn again: {error}", stacklevel=2)
            return False
