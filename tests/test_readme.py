"""The README: short, true, and each number in it is measured or defined."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tables
import torch
from click.testing import CliRunner

import fastddim
import fastddim.integrations.diffusers
from fastddim.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
GENERATED = re.compile(r"<!-- ([\w-]+):begin -->\n.*?<!-- \1:end -->", re.DOTALL)

# Numbers of names and definitions, which are not measured.
DEFINED = {
    "2010.02502": "the paper",
    "3.10": "the oldest Python",
    "2.11": "the oldest PyTorch",
    "0": "η",
    "10": "Philox4x32-10",
    "70": "a sample",
    "2.0": "Apache-2.0",
}


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 200
    assert max(map(len, README.splitlines())) < 700


def test_the_table_of_gains_has_at_most_six_rows():
    (block,) = re.findall(r"<!-- gains:begin -->\n(.*?)<!-- gains:end -->", README, re.DOTALL)
    head, rule, *rows = [line for line in block.splitlines() if line.startswith("|")]
    assert set(rule) == {"|", "-"}
    assert head.count("|") == rule.count("|") == 4
    assert 4 <= len(rows) <= 6
    assert "nothing" in rows[-1]


def numbers(text):
    """The numbers of a text, except those within names."""
    return set(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*", text))


def test_every_number_is_measured_or_defined():
    """Measured are those of the generated block, which is that of the result files."""
    assert tables.updated(README, tables.readme()) == README
    prose = re.sub(r"```.*?```", "", GENERATED.sub("", README), flags=re.DOTALL)
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", prose)
    assert numbers(prose) <= set(DEFINED)
    assert not re.search(r"\d ?(?:×|%|µs|ms)|\btimes (?:as|faster)", prose)


def test_numbers_are_found():
    text = "12 times, 1.5× of 3,000; img2img by Philox4x32-10 on an H100"
    assert numbers(text) == {"12", "1.5", "3,000", "10"}


@pytest.fixture(scope="module")
def readme_names():
    """The names that the README's Python code defines, run from top to bottom in one namespace."""
    scheduler = pytest.importorskip("diffusers", reason="diffusers is not installed").DDIMScheduler
    pipe = SimpleNamespace(scheduler=scheduler())
    names = {"torch": torch, "fastddim": fastddim, "pipe": pipe}
    names["model"] = fastddim.models.load("digits")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastddim.images, "save_png", lambda path, x: names.update({path: x}))
        warnings.filterwarnings("error", message="fastddim")
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(code, "README.md", "exec"), names)
    return names


def test_readme_code_runs(readme_names):
    assert isinstance(readme_names["pipe"].scheduler, fastddim.integrations.diffusers.DDIMScheduler)
    assert readme_names["fashion.png"].shape == (4, 1, 28, 28)
    assert readme_names["actions"].shape == (1, 16, 7)
    assert readme_names["actions"].isfinite().all()
    assert readme_names["x"].shape == (2, 1, 28, 28)


def test_each_quick_start_has_some_five_lines():
    quick = README[README.index("## Quick start") : README.index("## Drop-ins")]
    blocks = re.findall(r"```\w+\n(.*?)```", quick, re.DOTALL)
    assert len(blocks) == len(re.findall(r"^\*\*", quick, re.MULTILINE)) == 6
    for block in blocks:
        code = re.sub(r"\n {4}.*\n\)", ")", block)  # a call over several lines is one
        assert len([line for line in code.splitlines() if line.strip()]) <= 6, code


def test_readme_s_five_lines_are_what_sample_computes(readme_names):
    model = fastddim.models.load("digits", dtype=torch.float64)
    x_T = fastddim.philox.initial_latents((4, 1, 8, 8), 0, dtype=torch.float64)
    timesteps = fastddim.select_timesteps(1000, 20).tolist()
    written_out = readme_names["ddim"](model, x_T, timesteps, model.schedule.alphas_cumprod)
    sampled = fastddim.sample(model, timesteps, x_T=x_T)
    torch.testing.assert_close(written_out, sampled, rtol=1e-10, atol=1e-10)


def test_commands_that_pages_show_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # The picture that others are to be like.
    drawn = ["sample", "digits", "--steps", "2", "--out", "digits.png"]
    assert CliRunner().invoke(main, drawn).exit_code == 0
    commands = [
        command
        for text in PAGES.values()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", "").splitlines()
        for command in re.findall(r"^fastddim (\w+)(.*?)(?: *#.*)?$", line)
    ]
    assert {name for name, _ in commands} >= {
        *("env", "sample", "invert", "interpolate", "generate", "merge", "digest", "tune")
    }
    for name, arguments in commands:
        command = main.commands[name]
        if "--help" in arguments:
            assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
        else:
            command.make_context(name, arguments.split())


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", README):
        (path,) = filter(None, target)
        assert path.startswith("https://") or (ROOT / path).exists(), path
    for name, text in PAGES.items():
        written_there = set(re.findall(r'^```python title="([^"]+)"', text, re.MULTILINE))
        for path in set(re.findall(r"`((?:examples|fastddim)/[\w/.*]+)`", text)) - written_there:
            assert list(ROOT.glob(path)), (name, path)
