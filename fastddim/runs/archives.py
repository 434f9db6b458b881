"""Samples and their labels in one file: `.npz` archives, `.safetensors` files and lists of labels.

The bytes of a file are a function of its content alone.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Labels: TypeAlias = NDArray[np.int64]

# The tensors of a .safetensors shard.
SAMPLES, LABELS = "samples", "labels"

# The arrays of an .npz archive, named as guided-diffusion's evaluator and its samples have them.
IMAGES_ARRAY, LABELS_ARRAY = "arr_0", "arr_1"

_EPOCH = (1980, 1, 1, 0, 0, 0)


class Samples(NamedTuple):
    """The samples of a file or of a batch.

    Attributes:
        samples: uint8 `[n, H, W, C]`, or float32 `[n, …]`.
        labels: int64 `[n]`; None where the samples have none.
    """

    samples: NDArray[Any]
    labels: Labels | None


def encode_npz(images: NDArray[np.uint8], labels: Labels | None) -> bytes:
    """The content of an `.npz` file with the images, and the labels if there are any."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        add_array(archive, IMAGES_ARRAY, images)
        if labels is not None:
            add_array(archive, LABELS_ARRAY, labels)
    return buffer.getvalue()


def decode_npz(content: bytes, *, labelled: bool) -> Samples:
    """The inverse of `encode_npz`.

    Raises:
        ValueError: the content is not that of such a file.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return Samples(archive[IMAGES_ARRAY], archive[LABELS_ARRAY] if labelled else None)
    except (EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        names = _named(IMAGES_ARRAY, LABELS_ARRAY, labelled)
        raise ValueError(f"expected an .npz archive with {names}, got {error}") from error


def add_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    """Add an array to an `.npz` archive."""
    with open_array(archive, name) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def open_array(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Open an array of an `.npz` archive for writing."""
    entry = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
    # By default they depend on the platform and on how the entry is written.
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return archive.open(entry, "w", force_zip64=True)


def encode_safetensors(samples: Tensor, labels: Labels | None) -> bytes:
    """The content of a `.safetensors` file with the samples in float32, and the labels."""
    from safetensors.torch import save

    tensors = {SAMPLES: samples.float().contiguous()}
    if labels is not None:
        tensors[LABELS] = torch.from_numpy(labels)
    return save(tensors)


def decode_safetensors(content: bytes, *, labelled: bool) -> Samples:
    """The inverse of `encode_safetensors`.

    Raises:
        ValueError: the content is not that of such a file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        labels = tensors[LABELS].numpy() if labelled else None
        return Samples(tensors[SAMPLES].numpy(), labels)
    except (SafetensorError, KeyError, TypeError) as error:
        names = _named(SAMPLES, LABELS, labelled)
        raise ValueError(f"expected a safetensors file with {names}, got {error}") from error


def encode_list(names: Sequence[str], labels: Labels) -> bytes:
    """The lines of a `.csv` file: the name of each image and its label."""
    lines = zip(names, labels.tolist(), strict=True)
    return "".join(f"{name},{label}\n" for name, label in lines).encode()


def decode_list(content: bytes, names: Sequence[str]) -> Labels:
    """The inverse of `encode_list`.

    Raises:
        ValueError: the content is not that of such a file with these names.
    """
    lines = [line.partition(",") for line in content.decode().splitlines()]
    if [name for name, _, _ in lines] != list(names):
        raise ValueError(f"expected one line for each of {names[0]} to {names[-1]}, got others")
    return np.array([int(label) for _, _, label in lines], np.int64)


def _named(samples: str, labels: str, labelled: bool) -> str:
    return f"{samples} and {labels}" if labelled else samples
