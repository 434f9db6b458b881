"""The arguments of the model that differ from sample to sample, such as class labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.options import Conditions as Given
from fastddim.runs.archives import Labels
from fastddim.runs.fingerprints import add_tensor
from fastddim.runs.shards import Batch, Sharding

# The names that lead to a value, from the outermost mapping inwards.
Path: TypeAlias = tuple[str, ...]
Rows: TypeAlias = dict[Path, Tensor]

# The usual names of class labels, for a model with several arguments that could be labels.
_LABELS = ("y", "class_labels")


class Conditions:
    """One row for each of the samples [start, stop).

    Attributes:
        label_name: the condition that holds an integer for each sample, which is written with them;
            None where no condition does, or several without a usual name.
        names: the names of the model's arguments.
    """

    def __init__(self, given: Given, start: int, stop: int) -> None:
        """Check the rows of a mapping, and those of the first sample that a function returns.

        Raises:
            TypeError, ValueError: there are no rows, or not one for each sample.
        """
        self._start, self._given = start, given
        self._all = None if callable(given) else _checked(given, Batch(start, stop))
        self._digests: dict[Batch, dict[Path, str]] = {}
        self._paths: set[Path] = set()
        first = self._rows(Batch(start, start + 1))
        self._paths.update(first)
        self._label = _label_path(first)
        self.names = {path[0] for path in first}
        self.label_name = None if self._label is None else _joined(self._label)

    def digests(self, sharding: Sharding) -> dict[str, str]:
        """The SHA-256 of each condition for all samples of `sharding`, computed batch by batch.

        Raises:
            TypeError, ValueError: a function does not return one row for each sample.
        """
        totals = {path: hashlib.sha256() for path in sorted(self._paths)}
        for batch in sharding.batches():
            if batch not in self._digests:
                self._digests[batch] = _digests(self._rows(batch))
            for path, total in totals.items():
                total.update(self._digests[batch][path].encode())
        return {_joined(path): total.hexdigest() for path, total in totals.items()}

    def of(self, batch: Batch, device: torch.device) -> tuple[dict[str, Any], Labels | None]:
        """The arguments of the model for `batch`, and its labels if there are any.

        Raises:
            TypeError, ValueError: a function does not return one row for each sample, or not those
                that were digested.
        """
        rows = self._rows(batch)
        if self._digests.get(batch, None) not in (None, _digests(rows)):
            raise ValueError(
                f"conditions: expected the same rows in each call for [{batch.first}, "
                f"{batch.stop}), got others"
            )
        labels = None if self._label is None else rows[self._label].cpu().numpy()
        return _nested(rows, device), labels

    def _rows(self, batch: Batch) -> Rows:
        if self._all is not None:
            first, stop = batch.first - self._start, batch.stop - self._start
            return {path: rows[first:stop] for path, rows in self._all.items()}
        assert callable(self._given)
        rows = _checked(self._given(batch.first, batch.stop), batch)
        if self._paths and rows.keys() != self._paths:
            raise ValueError(
                f"conditions: expected {_list(self._paths)} in each call, got {_list(set(rows))} "
                f"for [{batch.first}, {batch.stop})"
            )
        return rows


def _checked(values: Any, batch: Batch) -> Rows:
    if not isinstance(values, Mapping) or not values:
        raise TypeError(
            "conditions: expected a mapping of names to tensors with one row for each sample, or "
            f"a function (start, stop) that returns one, got {values!r}"
        )
    rows = dict(_leaves(values))
    for path, value in rows.items():
        if value.ndim == 0 or len(value) != batch.size:
            got = f"{len(value)} rows" if value.ndim else "a single value"
            raise ValueError(
                f"{_shown(path)}: expected one row for each of the {batch.size} samples "
                f"[{batch.first}, {batch.stop}), got {got}"
            )
    return rows


def _leaves(values: Mapping[str, Any], before: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    for name, value in values.items():
        path = (*before, str(name))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, _tensor(path, value)


def _tensor(path: Path, value: Any) -> Tensor:
    """A tensor of the values; integers, one for each sample, become int64, as labels are."""
    if isinstance(value, Tensor):
        rows = value.detach()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"{_shown(path)}: expected a tensor, an array or a list of numbers, got "
                f"{type(value).__name__}"
            )
        if array.ndim == 1 and array.dtype.kind in "iu":
            array = array.astype(np.int64)
        rows = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return rows.long() if _is_labels(rows) else rows


def _is_labels(rows: Tensor) -> bool:
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    return rows.ndim == 1 and whole


def _label_path(rows: Rows) -> Path | None:
    candidates = [path for path, value in rows.items() if _is_labels(value)]
    for name in _LABELS:
        if (name,) in candidates:
            return (name,)
    return candidates[0] if len(candidates) == 1 else None


def _digests(rows: Rows) -> dict[Path, str]:
    result = {}
    for path, value in rows.items():
        digest = hashlib.sha256()
        add_tensor(digest, _joined(path), value)
        result[path] = digest.hexdigest()
    return result


def _nested(rows: Rows, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in rows.items():
        inner = result
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value.to(device)
    return result


def _joined(path: Path) -> str:
    return ".".join(path)


def _shown(path: Path) -> str:
    return "conditions" + "".join(f"[{name!r}]" for name in path)


def _list(paths: set[Path]) -> str:
    return ", ".join(map(_joined, sorted(paths)))
