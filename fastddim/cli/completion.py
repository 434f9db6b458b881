"""Values that a shell completes: models, devices and backends."""

from __future__ import annotations

from typing import get_args

import click
from click.shell_completion import CompletionItem

from fastddim.bundled import available
from fastddim.choices import Impl


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The bundled models, and the files that the shell finds."""
    # Files come first, since bash forgets the values before them.
    files = CompletionItem(incomplete, type="file")
    return [files, *map(CompletionItem, _begun(incomplete, available()))]


def complete_device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The kinds of devices that the package has backends for."""
    return _begun(incomplete, ("auto", "cpu", "cuda"))


def complete_backend(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """All backends, since only a trial shows which ones work here."""
    return _begun(incomplete, get_args(Impl))


def _begun(incomplete: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
