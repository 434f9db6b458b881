"""The end of the program: one line about an error, and an exit code that scripts can trust."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

INTERRUPTED = 130


class Program(click.Group):
    """A group that reports every error as `fastddim: error: …` on stderr.

    Exit codes: 0, 1 after a failure, 2 for wrong arguments, 130 after Ctrl-C.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                code = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.Abort:
            click.echo("fastddim: interrupted", err=True)
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            click.echo(f"fastddim: error: {_line(error)}", err=True)
            sys.exit(error.exit_code)
        # Without standalone mode click returns the code of `ctx.exit` or the command's own result.
        sys.exit(code or 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if ctx.params["traceback"] or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(described(error)) from error


class Command(click.Command):
    """A command of the library, whose options are parsed before the library is imported."""

    def invoke(self, ctx: click.Context) -> Any:
        import_library()
        return super().invoke(ctx)


def import_library() -> None:
    """Import `fastddim` as other programs do, if `fastddim_command` has postponed it.

    Importing modules one by one could happen in an order that nothing else uses.
    """
    import fastddim

    assert fastddim.__all__


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the library's errors about arguments into errors about options of the same names."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def described(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    text = " ".join(str(message).split()).removeprefix("fastddim: ")
    click.echo(f"fastddim: warning: {text}", err=True)


def _line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return message if ctx is None else f"{message} (see '{ctx.command_path} --help')"
