"""The files of a run of `fastddim.generate`: one shard a batch, each with its SHA-256 beside it.

A batch is there once its `.sha256` file is, which comes last; `sha256sum -c` reads it too. The
digest of a run is the SHA-256 of these files one after the other, so that in the run's folder

    cat *.sha256 | sha256sum

computes it. Nothing depends on who wrote which batch: content, names and even the time stamps
inside of `.npz` files are functions of the samples alone.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastddim.files import atomic_file, check_writable, read_file, sync_folder
from fastddim.manifest import FILE, Manifest, differences, listed, read_manifest
from fastddim.validation import check_choice, check_int

FORMATS = ("npz", "safetensors", "png-folder")

# The key of the only tensor in a .safetensors shard.
KEY = "samples"

_RECORD = ".sha256"
# Two parts of one set of samples may differ in these.
_PER_PART = ("start", "stop", "batch_size", "format")
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Batch(NamedTuple):
    """Samples [first, stop) of a seed, which are drawn and written together."""

    first: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.first

    @property
    def stem(self) -> str:
        return f"samples-{self.first:010d}-{self.stop:010d}"

    @property
    def record(self) -> str:
        return self.stem + _RECORD


@dataclass(frozen=True)
class Layout:
    """How the samples [start, stop) are cut into batches, and these turned into files."""

    start: int
    stop: int
    batch_size: int
    format: str
    sample_shape: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """The layout that a manifest tells.

        Raises:
            ValueError: the manifest tells none.
        """
        try:
            stop = check_int("stop", manifest["stop"], 1, 2**32)
            shape = manifest["sample_shape"]
            return cls(
                check_int("start", manifest["start"], 0, stop - 1),
                stop,
                check_int("batch_size", manifest["batch_size"], 1, 2**32),
                check_choice("format", manifest["format"], FORMATS),
                tuple(check_int("sample_shape", n, 1, 2**32) for n in shape),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{FILE}: expected the manifest of a run, got {error!r}") from error

    def batches(self) -> Iterator[Batch]:
        for first in range(self.start, self.stop, self.batch_size):
            yield Batch(first, min(first + self.batch_size, self.stop))

    def names(self, batch: Batch) -> list[str]:
        if self.format == "png-folder":
            return [f"{i:06d}.png" for i in range(*batch)]
        return [f"{batch.stem}.{self.format}"]

    def encode(self, samples: Tensor) -> list[bytes]:
        """The content of the files of `samples` `[n, …]` on the CPU, in the order of `names`."""
        if self.format == "safetensors":
            from safetensors.torch import save

            return [save({KEY: samples.float().contiguous()})]
        from fastddim.images import encode_png, to_uint8

        images = to_uint8(samples)
        if self.format == "png-folder":
            return [encode_png(image) for image in images]
        buffer = io.BytesIO()
        with _array_in_archive(buffer) as entry:
            np.lib.format.write_array(entry, images, allow_pickle=False)
        return [buffer.getvalue()]

    def decode(self, contents: Sequence[bytes], count: int) -> NDArray[Any]:
        """The inverse of `encode`: uint8 `[count, H, W, C]`, or float32 of the samples' shape.

        Raises:
            ValueError: the content is something else.
        """
        if self.format == "png-folder":
            return np.stack([self._decode_png(content) for content in contents])
        shape = (count, *self.sample_shape)
        if self.format == "npz":
            shape = (count, *self.sample_shape[1:], self.sample_shape[0])
        array = self._decode_archive(contents[0])
        wanted = np.float32 if self.format == "safetensors" else np.uint8
        if array.dtype != wanted or array.shape != shape:
            raise ValueError(
                f"expected {np.dtype(wanted)} {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
        return array

    def _decode_png(self, content: bytes) -> NDArray[Any]:
        from fastddim.images import load_png

        channels, height, width = self.sample_shape
        return load_png(io.BytesIO(content), (channels, height, width))

    def _decode_archive(self, content: bytes) -> NDArray[Any]:
        if self.format == "safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load

            try:
                return load(content)[KEY].numpy()
            except (SafetensorError, KeyError, TypeError) as error:
                raise ValueError(f"expected a safetensors file with {KEY}, got {error}") from error
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                array: NDArray[Any] = archive["arr_0"]
                return array
        except (EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"expected an .npz archive with arr_0, got {error}") from error


def check_format(format: Any, sample_shape: Sequence[int]) -> str:
    """One of FORMATS that holds samples of that shape."""
    check_choice("format", format, FORMATS)
    if format != "safetensors" and len(sample_shape) != 3:
        raise ValueError(
            "format: expected 'safetensors' for samples that are no images (C, H, W), "
            f"got {format!r} for shape {tuple(sample_shape)}"
        )
    if format == "png-folder" and sample_shape[0] not in (1, 3):
        raise ValueError(
            "format: expected 'npz' or 'safetensors' for images that are neither grey nor RGB, "
            f"got {format!r} for {sample_shape[0]} channels"
        )
    return str(format)


def write_batch(folder: Path, layout: Layout, batch: Batch, samples: Tensor) -> None:
    """Put the samples of `batch` in place; if that fails, the batch is not there.

    Raises:
        ValueError: a sample is not finite.
        OSError: a file cannot be written.
    """
    finite = samples.isfinite().flatten(1).all(1)
    if not finite.all():
        index = batch.first + int((~finite).nonzero()[0, 0])
        raise ValueError(f"model: expected finite samples, got NaN or infinity in sample {index}")
    names, contents = layout.names(batch), layout.encode(samples)
    for name, content in zip(names, contents, strict=True):
        _write(folder / name, content)
    sync_folder(folder)
    _write(folder / batch.record, _record(names, contents))
    sync_folder(folder)


def read_batch(folder: Path, layout: Layout, batch: Batch) -> NDArray[Any] | None:
    """The samples of `batch` as `Layout.decode` gives them, or None where it is not there.

    Raises:
        ValueError: it is there, but not as it was written.
    """
    try:
        record = read_file(folder / batch.record)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{batch.record}: {error.strerror or error}") from error
    names = layout.names(batch)
    try:
        contents = [read_file(folder / name) for name in names]
    except OSError as error:
        raise ValueError(f"{batch.stem}: {error.strerror or error}") from error
    if _record(names, contents) != record:
        raise ValueError(f"{batch.stem}: its SHA-256 is not the one in {batch.record}")
    try:
        return layout.decode(contents, batch.size)
    except ValueError as error:
        raise ValueError(f"{batch.stem}: {error}") from error


def digest(folder: str | os.PathLike[str]) -> str:
    """One SHA-256 for all samples of a run, after each file has been compared with its own.

    Raises:
        ValueError: the run is not complete, or a file is not as it was written.
        OSError: there is no run in `folder`, or it cannot be read.
    """
    path, layout = _opened(folder)
    for _ in _whole(path, layout):
        pass
    return recorded_digest(path, layout)


def recorded_digest(folder: Path, layout: Layout) -> str:
    """The digest of a complete run, by the recorded digests alone."""
    total = hashlib.sha256()
    for batch in layout.batches():
        total.update(read_file(folder / batch.record))
    return total.hexdigest()


def merge(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
) -> Path:
    """Write all samples of one or more runs into one `.npz`: `arr_0`, uint8 `[N, H, W, C]`.

    This is the file that the evaluator of guided-diffusion (ADM) takes. That wants three channels,
    so grey images are repeated to RGB. The runs are those of one seed, model and plan, and their
    samples follow one another; runs of other machines or versions are taken, with a warning.

    Args:
        folders: one folder of `generate`, or several in any order.
        path: the file to write, whole or not at all.

    Raises:
        ValueError: a run is not complete, has no images or does not belong to the others, or their
            ranges do not join; the message names it.
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
    for (_, one), (folder, other) in itertools.pairwise(runs):
        if one.stop != other.start:
            raise ValueError(
                f"folders: expected samples from {one.stop} on to follow, "
                f"got [{other.start}, {other.stop}) in {folder}"
            )
    first, last = runs[0][1], runs[-1][1]
    if len(first.sample_shape) != 3:
        raise ValueError(f"folders: expected images, got samples of shape {first.sample_shape}")
    channels, height, width = first.sample_shape
    shape = (last.stop - first.start, height, width, 3 if channels == 1 else channels)
    check_writable(target)
    with atomic_file(target) as file, _array_in_archive(file) as entry:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(entry, header)
        for folder, layout in runs:
            for samples in _whole(folder, layout):
                entry.write(np.ascontiguousarray(_images(samples, shape[3])).data)
    sync_folder(target.resolve().parent)
    return target


