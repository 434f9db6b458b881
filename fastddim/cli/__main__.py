"""`python -m fastddim.cli`, for use when the `fastddim` command is not on the path."""

from fastddim.cli import main

main(prog_name="fastddim")
