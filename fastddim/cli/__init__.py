"""The command line, `fastddim`: a module for each command, or for a few related ones."""

from __future__ import annotations

import click

from fastddim._version import __version__
from fastddim.cli.demo import command as demo
from fastddim.cli.env import command as env
from fastddim.cli.generate import command as generate
from fastddim.cli.generate import digest, merge
from fastddim.cli.interpolate import command as interpolate
from fastddim.cli.invert import command as invert
from fastddim.cli.program import Program
from fastddim.cli.sample import command as sample
from fastddim.cli.tune import command as tune

__all__ = ["main"]


@click.group(
    cls=Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="""\b
Examples:
  fastddim sample digits                       draw 64 digits into samples.png
  fastddim sample fashion --steps 20 --out f/  one PNG per image into the folder f
  fastddim interpolate digits --seeds 3,8      a strip from one image to another
  fastddim tune digits --steps 5,10 --out t/   few steps, chosen for this model
  fastddim env                                 what works on this machine

\b
Paths of results go to stdout, everything else to stderr. Exit codes:
  0 done   1 failed   2 wrong arguments   130 interrupted (Ctrl-C)
A file is written whole or not at all.""",
)
@click.version_option(__version__, prog_name="fastddim")
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Draw images from a diffusion model with DDIM."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


for command in (sample, invert, interpolate, generate, merge, digest, tune, env, demo):
    main.add_command(command)
