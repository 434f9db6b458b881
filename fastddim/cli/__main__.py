"""`python -m fastddim.cli`, where the `fastddim` command is not on the path."""

from fastddim.cli import main

main(prog_name="fastddim")
