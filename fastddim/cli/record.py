"""The record of how an image was drawn, in text chunks of its PNG file; `--like` reads it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from fastddim import images
from fastddim._version import __version__
from fastddim.cli.options import Placing, is_given
from fastddim.runs.fingerprints import fingerprint

# The name of the whole record in a file; the texts with other names are for people.
RECORD = "fastddim"

_RECALLED = "fastddim.cli.record"
# The destination of an image does not affect how it is drawn.
_UNRECORDED = ("decode", "gif", "images", "out", "progress")


@dataclass(frozen=True)
class Rows:
    """An image of a run and the images that it was drawn together with, numbered from 0 in the run.

    The model's rounding depends on the size of the batch, so the same bytes need the same batch.
    """

    start: int
    stop: int
    image: int


@dataclass(frozen=True)
class Record:
    """All that an image depends on.

    Attributes:
        command: name of the command that drew the image.
        options: options of the command that are not None.
        digests: SHA-256 of the model's weights and of files that options name.
        computed_by: the kind of device, the threads, and the versions of fastddim and torch.
        rows: the part of the run that the file shows, if it is one image of several.
    """

    command: str
    options: Mapping[str, Any]
    digests: Mapping[str, str]
    computed_by: Mapping[str, str]
    rows: Rows | None = None

    def text(self, rows: Rows | None = None) -> dict[str, str]:
        """The text of a file with the whole run, or with the `rows` of it."""
        whole = self if self.rows is not None or rows is None else replace(self, rows=rows)
        shown = ("seed", "seeds", "steps", "timesteps", "steps_file", "eta", "model")
        text = {name: str(self.options[name]) for name in shown if name in self.options}
        for decisive in ("timesteps", "steps_file"):
            if decisive in text:
                text["steps"] = text.pop(decisive)
        return {**text, "version": __version__, RECORD: json.dumps(asdict(whole))}


def record(model: Any, placing: Placing, files: Mapping[str, str], **decided: Any) -> Record:
    """The record of the images that the current command is about to draw.

    Args:
        model: a module.
        files: path of each file that the images depend on, by the name of its option.
        decided: values that the command chose, which replace those of options.
    """
    import torch

    ctx = click.get_current_context()
    options = {**ctx.params, **decided}
    digests = {name: hashlib.sha256(Path(path).read_bytes()) for name, path in files.items()}
    return Record(
        command=str(ctx.info_name),
        options={
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in sorted(options.items())
            if value is not None and name not in _UNRECORDED
        },
        digests={
            "model": fingerprint(model),
            **{name: digest.hexdigest() for name, digest in digests.items()},
        },
        computed_by={
            "device": placing.torch_device.type,
            "threads": str(torch.get_num_threads()),
            "fastddim": __version__,
            "torch": torch.__version__,
        },
    )


@dataclass(frozen=True)
class Recalled:
    """The record in the file of `--like`."""

    path: str
    record: Record

    def compare(self, now: Record) -> None:
        """Refuse other weights and other contents of files with the same names, and report other
        differences that may change the pixels.

        Raises:
            click.ClickException: the content of a file has changed.
        """
        for name, digest in now.digests.items():
            before = self.record.digests.get(name)
            if digest != before and not is_given(name):
                raise click.ClickException(
                    f"{self.path}: expected {name.replace('_', '-')} {now.options[name]} with "
                    f"SHA-256 {before}, got {digest}; name one on the command line to draw with it"
                )
        before_by, now_by = self.record.computed_by, now.computed_by
        if before_by != now_by:
            told = [
                ", ".join(f"{name} {by.get(name)}" for name in now_by) for by in (before_by, now_by)
            ]
            click.echo(
                f"fastddim: pixels may differ: {self.path} was drawn with {told[0]}; "
                f"this is {told[1]}",
                err=True,
            )

    def rows_of(self, count: int) -> Rows | None:
        """The rows to draw out of `count`; None for all, and if the user chooses them.

        Raises:
            click.ClickException: there are fewer rows.
        """
        chosen = ("batch_size", "count", "latents", "sample_offset")
        rows = None if any(map(is_given, chosen)) else self.record.rows
        if rows is not None and rows.stop > count:
            raise click.ClickException(f"{self.path}: expected rows of {count} images, got {rows}")
        return rows


def recalled() -> Recalled | None:
    """The record of `--like`, or None without it."""
    found: Recalled | None = click.get_current_context().meta.get(_RECALLED)
    return found


def recall(ctx: click.Context, path: str) -> None:
    """Take the options that the user does not give to the current command from a file.

    Raises:
        click.ClickException: the file holds no record of this command and its options.
        ValueError, OSError: it is not a PNG file, or cannot be read.
    """
    found = _read(path)
    if found.command != ctx.info_name:
        raise click.ClickException(
            f"{path}: expected an image of 'fastddim {ctx.info_name}', "
            f"got one of 'fastddim {found.command}'"
        )
    known = {param.name for param in ctx.command.params} - {*_UNRECORDED, "like"}
    unknown = sorted(found.options.keys() - known)
    if unknown:
        raise click.ClickException(
            f"{path}: expected options of fastddim {__version__}, got {', '.join(unknown)}, as "
            f"fastddim {found.computed_by.get('fastddim')} has them"
        )
    ctx.default_map = dict(found.options)
    ctx.meta[_RECALLED] = Recalled(path, found)


def _read(path: str) -> Record:
    text = images.read_text(path)
    if RECORD not in text:
        raise click.ClickException(
            f"{path}: expected a PNG file that fastddim wrote, with its options in the text "
            f"{RECORD!r}, got {', '.join(map(repr, sorted(text))) or 'no text'}"
        )
    try:
        content = json.loads(text[RECORD])
        rows = content.pop("rows")
        found = Record(**content, rows=None if rows is None else Rows(**rows))
        _check(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise click.ClickException(
            f"{path}: expected a record of fastddim in the text {RECORD!r}, got {error!r}"
        ) from error
    return found


def _check(found: Record) -> None:
    for mapping in (found.options, found.digests, found.computed_by):
        if not isinstance(mapping, dict):
            raise TypeError(f"expected an object, got {mapping!r}")
        for value in mapping.values():
            if not isinstance(value, str | int | float | bool):
                raise TypeError(f"expected text, a number, true or false, got {value!r}")
    if not re.fullmatch(r"[a-z]+", found.command):
        raise ValueError(f"command: expected a name, got {found.command!r}")
    rows = found.rows
    if rows is not None and not (
        all(type(number) is int for number in (rows.start, rows.stop, rows.image))
        and 0 <= rows.start <= rows.image < rows.stop
    ):
        raise ValueError(f"rows: expected 0 <= start <= image < stop, got {rows}")
