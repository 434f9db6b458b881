"""The tuned steps of a model, in `<stem>-tuned.json` next to its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from fastddim.tuned import TunedSteps, read_json, write_json

_ENDING = "-tuned.json"
_FIELD = "steps"


def tuned_path(weights: Path) -> Path:
    """The path of the tuned steps that belong to a file of weights; the file may be missing."""
    return weights.with_name(weights.stem + _ENDING)


def write_tuned(path: str | os.PathLike[str], tuned: Mapping[int, TunedSteps]) -> None:
    """Write tuned steps into one file, each under its number of steps, whole or not at all.

    Args:
        path: path of the file, as from `tuned_path`.
        tuned: tuned steps by number of steps.

    Raises:
        ValueError: a key is not the number of its steps, or a record holds a value that JSON
            cannot.
        OSError: the file cannot be written.
    """
    for S, steps in tuned.items():
        if steps.steps != S:
            raise ValueError(f"tuned[{S}]: expected {S} steps, got {steps!r}")
    write_json(path, {_FIELD: [tuned[S].as_dict() for S in sorted(tuned)]})


def read_tuned(path: str | os.PathLike[str]) -> dict[int, TunedSteps]:
    """The tuned steps in a file, by number of steps.

    Raises:
        ValueError: the file is not such a file, or of an unknown version; the message names the
            field.
        OSError: the file cannot be read.
    """
    content = read_json(path)
    listed = content.get(_FIELD)
    if content.keys() != {_FIELD} or not isinstance(listed, list):
        raise ValueError(
            f"{path}: {_FIELD}: expected a list of tuned steps and no other field, "
            f"got {type(listed).__name__} and {sorted(content)}"
        )
    found: dict[int, TunedSteps] = {}
    for i, described in enumerate(listed):
        try:
            steps = TunedSteps.from_dict(described)
        except ValueError as error:
            raise ValueError(f"{path}: {_FIELD}[{i}]: {error}") from error
        if steps.steps in found:
            raise ValueError(
                f"{path}: {_FIELD}[{i}]: expected another number of steps than those before, "
                f"got {steps.steps} again"
            )
        found[steps.steps] = steps
    return found


class TunedFile(Mapping[int, TunedSteps]):
    """Tuned steps by number of steps, read from a file on first use; empty without the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _steps(self) -> dict[int, TunedSteps]:
        try:
            return read_tuned(self._path)
        except FileNotFoundError:
            return {}

    def __getitem__(self, S: int) -> TunedSteps:
        return self._steps[S]

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        """The numbers of steps, and the file."""
        return f"TunedFile({str(self._path)!r}, {sorted(self._steps)})"
