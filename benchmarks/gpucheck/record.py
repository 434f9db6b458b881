"""The record of a check: `results.jsonl`, one line for each finding.

A line is on the disk before the next step, so a stage that dies or hangs loses only its own rest.
Nothing here raises for a finding: a difference or an exception becomes a line.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NAME = "results.jsonl"
RUNNER = "runner"
"""The stage of lines that say how stages ended, and on which machine."""

OK, FAILED, LACKING = 0, 1, 3
"""Ends of a stage: exit codes of its process."""


class Record:
    """Findings of one stage."""

    def __init__(self, folder: Path, stage: str, began: float) -> None:
        self._path = folder / NAME
        self._stage = stage
        self._began = began
        self._failed = self._lacking = False

    @property
    def code(self) -> int:
        """`FAILED` after a problem, else `LACKING` if something needed was missing."""
        return FAILED if self._failed else LACKING if self._lacking else OK

    def row(self, **values: Any) -> None:
        """Write a finding into the file."""
        at = round(time.time() - self._began, 2)
        line = json.dumps({"stage": self._stage, "at": at, **values}, default=str)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def show(self, **values: Any) -> None:
        """Write a finding that the summary prints."""
        self.row(show=True, **values)

    def problem(self, **values: Any) -> None:
        """Write a finding after which the stage counts as failed."""
        self._failed = True
        self.show(problem=True, **values)

    def lacks(self, what: str) -> None:
        """Write down something that is missing, without which a part of the stage is left out."""
        self._lacking = True
        self.show(lacks=what)

    def lacks_module(self, error: ModuleNotFoundError) -> None:
        traceback.print_exc()
        self.lacks(f"the Python package {error.name}")

    def attempt(self, function: Callable[[], T], **about: Any) -> T | None:
        """The result of a call; None if it raises, after a problem that says `about`.

        A missing Python package is not a problem, but lacking.
        """
        try:
            return function()
        except ModuleNotFoundError as error:
            self.lacks_module(error)
            return None
        except Exception as error:
            traceback.print_exc()
            self.problem(**about, error=f"{type(error).__name__}: {str(error)[:600]}")
            return None


def lines(folder: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The record's lines from a byte on, without a last one that was cut off."""
    path = folder / NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def size(folder: Path) -> int:
    """The bytes of the record so far."""
    path = folder / NAME
    return path.stat().st_size if path.exists() else 0
