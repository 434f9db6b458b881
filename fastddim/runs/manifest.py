"""The manifest of a run: a JSON file that lists everything that its bytes depend on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fastddim.files import atomic_file, read_file, sync_folder

Manifest: TypeAlias = dict[str, Any]

FILE = "manifest.json"
VERSION = 1

_MISSING = "nothing"
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


def differences(found: Manifest, wanted: Manifest, names: tuple[str, str]) -> list[str]:
    """One line for every field that differs, such as `plan.eta: 0.0 in the folder, 1.0 here`."""
    there, here = dict(_fields(found)), dict(_fields(wanted))
    return [
        f"{name}: {_shown(there, name)} {names[0]}, {_shown(here, name)} {names[1]}"
        for name in dict.fromkeys([*here, *there])
        if _shown(there, name) != _shown(here, name)
    ]


def refuse_differences(found: Manifest, wanted: Manifest, folder: Path) -> None:
    """Compare the manifest in `folder` with the one of the run asked for.

    Raises:
        ManifestMismatchError: they differ.
    """
    lines = differences(found, wanted, ("in the folder", "here"))
    if lines:
        raise ManifestMismatchError(
            f"{folder}: expected the run that its {FILE} describes, got another:\n  "
            + listed(lines)
        )


def listed(lines: list[str]) -> str:
    """`lines` as they stand in a message; of many only the first ones."""
    more = len(lines) - _LISTED
    shown = lines if more <= 0 else [*lines[:_LISTED], f"and {more} more"]
    return ";\n  ".join(shown)


def _fields(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for name, value in content.items():
            yield from _fields(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(content, list) and content:
        yield f"{prefix}.length", len(content)
        for i, value in enumerate(content):
            yield from _fields(value, f"{prefix}[{i}]")
    else:
        yield prefix, content


def _shown(content: Mapping[str, Any], name: str) -> str:
    return json.dumps(content[name]) if name in content else _MISSING
