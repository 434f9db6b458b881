"""The examples run, and what they and the README show is true."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastddim
from fastddim.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name, capsys, monkeypatch, folder):
    monkeypatch.chdir(folder)
    load_example(name).main()
    return capsys.readouterr().out.strip()


def cells(path, rows, columns):
    """float64 `[rows, columns, 8, 8]` in [−1, 1] of a grid of enlarged digits."""
    with Image.open(path) as image:
        levels = np.array(image)
    size = 8 * 8 + 2
    assert levels.shape == (rows * size + 2, columns * size + 2)
    framed = levels[2:, 2:].reshape(rows, size, columns, size).swapaxes(1, 2)
    return framed[:, :, :64:8, :64:8] / 127.5 - 1


def test_every_example_is_tested_here_or_with_training():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"quickstart", "img2img", "custom_loop", "diffusers_unet", "train"}


def test_examples_run_as_their_docstrings_say(run_python, tmp_path):
    for path in (ROOT / "examples").glob("*.py"):
        assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
    result = run_python(ROOT / "examples/quickstart.py", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "runs/quickstart.png\n"), result.stderr


def test_quickstart(capsys, monkeypatch, tmp_path):
    out = run_example("quickstart", capsys, monkeypatch, tmp_path)
    x = fastddim.sample(fastddim.models.load("digits"), 50, batch_size=16)
    drawn = cells(out, 4, 4).reshape(16, 1, 8, 8)
    assert np.abs(drawn - x.clamp(-1, 1).numpy()).max() < 1 / 127.5


def test_img2img_keeps_less_of_the_sketch_the_later_it_starts(capsys, monkeypatch, tmp_path):
    table = cells(run_example("img2img", capsys, monkeypatch, tmp_path), 4, 5)
    sketch = load_example("img2img").read_sketch().numpy()[0, 0]
    assert (table[:, 0] == sketch).all()
    distance = ((table - sketch) ** 2).mean(axis=(0, 2, 3))
    assert distance[1] > 0
    assert (np.diff(distance) > 0).all(), distance
    assert len({table[i, 4].tobytes() for i in range(4)}) == 4


def test_custom_loop_completes_the_known_half(capsys, monkeypatch, tmp_path):
    rows = cells(run_example("custom_loop", capsys, monkeypatch, tmp_path), 2, 7).reshape(14, 8, 8)
    whole, masked, completions = rows[0], rows[1], rows[2:]
    assert (masked[:4] == whole[:4]).all()
    assert (completions[:, :4] == whole[:4]).all()
    assert len({c.tobytes() for c in completions}) == 12


def test_custom_loop_without_a_known_part_is_sample():
    example = load_example("custom_loop")
    model = fastddim.models.load("digits")
    nothing = torch.zeros(3, 1, 8, 8)
    x = example.complete(model, nothing, torch.zeros(8, 8, dtype=torch.bool), seed=4)
    expected = fastddim.sample(model, example.STEPS, eta=example.ETA, batch_size=3, seed=4)
    assert torch.equal(x, expected)


def test_diffusers_unet_gives_the_images_of_diffusers(capsys, monkeypatch, tmp_path):
    out = run_example("diffusers_unet", capsys, monkeypatch, tmp_path)
    error = float(re.fullmatch(r"largest difference, relative .*: (\S+)", out)[1])
    assert 0 < error < 1e-5


@pytest.fixture(scope="module")
def readme_names():
    """What the README's Python code defines, run from top to bottom in one namespace."""
    names = {"torch": torch}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(code, "README.md", "exec"), names)
    return names


def test_readme_code_runs(readme_names):
    assert (readme_names["run"].stop, len(readme_names["run"].digest)) == (200, 64)
    assert readme_names["between"].shape == (9, 1, 8, 8)
    assert readme_names["x"].shape == (1, 3, 16, 16)
    assert readme_names["actions"].shape == (1, 16, 7)
    assert readme_names["actions"].isfinite().all()


def test_readme_s_five_lines_are_what_sample_computes(readme_names):
    model = fastddim.models.load("digits", dtype=torch.float64)
    x_T = fastddim.philox.initial_latents((4, 1, 8, 8), 0, dtype=torch.float64)
    timesteps = fastddim.select_timesteps(1000, 20).tolist()
    written_out = readme_names["ddim"](model, x_T, timesteps, model.schedule.alphas_cumprod)
    sampled = fastddim.sample(model, timesteps, x_T=x_T)
    torch.testing.assert_close(written_out, sampled, rtol=1e-10, atol=1e-10)


def test_readme_s_commands_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The picture that others are to be like.
    drawn = ["sample", "digits", "--steps", "2", "--out", "digits.png"]
    assert CliRunner().invoke(main, drawn).exit_code == 0
    commands = re.findall(r"^fastddim (\w+)(.*?)(?: *#.*)?$", README, re.MULTILINE)
    assert {name for name, _ in commands} == {
        *("env", "sample", "invert", "interpolate", "generate", "merge", "digest", "tune")
    }
    for name, arguments in commands:
        command = main.commands[name]
        if "--help" in arguments:
            assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
        else:
            command.make_context(name, arguments.split())


def test_readme_s_picture_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    for path in re.findall(r"`((?:examples|fastddim)/[\w/.*]+)`", README):
        assert list(ROOT.glob(path)), path


def test_importing_the_examples_does_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unused"])
    for path in (ROOT / "examples").glob("*.py"):
        if path.stem != "train":
            load_example(path.stem)
    assert not list(tmp_path.iterdir())
