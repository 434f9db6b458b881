"""The files of a run of `fastddim.generate`: one shard a batch, and the SHA-256 of each.

The `.sha256` file of a batch is written last, so a batch is complete if and only if it has one;
`sha256sum -c` reads these files too. No file depends on the process that wrote it: contents, names
and even the time stamps inside `.npz` files are functions of the samples alone.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastddim.choices import Format
from fastddim.files import atomic_file, read_file, sync_folder
from fastddim.runs.archives import (
    Labels,
    Samples,
    decode_list,
    decode_npz,
    decode_safetensors,
    encode_list,
    encode_npz,
    encode_safetensors,
)
from fastddim.runs.differences import Manifest
from fastddim.runs.manifest import FILE
from fastddim.validation import check_choice, check_int

FORMATS = get_args(Format)

_RECORD = ".sha256"
_LIST = ".csv"
_BATCH = re.compile(r"samples-\d{10}-\d{10}\.(sha256|csv|npz|safetensors)")


class Batch(NamedTuple):
    """Samples [first, stop) of a seed, which are drawn and written together.

    Attributes:
        first, stop: numbers of the first sample and of the one after the last.
        size: the number of samples.
        stem: the name of its files without the ending; PNG files have names of their own.
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
    """The division of the samples [start, stop) into batches, and of a batch into files.

    Attributes:
        start, stop: numbers of the first sample and of the one after the last.
        batch_size: samples of each batch except the last.
        format: the format of the files.
        sample_shape: the shape of a sample in them, decoded if the run decodes.
        labelled: whether they hold a label for each sample.
    """

    start: int
    stop: int
    batch_size: int
    format: str
    sample_shape: tuple[int, ...]
    labelled: bool = False

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
                "labels" in manifest,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{FILE}: expected the manifest of a run, got {error!r}") from error

    @property
    def last(self) -> Batch:
        """The last batch, which may be smaller than the others."""
        before = (self.stop - self.start - 1) // self.batch_size * self.batch_size
        return Batch(self.start + before, self.stop)

    def batches(self) -> Iterator[Batch]:
        """All batches in the order of their samples; only the last one may be smaller."""
        for first in range(self.start, self.stop, self.batch_size):
            yield Batch(first, min(first + self.batch_size, self.stop))

    def names(self, batch: Batch) -> list[str]:
        """The names of the files that hold the samples of `batch`, and their labels."""
        if self.format != "png-folder":
            return [f"{batch.stem}.{self.format}"]
        return [*_png_names(batch), *([batch.stem + _LIST] if self.labelled else [])]

    def encode(self, batch: Batch, samples: Tensor, labels: Labels | None = None) -> list[bytes]:
        """The contents of the files for `batch`, in the order of `names`.

        Args:
            samples: `[n, …]` on the CPU.
            labels: int64 `[n]`, where the sharding is labelled.
        """
        if self.format == "safetensors":
            return [encode_safetensors(samples, labels)]
        from fastddim.images import encode_png, to_uint8

        images = to_uint8(samples)
        if self.format == "npz":
            return [encode_npz(images, labels)]
        contents = [encode_png(image) for image in images]
        return contents if labels is None else [*contents, encode_list(_png_names(batch), labels)]

    def decode(self, batch: Batch, contents: Sequence[bytes]) -> Samples:
        """The inverse of `encode`: uint8 `[n, H, W, C]`, or float32 of the samples' shape.

        Raises:
            ValueError: the contents are not those of such a batch.
        """
        if self.format == "png-folder":
            found = self._decode_folder(batch, contents)
        elif self.format == "npz":
            found = decode_npz(contents[0], labelled=self.labelled)
        else:
            found = decode_safetensors(contents[0], labelled=self.labelled)
        shape, dtype = self.sample_shape, "float32"
        if self.format != "safetensors":
            shape, dtype = (*shape[1:], shape[0]), "uint8"
        _check_array(found.samples, dtype, (batch.size, *shape))
        if found.labels is not None:
            _check_array(found.labels, "int64", (batch.size,))
        return found

    def _decode_folder(self, batch: Batch, contents: Sequence[bytes]) -> Samples:
        from fastddim.images import load_png

        channels, height, width = self.sample_shape
        images = [
            load_png(io.BytesIO(content), (channels, height, width))
            for content in contents[: batch.size]
        ]
        labels = decode_list(contents[-1], _png_names(batch)) if self.labelled else None
        return Samples(np.stack(images), labels)

    def leftovers(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are files of another division of the samples.

        A run that grew leaves such files: its last batch was smaller before.
        """
        own = {batch.stem for batch in self.batches()}
        return [name for name in names if _BATCH.fullmatch(name) and name.split(".")[0] not in own]


def _png_names(batch: Batch) -> list[str]:
    return [f"{i:06d}.png" for i in range(*batch)]


def _check_array(array: NDArray[Any], dtype: str, shape: Sequence[int]) -> None:
    if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f"expected {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")


def check_format(format: Any, sample_shape: Sequence[int]) -> str:
    """Return `format` if it is one of FORMATS and can hold samples of that shape."""
    check_choice("format", format, FORMATS)
    if format != "safetensors" and not is_image(sample_shape):
        raise ValueError(
            "format: expected 'safetensors' for samples that are no images (1 or 3 channels, H, "
            f"W), or decode= to make images of them, got {format!r} for shape "
            f"{tuple(sample_shape)}"
        )
    return str(format)


def is_image(sample_shape: Sequence[int]) -> bool:
    """True for the shape (C, H, W) of a grey or RGB image."""
    return len(sample_shape) == 3 and sample_shape[0] in (1, 3)


def check_finite_samples(name: str, samples: Tensor, batch: Batch) -> None:
    """Refuse samples of `batch` that `name`, an argument of `generate`, made NaN or infinite.

    Raises:
        ValueError: a sample is not finite.
    """
    finite = samples.isfinite().flatten(1).all(1)
    if not finite.all():
        index = batch.first + int((~finite).nonzero()[0, 0])
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity in sample {index}")


def write_batch(
    folder: Path, sharding: Sharding, batch: Batch, samples: Tensor, labels: Labels | None = None
) -> None:
    """Write the files of `batch`, the one with their SHA-256 last.

    Raises:
        OSError: a file cannot be written.
    """
    names, contents = sharding.names(batch), sharding.encode(batch, samples, labels)
    for name, content in zip(names, contents, strict=True):
        _write(folder / name, content)
    sync_folder(folder)
    _write(folder / batch.record, _record(names, contents))
    sync_folder(folder)


def read_batch(folder: Path, sharding: Sharding, batch: Batch) -> Samples | None:
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
        return sharding.decode(batch, contents)
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
