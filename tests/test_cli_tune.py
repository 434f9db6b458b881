"""`fastddim tune`: its files, and the time of each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import fastddim
from fastddim import models
from fastddim.cli import main
from fastddim.tuning.tuner import Tuner

QUICKLY = ("--samples", 8, "--teacher-steps", 20)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_file_for_each_number() -> None:
    result = run("tune", "digits", "--steps", "2,3", *QUICKLY, "--out", "tuned", "--seed", 5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "tuned\n"
    digits = models.load("digits")
    own = fastddim.tune(digits, 3, samples=8, teacher_steps=20, seed=5, progress=False)
    assert isinstance(own, fastddim.TunedSteps)
    written = fastddim.load_steps("tuned/steps-3.json")
    assert (written.timesteps, written.direction) == (own.timesteps, own.direction)
    assert written.record["command"] == (
        "fastddim tune digits --steps 2,3 --samples 8 --teacher-steps 20 --seed 5"
    )
    assert fastddim.load_steps("tuned/steps-2.json").steps == 2

    result = run("sample", "digits", "--steps-file", "tuned/steps-3.json", "--count", 2)
    assert result.exit_code == 0, result.stderr
    assert Path("samples.png").is_file()


def test_one_file_for_a_model() -> None:
    result = run("tune", "digits", "--steps", "2,3", *QUICKLY, "--out", "model-tuned.json")
    assert result.exit_code == 0, result.stderr
    assert list(models.read_tuned("model-tuned.json")) == [2, 3]


def test_what_is_found_before_an_interruption_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, tuned = itertools.count(), Tuner.tuned

    def interrupted(self: Tuner, steps: int) -> fastddim.TunedSteps:
        if next(counter) == 1:
            raise KeyboardInterrupt
        return tuned(self, steps)

    monkeypatch.setattr(Tuner, "tuned", interrupted)
    result = run("tune", "digits", "--steps", "2,3", *QUICKLY, "--out", "tuned")
    assert result.exit_code == 130
    assert [path.name for path in Path("tuned").iterdir()] == ["steps-2.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "11"), "steps: expected at most 10, half of the teacher's 20"),
        (("--steps", "two"), "expected integers separated by commas, got 'two'"),
        (("--steps", "4", "--clip", "-1"), "clip: expected"),
    ],
)
def test_bad_options_write_nothing(arguments: tuple[str, ...], message: str) -> None:
    result = run("tune", "digits", *arguments, *QUICKLY, "--out", "tuned")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("tuned").exists()
