"""Pictures of the command line: their metadata, `--like`, `--gif` and fresh seeds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import fastddim
from fastddim import images, models
from fastddim.cli import main
from fastddim.cli.record import RECORD


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: Any) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fail(code: int, *arguments: Any) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert re.fullmatch(r"fastddim: error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


def record_of(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(images.read_text(path)[RECORD])
    return content


def write_record(path: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    images.save_png(path, np.zeros((2, 2, 1), dtype=np.uint8), text={RECORD: text})


def same(first: str, second: str) -> bool:
    return Path(first).read_bytes() == Path(second).read_bytes()


class TestText:
    def test_a_picture_names_seed_steps_eta_model_and_version(self) -> None:
        succeed("sample", "digits", "--seed", 7, "--steps", 3, "--eta", 0.5, "--count", 2)
        text = images.read_text("samples.png")
        shown = {"seed": "7", "steps": "3", "eta": "0.5", "model": "digits"}
        assert {name: text[name] for name in shown} == shown
        assert text["version"] == fastddim.__version__

    def test_timesteps_stand_for_steps(self) -> None:
        succeed("sample", "digits", "--seed", 7, "--timesteps", "900,50", "--count", 1)
        assert images.read_text("samples.png")["steps"] == "900,50"

    def test_so_do_pictures_of_the_other_commands(self) -> None:
        succeed("interpolate", "digits", "--seeds", "3,8", "--steps", 2, "--frames", 2)
        text = images.read_text("interpolation.png")
        assert (text["seeds"], text["steps"], text["model"]) == ("3,8", "2", "digits")
        options = ("--steps", 2, "--out", "z.npz", "--decode", "pairs.png")
        images.save_png("in.png", np.zeros((8, 8, 1), dtype=np.uint8))
        succeed("invert", "digits", "in.png", *options)
        text = images.read_text("pairs.png")
        assert (text["steps"], text["eta"], text["model"]) == ("2", "0.0", "digits")
        assert "seed" not in text

    def test_no_path_of_the_machine_is_in_a_picture_unless_it_was_given(self) -> None:
        succeed("sample", "digits", "--seed", 7, "--steps", 2, "--count", 1, "--out", "a/")
        assert str(Path.cwd()) not in str(images.read_text("a/000000.png"))


class TestFreshSeeds:
    def test_two_runs_differ_and_each_names_its_seed(self) -> None:
        seeds = []
        for out in ("a.png", "b.png"):
            result = succeed("sample", "digits", "--steps", 2, "--count", 2, "--out", out)
            told = re.fullmatch(r"fastddim: seed (\d+)\n", result.stderr)
            assert told is not None
            assert images.read_text(out)["seed"] == told[1]
            seeds.append(told[1])
        assert seeds[0] != seeds[1]
        options = ("--steps", 2, "--count", 2, "--out", "c.png")
        assert succeed("sample", "digits", "--seed", seeds[0], *options).stderr == ""
        assert same("a.png", "c.png")
        assert not np.array_equal(pixels("a.png"), pixels("b.png"))

    def test_interpolate_names_two(self) -> None:
        result = succeed("interpolate", "digits", "--steps", 2, "--frames", 2)
        told = re.fullmatch(r"fastddim: seeds (\d+,\d+)\n", result.stderr)
        assert told is not None
        assert images.read_text("interpolation.png")["seeds"] == told[1]

    def test_none_is_drawn_where_nothing_is_random(self) -> None:
        np.savez("z.npz", latents=np.zeros((2, 1, 8, 8), np.float32))
        options = ("--latents", "z.npz", "--steps", 2)
        assert succeed("sample", "digits", *options).stderr == ""
        assert "seed" not in images.read_text("samples.png")
        assert "seed " in succeed("sample", "digits", *options, "--eta", 1).stderr

    def test_none_is_told_where_nothing_is_drawn(self) -> None:
        assert "--out: expected" in fail(2, "sample", "digits", "--out", "a.jpg")


def pixels(path: str) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.array(image)


class TestLike:
    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("--eta", 1, "--variance", "large", "--sample-offset", 5),
            ("--timesteps", "900,400,10", "--clip", 1, "--rederive-eps"),
            ("--steps", 4, "--spacing", "leading", "--steps-offset", 1, "--dtype", "bfloat16"),
            ("--prediction", "v_prediction", "--columns", 2, "--scale", 3, "--batch-size", 3),
        ],
        ids=lambda options: " ".join(map(str, options)) or "defaults",
    )
    def test_the_same_bytes(self, options: tuple[Any, ...]) -> None:
        steps = () if {"--steps", "--timesteps"} & set(options) else ("--steps", 3)
        succeed("sample", "digits", *steps, *options, "--count", 4, "--out", "a.png")
        result = succeed("sample", "--like", "a.png", "--out", "b.png")
        assert (result.stdout, result.stderr) == ("b.png\n", "")
        assert same("a.png", "b.png")

    def test_from_latents_and_tuned_steps(self) -> None:
        np.savez("z.npz", latents=np.full((3, 1, 8, 8), 0.5, np.float32))
        models.load("digits").tuned[5].save("steps.json")
        options = ("--latents", "z.npz", "--steps-file", "steps.json")
        succeed("sample", "digits", *options, "--out", "a.png")
        succeed("sample", "--like", "a.png", "--out", "b.png")
        assert same("a.png", "b.png")
        assert images.read_text("b.png")["steps"] == "steps.json"

        np.savez("z.npz", latents=np.full((3, 1, 8, 8), 0.25, np.float32))
        line = fail(1, "sample", "--like", "a.png", "--out", "c.png")
        assert re.search(r"a\.png: expected latents z\.npz with SHA-256 \w{64}, got \w{64}", line)
        succeed("sample", "--like", "a.png", "--latents", "z.npz", "--out", "c.png")
        assert not np.array_equal(pixels("a.png"), pixels("c.png"))

    def test_one_image_of_a_folder_by_itself(self) -> None:
        """One image of a folder is drawn in its own batch, on which its last bits depend."""
        options = ("--steps", 3, "--count", 5, "--batch-size", 3, "--sample-offset", 40)
        succeed("sample", "digits", *options, "--out", "a")
        for number in (41, 44):
            name = f"{number:06d}.png"
            succeed("sample", "--like", f"a/{name}", "--out", "b/")
            assert same(f"a/{name}", f"b/{name}")
        assert len(list(Path("b").iterdir())) == 2
        succeed("sample", "--like", "b/000041.png", "--out", "c.png")
        succeed("sample", "--like", "c.png", "--out", "d.png")
        assert same("c.png", "d.png")

    def test_the_whole_run_of_an_image_where_the_count_says_so(self) -> None:
        succeed("sample", "digits", "--steps", 3, "--count", 3, "--out", "a")
        succeed("sample", "--like", "a/000001.png", "--count", 3, "--out", "b")
        names = [path.name for path in sorted(Path("a").iterdir())]
        assert [path.name for path in sorted(Path("b").iterdir())] == names
        assert all(same(f"a/{name}", f"b/{name}") for name in names)

    def test_what_is_given_comes_first(self) -> None:
        options = ("--seed", 3, "--count", 2, "--out", "a.png")
        succeed("sample", "digits", "--timesteps", "900,50", *options)
        succeed("sample", "--like", "a.png", "--steps", 3, "--eta", 1, "--out", "b.png")
        written = ("--seed", 3, "--count", 2, "--steps", 3, "--eta", 1, "--out", "c.png")
        succeed("sample", "digits", *written)
        assert same("b.png", "c.png")

    def test_tuned_steps_give_way_to_numbers(self) -> None:
        models.load("digits").tuned[5].save("steps.json")
        options = ("--seed", 3, "--count", 2)
        succeed("sample", "digits", "--steps-file", "steps.json", *options, "--out", "a.png")
        succeed("sample", "--like", "a.png", "--steps", 3, "--out", "b.png")
        succeed("sample", "digits", "--steps", 3, *options, "--out", "c.png")
        assert same("b.png", "c.png")

    def test_another_model_of_the_same_name(self) -> None:
        digits = models.load("digits")
        record = {"schedule": {"T": 1000, "beta_start": 1e-4, "beta_end": 0.02}}
        models.save(digits, "mine", record)
        succeed("sample", "mine", "--steps", 2, "--count", 2, "--out", "a.png")
        next(digits.parameters()).mul_(1.5)
        models.save(digits, "mine", record)
        line = fail(1, "sample", "--like", "a.png", "--out", "b.png")
        assert "expected model mine with SHA-256" in line
        succeed("sample", "mine", "--like", "a.png", "--out", "b.png")
        assert not np.array_equal(pixels("a.png"), pixels("b.png"))

    def test_versions_that_differ_are_told(self) -> None:
        succeed("sample", "digits", "--seed", 3, "--steps", 2, "--count", 2, "--out", "a.png")
        content = record_of("a.png")
        content["computed_by"]["torch"] = "2.0.1"
        write_record("old.png", content)
        told = succeed("sample", "--like", "old.png", "--out", "b.png").stderr
        assert told.startswith(
            f"fastddim: pixels may differ: old.png was drawn with device cpu, threads "
            f"{torch.get_num_threads()}, fastddim {fastddim.__version__}, torch 2.0.1; this is "
            "device cpu, "
        )
        assert np.array_equal(pixels("a.png"), pixels("b.png"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"command": "interpolate"}, "expected an image of 'fastddim sample', got one of"),
            ({"options": {"model": "digits", "later": 1}}, "expected options of .*, got later"),
            ({"options": {"model": "digits", "out": "x.png"}}, "expected options of .*, got out"),
            ({"options": ["model"]}, "expected a record .*expected an object, got"),
            ({"options": {"model": {"a": 1}}}, "expected text, a number, true or false"),
            ({"command": 3}, "expected a record of fastddim"),
            ({"rows": {"start": 2, "stop": 2, "image": 2}}, "rows: expected 0 <= start <= image"),
            ({"rows": {"start": 0, "stop": 9, "image": 2}}, "expected rows of 2 images, got"),
            ({"rows": {"first": 0}}, "expected a record of fastddim"),
            ({"more": 1}, "expected a record of fastddim"),
        ],
        ids=str,
    )
    def test_refused_records(self, change: dict[str, Any], message: str) -> None:
        succeed("sample", "digits", "--seed", 3, "--steps", 2, "--count", 2, "--out", "a.png")
        write_record("b.png", record_of("a.png") | change)
        assert re.search(message, fail(1, "sample", "--like", "b.png"))
        assert not Path("samples.png").exists()

    def test_a_value_that_is_none_of_its_option(self) -> None:
        write_record("a.png", record_with(options={"model": "digits", "steps": "many"}))
        assert "Invalid value for '--steps'" in fail(2, "sample", "--like", "a.png")

    def test_refused_files(self) -> None:
        images.save_png("plain.png", np.zeros((2, 2, 1), dtype=np.uint8), text={"Title": "mine"})
        line = fail(1, "sample", "--like", "plain.png")
        assert "plain.png: expected a PNG file that fastddim wrote" in line
        assert "got 'Title'" in line
        write_record("broken.png", "{")
        assert "broken.png: expected a record of" in fail(1, "sample", "--like", "broken.png")
        Path("text.png").write_text("text")
        assert "text.png: expected a PNG image" in fail(1, "sample", "--like", "text.png")
        assert "gone.png: No such file" in fail(1, "sample", "--like", "gone.png")

    def test_a_model_is_needed_otherwise(self) -> None:
        assert "Missing argument 'MODEL'" in fail(2, "sample")


def record_with(**fields: Any) -> dict[str, Any]:
    empty = {"command": "sample", "options": {}, "digests": {}, "computed_by": {}, "rows": None}
    return empty | fields


class TestGif:
    def test_a_frame_for_the_latents_and_each_step(self) -> None:
        options = ("--seed", 3, "--steps", 3, "--count", 5, "--out", "a.png", "--gif", "a.gif")
        assert succeed("sample", "digits", *options).stdout == "a.png\na.gif\n"
        states = [fastddim.philox.initial_latents((5, 1, 8, 8), 3)]
        fastddim.sample(
            models.load("digits"),
            3,
            batch_size=5,
            seed=3,
            callback=lambda s, t, x, x_0: states.append(x),
        )
        with Image.open("a.gif") as shown:
            assert shown.n_frames == 4
            for i, state in enumerate(states):
                shown.seek(i)
                sheet = images.grid(images.to_uint8(state), scale=8)
                assert np.array_equal(np.array(shown.convert("L")), sheet[:, :, 0])

    def test_in_batches_it_shows_all_images(self) -> None:
        options = ("--steps", 2, "--count", 5, "--batch-size", 2, "--scale", 1, "--columns", 5)
        succeed("sample", "digits", *options, "--out", "a.png", "--gif", "a.gif")
        with Image.open("a.gif") as shown:
            shown.seek(shown.n_frames - 1)
            assert np.array_equal(np.array(shown.convert("L")), pixels("a.png"))

    def test_changes_nothing_in_the_picture(self) -> None:
        options = ("--seed", 3, "--steps", 2, "--count", 2)
        succeed("sample", "digits", *options, "--out", "a.png")
        succeed("sample", "digits", *options, "--out", "b.png", "--gif", "b.gif")
        assert same("a.png", "b.png")

    @pytest.mark.parametrize(
        ("gif", "code", "message"),
        [
            ("a.png", 2, "--gif: expected a name that ends in .gif, got 'a.png'"),
            ("gone/a.gif", 1, "gone/a.gif: cannot be written"),
        ],
    )
    def test_refused_before_drawing(self, gif: str, code: int, message: str) -> None:
        assert message in fail(code, "sample", "digits", "--gif", gif)
        assert not list(Path().iterdir())
