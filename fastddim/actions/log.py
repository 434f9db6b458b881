"""The log of a control loop: the inputs of every chunk of actions, and the actions.

A log is a file of JSON lines. The header comes first and describes all that the actions depend on
besides the observations; then each tick has a line. Actions are written as numbers, which people
can read: a float64 of JSON shows every value of the state's dtypes exactly, and Python reads back
the number that it wrote. NaN and infinities appear as Python's `json` writes them.

A line is written by one system call, so a process that is killed leaves whole lines. A full disk
or a machine failure can still tear the last line. Readers ignore a torn end, and the next writer
cuts it off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim._version import __version__
from fastddim.loop.arguments import ModelArguments
from fastddim.loop.setup import Setup
from fastddim.options import Update
from fastddim.runs.description import described_computation, described_plan, dtype_name
from fastddim.runs.differences import differences
from fastddim.runs.fingerprints import add_tensor, weights_of
from fastddim.runs.lock import lock_at_once
from fastddim.validation import STATE_DTYPES, check_int

FORMAT = "fastddim actions"
VERSION = 1

Header: TypeAlias = dict[str, Any]
"""All that the ticks of a sampler depend on besides their observations."""
Path: TypeAlias = str | os.PathLike[str]
"""The path of a log."""


class LoggedTick(NamedTuple):
    """One tick of a control loop.

    Attributes:
        tick: number of the tick.
        sample: index of its first sample, which keys its noise.
        executed, frozen: the arguments of the call.
        before: whether the tick went on from an earlier chunk.
        observation: digest of the model's tensors, as `observation_digest` gives it.
        actions: the chunk, nested lists `[B][horizon][action_dim]`.
    """

    tick: int
    sample: int
    executed: int | list[int]
    frozen: int | list[int]
    before: bool
    observation: str
    actions: list[list[list[float]]]


def header_of(setup: Setup, update: Update, **own: Any) -> Header:
    """The header of a log.

    Args:
        setup: setup of a tick without an earlier chunk.
        update: the arguments of each step.
        own: further values that the ticks depend on, in the types of JSON.
    """
    model, uncond_model = setup.model, setup.uncond_model
    header = {
        "format": FORMAT,
        "version": VERSION,
        "versions": {"fastddim": __version__, "torch": torch.__version__},
        "model": {
            "class": type(model).__qualname__,
            "weights": weights_of(model),
            "uncond_class": None if uncond_model is None else type(uncond_model).__qualname__,
            "uncond_weights": weights_of(uncond_model),
        },
        "shape": setup.shape,
        "dtype": dtype_name(setup.dtype),
        "model_dtype": dtype_name(setup.model_dtype),
        **own,
        "plan": described_plan(setup, update.checked(setup.shape[0], per_step=True)),
        "computation": described_computation(setup),
    }
    as_read: Header = json.loads(json.dumps(header, default=Tensor.tolist))
    return as_read


def observation_digest(arguments: ModelArguments) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors that a model is called with.

    Tensors are taken in the order of their names, so the order of a mapping does not matter. Values
    that are not tensors are left out, since they are the same in all calls of a sampler.
    """
    digest = hashlib.sha256()
    groups = {"model_kwargs": arguments.tensors, "uncond_kwargs": arguments.uncond_kwargs or {}}
    named = {group + name: value for group, of in groups.items() for name, value in of.items()}
    for name, value in sorted(named.items()):
        if isinstance(value, Tensor):
            add_tensor(digest, name, value)
        else:
            # The number fills the rows of a tensor, and may differ between calls.
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