def _images(samples: NDArray[Any], channels: int) -> NDArray[Any]:
    """uint8 `[n, H, W, channels]` of what `Layout.decode` gives."""
    if samples.dtype != np.uint8:
        from fastddim.images import to_uint8

        samples = to_uint8(torch.from_numpy(samples))
    return np.broadcast_to(samples, (*samples.shape[:3], channels))


def _check_parts(folders: Sequence[Path]) -> None:
    parts = []
    for folder in folders:
        manifest = read_manifest(folder) or {}
        parts.append({name: v for name, v in manifest.items() if name not in _PER_PART})
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        lines = differences(parts[0], part, (f"in {folders[0]}", f"in {folder}"))
        harmless = [line for line in lines if line.startswith(("computation.", "versions."))]
        if len(harmless) < len(lines):
            wrong = [line for line in lines if line not in harmless]
            raise ValueError(f"folders: expected parts of one run, got\n  {listed(wrong)}")
        if harmless:
            warnings.warn(
                f"fastddim: the parts were not drawn alike:\n  {listed(harmless)}", stacklevel=3
            )


def _opened(folder: str | os.PathLike[str]) -> tuple[Path, Layout]:
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest is None:
        raise FileNotFoundError(errno.ENOENT, "expected the folder of a run", str(path / FILE))
    return path, Layout.of(manifest)


def _whole(folder: Path, layout: Layout) -> Iterator[NDArray[Any]]:
    for batch in layout.batches():
        try:
            samples = read_batch(folder, layout, batch)
        except ValueError as error:
            raise ValueError(f"{folder}: corrupt; generate it again to mend it: {error}") from error
        if samples is None:
            raise ValueError(
                f"{folder}: expected a complete run, got none of the samples "
                f"[{batch.first}, {batch.stop}); generate it again to go on"
            )
        yield samples


def _write(path: Path, content: bytes) -> None:
    # `atomic_file` would follow a link out of the folder.
    if path.is_symlink():
        path.unlink()
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _record(names: Sequence[str], contents: Sequence[bytes]) -> bytes:
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    return "".join(f"{d}  {name}\n" for d, name in zip(digests, names, strict=True)).encode()


@contextmanager
def _array_in_archive(file: BinaryIO) -> Iterator[IO[bytes]]:
    """Where to write the only array, `arr_0`, of the `.npz` archive that `file` becomes."""
    entry = zipfile.ZipInfo("arr_0.npy", _EPOCH)
    # The first is the platform's by default, and the second depends on how the entry is written.
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open(entry, "w", force_zip64=True) as array,
    ):
        yield array
