"""The page of the command line: what `fastddim COMMAND --help` prints, in the place of a mark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    if MARK not in markdown:
        return markdown
    from fastddim.cli import main

    return markdown.replace(MARK, "\n".join(helps(main)))


def helps(program: click.Group) -> Iterator[str]:
    """A section for the program and for each of its commands."""
    # Made as for a call, so that help shows defaults; nothing is parsed that could be missing.
    call = {"args": [], "resilient_parsing": True}
    context = program.make_context("fastddim", terminal_width=80, **call)
    commands = {"fastddim": context}
    for name, command in program.commands.items():
        commands[name] = command.make_context(name, parent=context, **call)
    for name, ctx in commands.items():
        yield f"## {name}\n\n```text\n{ctx.get_help()}\n```\n"