class LogWriter:
    """Appends the ticks of one sampler to a log.

    Attributes:
        path: path of the log.
        next_tick: the number after that of the last tick in the log.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open a log, or begin a new one.

        Raises:
            TypeError: `path` is not a path.
            ValueError: the log has another header, or the file is not a log.
            BlockingIOError: another sampler writes the log.
            OSError: the file cannot be written, or is not an ordinary file.
        """
        self.path = _checked_path(path)
        # In append mode, every write goes to the end of the file, which is the end of a line.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(self.path, flags, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._check_file()
            self.next_tick = self._take_up(header)
        except BaseException:
            self._close()
            raise

    def write(self, tick: LoggedTick) -> None:
        """Append the line of a tick.

        Raises:
            OSError: the line cannot be written; the log is unchanged.
        """
        self._append(tick._asdict())
        self.next_tick = tick.tick + 1

    def _check_file(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise OSError(f"log: expected an ordinary file or a new name, got {self.path!r}")
        try:
            lock_at_once(self._descriptor, fcntl.LOCK_EX, self.path, "sampler writes the log")
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "log: expected a file of this sampler alone, got one in use", self.path
            ) from error

    def _take_up(self, header: Header) -> int:
        """Check the header, or write it, and return the number of the next tick."""
        line = _encoded(header)
        with open(self.path, "rb") as file:
            start = file.read(len(line))
            if not start.endswith(b"\n") and line.startswith(start):
                # The file is empty, or holds a torn header.
                os.ftruncate(self._descriptor, 0)
                self._append(header)
                return 0
        with open(self.path, "rb") as file:
            refuse_other(_read_header(file, self.path), header, self.path)
            following = 0
            for tick in _read_ticks(file, self.path):
                following = tick.tick + 1
            os.ftruncate(self._descriptor, file.tell())
        return following

    def _append(self, content: dict[str, Any]) -> None:
        line, before = _encoded(content), os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, line)
        if written < len(line):
            os.ftruncate(self._descriptor, before)
            raise OSError(
                f"{self.path}: expected room for {len(line)} bytes, got {written} of them written"
            )


class ActionLog:
    """A log of actions, read from its file.

    Attributes:
        path: path of the file.
        header: all that the actions depend on besides the observations.
    """

    def __init__(self, path: Path) -> None:
        """Open the log in a file.

        Raises:
            ValueError: the file is not a log of actions, or has an unknown version.
            TypeError: `path` is not a path.
            OSError: the file cannot be read.
        """
        self.path = _checked_path(path)
        with open(self.path, "rb") as file:
            self.header = _read_header(file, self.path)

    def __repr__(self) -> str:
        return f"ActionLog({self.path!r})"

    def __iter__(self) -> Iterator[LoggedTick]:
        """Give the ticks in order, without a torn line at the end.

        Raises:
            ValueError: a line before the end does not hold a tick.
        """
        with open(self.path, "rb") as file:
            file.readline()
            yield from _read_ticks(file, self.path)

    def actions(self, tick: LoggedTick) -> Tensor:
        """The actions of a tick `[B, horizon, action_dim]` on the CPU, with their original bits.

        The payload of a NaN is not kept.
        """
        dtypes = {dtype_name(dtype): dtype for dtype in STATE_DTYPES}
        dtype = dtypes[self.header["dtype"]]
        return torch.tensor(tick.actions, dtype=torch.float64, device="cpu").to(dtype)


def refuse_other(found: Header, wanted: Header, path: str) -> None:
    """Refuse a log with another header.

    Raises:
        ValueError: some entries differ; the message names them.
    """
    lines = [it.line for it in differences(found, wanted, ("in the log", "here"))]
    if lines:
        raise ValueError(
            f"log: expected one of the same sampler, got {path!r}, which differs:\n  "
            + ";\n  ".join(lines)
        )


def _checked_path(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(f"log: expected a path, got {path!r}") from None


def _encoded(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _read_header(file: BinaryIO, path: str) -> Header:
    try:
        content = json.loads(file.readline())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a log of actions, got {error}") from error
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: expected a log of actions, version {VERSION}, got {found or content!r}"
        )
    header: Header = content
    return header


def _read_ticks(file: BinaryIO, path: str) -> Iterator[LoggedTick]:
    """The ticks after the header; when they end, the file is at the end of the last whole line."""
    number, end = 1, file.tell()
    while (line := file.readline()).endswith(b"\n"):
        number += 1
        try:
            tick = LoggedTick(**json.loads(line))
            check_int("tick", tick.tick, 0, 2**62)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected a tick of a log in line {number}, got {error}"
            ) from error
        end = file.tell()
        yield tick
    file.seek(end)
