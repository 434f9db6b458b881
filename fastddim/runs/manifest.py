"""The manifest of a run: a JSON file that lists everything that its bytes depend on."""

from __future__ import annotations

import json
from pathlib import Path

from fastddim.files import atomic_file, read_file, sync_folder
from fastddim.runs.differences import Difference, Manifest, differences

FILE = "manifest.json"
VERSION = 1

_LISTED = 12


class ManifestMismatchError(ValueError):
    """The folder holds a different run from the one asked for."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into `folder` and wait until it is on the disk."""
    with atomic_file(folder / FILE) as file:
        file.write((json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None if it has none.

    Raises:
        ValueError: the file is not the manifest of a run, or has an unknown version.
        OSError: the file cannot be read, or is a link.
    """
    path = folder / FILE
    try:
        content = json.loads(read_file(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the manifest of a run, got {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{path}: expected the manifest of a run, version {VERSION}, got {version!r}"
        )
    manifest: Manifest = content
    return manifest


def refuse_differences(found: Manifest, wanted: Manifest, folder: Path) -> None:
    """Compare the manifest in `folder` with the one of the run asked for.

    Raises:
        ManifestMismatchError: they differ.
    """
    lines = [_advised(it) for it in differences(found, wanted, ("in the folder", "here"))]
    if lines:
        raise ManifestMismatchError(
            f"{folder}: expected the run that its {FILE} describes, got another:\n  "
            + listed(lines)
        )


def _advised(difference: Difference) -> str:
    """The line about a difference, with the way around it where there is one."""
    field, there, here, line = difference
    if field == "stop" and isinstance(there, int) and isinstance(here, int):
        return f"{line} (a run can be continued to more samples, not to fewer)"
    if field == "computation.threads" and isinstance(there, int) and isinstance(here, int):
        return (
            f"{line} (the number of threads changes the last bits of results, and torchrun gives "
            f"each process one; set {there}, with torch.set_num_threads({there}) or "
            f"--threads {there})"
        )
    return line


def listed(lines: list[str]) -> str:
    """`lines` as a message shows them; of many, only the first ones."""
    more = len(lines) - _LISTED
    shown = lines if more <= 0 else [*lines[:_LISTED], f"and {more} more"]
    return ";\n  ".join(shown)
