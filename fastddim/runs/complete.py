"""Complete runs: one digest of each, and one archive of several."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastddim.files import atomic_file, check_writable, read_file, sync_folder
from fastddim.runs.archives import (
    IMAGES_ARRAY,
    LABELS_ARRAY,
    Labels,
    Samples,
    add_array,
    open_array,
)
from fastddim.runs.differences import Manifest, differences
from fastddim.runs.manifest import FILE, listed, read_manifest
from fastddim.runs.shards import Sharding, is_image, read_batch

# Parts of one set of samples may differ in these, and in the rows of their conditions.
_PER_PART = ("start", "stop", "batch_size", "format")


def digest(folder: str | os.PathLike[str]) -> str:
    """One SHA-256 for all samples of a run, computed once every file has matched its own.

    It is the SHA-256 of the `.sha256` files one after the other, so in the run's folder
    `cat *.sha256 | sha256sum` prints the same.

    Raises:
        ValueError: the run is not complete, or a file is not as it was written.
        OSError: there is no run in `folder`, or it cannot be read.
    """
    path, sharding = _opened(folder)
    for _ in _samples(path, sharding):
        pass
    return recorded_digest(path, sharding)


def recorded_digest(folder: Path, sharding: Sharding) -> str:
    """The digest of a complete run, computed without reading its samples."""
    total = hashlib.sha256()
    for batch in sharding.batches():
        total.update(read_file(folder / batch.record))
    return total.hexdigest()


def merge(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
) -> Path:
    """Write all samples of one or more runs into one `.npz`: `arr_0`, uint8 `[N, H, W, C]`.

    Where the runs have labels, `arr_1` holds them: int64 `[N]`, as in the class-conditional samples
    of guided-diffusion (ADM), whose evaluator reads this file. It expects three channels, so grey
    images are repeated to RGB. The runs must be of one seed, model and plan, and their samples must
    follow one another; different machines or versions only lead to a warning.

    Args:
        folders: one folder of `generate`, or several in any order.
        path: the file, which is written whole or not at all.

    Returns:
        `path`.

    Raises:
        ValueError: a run is not complete, holds no images or does not belong to the others, or
            their samples do not follow one another; the message names it.
        OSError: a file cannot be read or written.
    """
    many = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    if not many:
        raise ValueError("folders: expected at least one folder, got none")
    target = Path(path)
    if target.suffix.lower() != ".npz":
        raise ValueError(f"path: expected a name that ends in .npz, got {str(path)!r}")
    runs = sorted((_opened(folder) for folder in many), key=lambda run: run[1].start)
    _check_parts([folder for folder, _ in runs])
    _check_ranges(runs)
    shape = _images_shape([sharding for _, sharding in runs])
    check_writable(target)
    labels: list[Labels] = []
    with atomic_file(target) as file, zipfile.ZipFile(file, "w") as archive:
        with open_array(archive, IMAGES_ARRAY) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for folder, sharding in runs:
                for batch in _samples(folder, sharding):
                    entry.write(np.ascontiguousarray(_images(batch.samples, shape[3])).data)
                    labels += [] if batch.labels is None else [batch.labels]
        if labels:
            add_array(archive, LABELS_ARRAY, np.concatenate(labels))
    sync_folder(target.resolve().parent)
    return target


def _images(samples: NDArray[Any], channels: int) -> NDArray[Any]:
    """uint8 `[n, H, W, channels]` from the samples that `Sharding.decode` gives."""
    if samples.dtype != np.uint8:
        from fastddim.images import to_uint8

        samples = to_uint8(torch.from_numpy(samples))
    return np.broadcast_to(samples, (*samples.shape[:3], channels))


def _check_parts(folders: Sequence[Path]) -> None:
    """Refuse runs that are not parts of one, and warn of different machines or versions."""
    parts = [_common(read_manifest(folder) or {}) for folder in folders]
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        found = differences(parts[0], part, (f"in {folders[0]}", f"in {folder}"))
        harmless = [it for it in found if it.field.startswith(("computation.", "versions."))]
        if len(harmless) < len(found):
            wrong = [it.line for it in found if it not in harmless]
            raise ValueError(f"folders: expected parts of one run, got\n  {listed(wrong)}")
        if harmless:
            lines = listed([it.line for it in harmless])
            warnings.warn(f"fastddim: the parts were not drawn alike:\n  {lines}", stacklevel=3)


def _common(manifest: Manifest) -> Manifest:
    """The entries in which the parts of one set of samples agree."""
    entries = {name: value for name, value in manifest.items() if name not in _PER_PART}
    if isinstance(entries.get("conditions"), dict):
        entries["conditions"] = sorted(entries["conditions"])
    return entries


def _check_ranges(runs: Sequence[tuple[Path, Sharding]]) -> None:
    for (_, one), (folder, other) in itertools.pairwise(runs):
        if one.stop != other.start:
            raise ValueError(
                f"folders: expected samples from {one.stop} on to follow, "
                f"got [{other.start}, {other.stop}) in {folder}"
            )


def _images_shape(parts: Sequence[Sharding]) -> tuple[int, int, int, int]:
    """[N, H, W, C] of all images of consecutive parts."""
    first, last = parts[0], parts[-1]
    if not is_image(first.sample_shape):
        raise ValueError(
            "folders: expected images (1 or 3 channels, H, W), got samples of shape "
            f"{first.sample_shape}"
        )
    channels, height, width = first.sample_shape
    return last.stop - first.start, height, width, 3 if channels == 1 else channels


def _opened(folder: str | os.PathLike[str]) -> tuple[Path, Sharding]:
    """The folder of a run and how its manifest divides the samples."""
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest is None:
        raise FileNotFoundError(errno.ENOENT, "expected the folder of a run", str(path / FILE))
    return path, Sharding.of(manifest)


def _samples(folder: Path, sharding: Sharding) -> Iterator[Samples]:
    """The samples of a complete run, batch by batch, after comparing each file with its SHA-256."""
    for batch in sharding.batches():
        try:
            samples = read_batch(folder, sharding, batch)
        except ValueError as error:
            raise ValueError(f"{folder}: corrupt; generate it again to mend it: {error}") from error
        if samples is None:
            raise ValueError(
                f"{folder}: expected a complete run, got none of the samples "
                f"[{batch.first}, {batch.stop}); generate it again to go on"
            )
        yield samples
