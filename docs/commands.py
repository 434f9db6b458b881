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
    context = click.Context(program, info_name="fastddim", max_content_width=100)
    commands = {"fastddim": context}
    for name, command in program.commands.items():
        commands[name] = click.Context(command, info_name=name, parent=context)
    for name, ctx in commands.items():
        yield f"## {name}\n\n```text\n{ctx.get_help()}\n```\n"
