"""The files of a run of `fastddim.generate`: one shard a batch, and the SHA-256 of each.

The `.sha256` file of a batch is written last, so a batch is complete if and only if it has one;
`sha256sum -c` reads these files too. No file depends on the process that wrote it: contents, names
and even the time stamps inside `.npz` files are functions of the samples alone.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastddim.choices import Format
from fastddim.files import atomic_file, read_file, sync_folder
from fastddim.runs.manifest import FILE, Manifest
from fastddim.validation import check_choice, check_int

FORMATS = get_args(Format)

# The key of the only tensor in a .safetensors shard.
KEY = "samples"

_RECORD = ".sha256"
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Batch(NamedTuple):
    """Samples [first, stop) of a seed, which are drawn and written together.

    Attributes:
        first, stop: numbers of the first sample and of the one after the last.
        size: how many samples there are.
        stem: the name of its file without the ending; PNG files have names of their own.
        record: the name of the file with their SHA-256.
    """

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
class Sharding:
    """The division of the samples [start, stop) into batches, and of a batch into files."""

    start: int
    stop: int
    batch_size: int
    format: str
    sample_shape: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Sharding:
        """The sharding that a manifest describes.

        Raises:
            ValueError: the manifest describes none.
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
        """All batches in the order of their samples; only the last one may be smaller."""
        for first in range(self.start, self.stop, self.batch_size):
            yield Batch(first, min(first + self.batch_size, self.stop))

    def names(self, batch: Batch) -> list[str]:
        """The names of the files that hold the samples of `batch`."""
        if self.format == "png-folder":
            return [f"{i:06d}.png" for i in range(*batch)]
        return [f"{batch.stem}.{self.format}"]

    def encode(self, samples: Tensor) -> list[bytes]:
        """The contents of the files for `samples` `[n, …]` on the CPU, in the order of `names`."""
        if self.format == "safetensors":
            from safetensors.torch import save

            return [save({KEY: samples.float().contiguous()})]
        from fastddim.images import encode_png, to_uint8

        images = to_uint8(samples)
        if self.format == "png-folder":
            return [encode_png(image) for image in images]
        buffer = io.BytesIO()
        with array_in_npz(buffer) as entry:
            np.lib.format.write_array(entry, images, allow_pickle=False)
        return [buffer.getvalue()]

    def decode(self, contents: Sequence[bytes], count: int) -> NDArray[Any]:
        """The inverse of `encode`: uint8 `[count, H, W, C]`, or float32 of the samples' shape.

        Raises:
            ValueError: the contents are not those of such a batch.
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
    """Return `format` if it is one of FORMATS and can hold samples of that shape."""
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


def write_batch(folder: Path, sharding: Sharding, batch: Batch, samples: Tensor) -> None:
    """Write the files of `batch`, the one with their SHA-256 last.

    Raises:
        ValueError: a sample is not finite.
        OSError: a file cannot be written.
    """
    finite = samples.isfinite().flatten(1).all(1)
    if not finite.all():
        index = batch.first + int((~finite).nonzero()[0, 0])
        raise ValueError(f"model: expected finite samples, got NaN or infinity in sample {index}")
    names, contents = sharding.names(batch), sharding.encode(samples)
    for name, content in zip(names, contents, strict=True):
        _write(folder / name, content)
    sync_folder(folder)
    _write(folder / batch.record, _record(names, contents))
    sync_folder(folder)


def read_batch(folder: Path, sharding: Sharding, batch: Batch) -> NDArray[Any] | None:
    """The samples of `batch` as `Sharding.decode` gives them, or None if it was not written.

    Raises:
        ValueError: a file is missing or is not as it was written.
    """
    try:
        record = read_file(folder / batch.record)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{batch.record}: {error.strerror or error}") from error
    names = sharding.names(batch)
    try:
        contents = [read_file(folder / name) for name in names]
    except OSError as error:
        raise ValueError(f"{batch.stem}: {error.strerror or error}") from error
    if _record(names, contents) != record:
        raise ValueError(f"{batch.stem}: its SHA-256 is not the one in {batch.record}")
    try:
        return sharding.decode(contents, batch.size)
    except ValueError as error:
        raise ValueError(f"{batch.stem}: {error}") from error


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
def array_in_npz(file: BinaryIO) -> Iterator[IO[bytes]]:
    """Open `arr_0`, the only array of the `.npz` archive that is written into `file`."""
    entry = zipfile.ZipInfo("arr_0.npy", _EPOCH)
    # By default they depend on the platform and on how the entry is written.
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open(entry, "w", force_zip64=True) as array,
    ):
        yield array
