"""Help, completion and wrong arguments, without any import of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastddim.cli import main

HEAVY = """
import sys
import fastddim_command

try:
    fastddim_command.main()
except SystemExit as end:
    heavy = {"PIL", "numpy", "safetensors", "torch", "tqdm"} & sys.modules.keys()
    print(end.code, sorted(heavy), file=sys.stderr)
"""

RunCommand = Callable[..., tuple[str, str]]


@pytest.fixture
def run_command(run_python: Any, tmp_path: Path) -> RunCommand:
    """Run the command in an empty folder; stdout, and the exit code with the heavy imports."""

    def run(*arguments: str, **env: str) -> tuple[str, str]:
        code = f"import sys; sys.argv[0] = 'fastddim'\n{HEAVY}"
        result = run_python("-c", code, *arguments, cwd=tmp_path, env=env)
        return result.stdout, result.stderr.splitlines()[-1]

    return run


def complete(run_command: RunCommand, *words: str) -> list[tuple[str, str]]:
    """(type, value) of each completion of the last word."""
    stdout, end = run_command(
        _FASTDDIM_COMPLETE="bash_complete",
        COMP_WORDS="\n".join(("fastddim", *words)),
        COMP_CWORD=str(len(words)),
    )
    assert end == "0 []"
    return [(kind, value) for kind, _, value in (x.partition(",") for x in stdout.splitlines())]


@pytest.mark.parametrize("name", [None, *main.commands])
def test_help_is_there_at_once(run_command: RunCommand, name: str | None) -> None:
    stdout, end = run_command(*([] if name is None else [name]), "--help")
    assert end == "0 []"
    assert "Example" in stdout


def test_so_are_the_version_and_an_error_about_arguments(run_command: RunCommand) -> None:
    assert run_command("--version")[1] == "0 []"
    assert run_command("sample", "digits", "--steps", "many")[1] == "2 []"
    assert run_command("sampel")[1] == "2 []"


def test_a_command_that_computes_has_the_whole_library(run_command: RunCommand) -> None:
    stdout, end = run_command("sample", "digits", "--steps", "2", "--count", "2")
    assert stdout == "samples.png\n"
    assert end.startswith("0 [")
    assert "torch" in end


def test_completion_of_commands(run_command: RunCommand) -> None:
    assert {value for _, value in complete(run_command, "")} == set(main.commands)


@pytest.mark.parametrize(
    ("begun", "values"), [("", {"digits", "fashion"}), ("fa", {"fashion"}), ("runs/", set())]
)
def test_completion_of_models(run_command: RunCommand, begun: str, values: set[str]) -> None:
    """Files come first in completions of models, since bash forgets the characters before them."""
    (first, *rest) = complete(run_command, "sample", begun)
    assert first == ("file", begun)
    assert {value for _, value in rest} == values


@pytest.mark.parametrize(
    ("option", "begun", "values"),
    [
        ("--spacing", "tr", {"trailing"}),
        ("--device", "", {"auto", "cpu", "cuda"}),
        ("--impl", "", {"auto", "cpu", "cuda", "reference", "triton"}),
    ],
)
def test_completion_of_values(
    run_command: RunCommand, option: str, begun: str, values: set[str]
) -> None:
    found = complete(run_command, "sample", "digits", option, begun)
    assert {value for _, value in found} == values


@pytest.mark.parametrize("option", ["--out", "--gif", "--like", "--latents", "--steps-file"])
def test_completion_of_files(run_command: RunCommand, option: str) -> None:
    assert complete(run_command, "sample", "digits", option, "a") == [("file", "a")]
