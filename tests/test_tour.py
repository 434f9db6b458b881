"""The notebook `examples/tour.ipynb` runs and gives the outputs that are committed with it."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import re
import sys

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageSequence

from .support.environment import ROOT
from .support.tour import NOTEBOOK, VARIES, clean, executed, read

COMMITTED = read()
CODE = [cell for cell in COMMITTED.cells if cell.cell_type == "code"]

# What `pip install fastddim` brings, and what a notebook runs in. diffusers is asked for first.
BROUGHT = {"PIL", "fastddim", "torch"}
PRESENT = {"IPython", "diffusers"}

NUMBER = re.compile(r"[0-9a-f]{64}|\d+\.\d+")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook with the outputs of this machine."""
    return executed(COMMITTED, tmp_path_factory.mktemp("tour"))


def images(output):
    """uint8 `[frames, H, W]` of a picture."""
    (name,) = (name for name in output.data if name.startswith("image/"))
    with Image.open(io.BytesIO(base64.b64decode(output.data[name]))) as image:
        frames = [np.array(frame.convert("L")) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames)


def shows_picture(output):
    return any(name.startswith("image/") for name in output.get("data", ()))


def same_text(made, shown):
    """Compare texts. Decimal fractions may differ by one in the last place, since networks round
    differently on each processor.
    """
    if NUMBER.sub("#", made) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(made), NUMBER.findall(shown), strict=True)
    return all(
        a == b
        or (
            "." in a
            and len(a.split(".")[1]) == len(b.split(".")[1])
            and abs(int(a.replace(".", "")) - int(b.replace(".", ""))) <= 1
        )
        for a, b in pairs
    )


def same_picture(made, shown):
    """Compare pictures. Levels may differ by one: the error of float32 is a small part of a level,
    and is seen only where a number lies between two levels.
    """
    return made.shape == shown.shape and np.abs(made.astype(int) - shown.astype(int)).max() <= 1


def same_output(made, shown, *, varies=False):
    if made.output_type != shown.output_type or shows_picture(made) != shows_picture(shown):
        return False
    if shows_picture(made):
        return same_picture(images(made), images(shown))
    texts = [it.text if "text" in it else it.data["text/plain"] for it in (made, shown)]
    if varies:
        texts = [re.sub(r" +#", "#", NUMBER.sub("#", text)) for text in texts]
    return same_text(*texts)


def test_every_cell_runs_and_warns_of_nothing(ran):
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(CODE) + 1))
    told = [(cell.id, it) for cell in code for it in cell.outputs if it.get("name") == "stderr"]
    assert told == []


@pytest.mark.parametrize("cell", CODE, ids=[cell.id for cell in CODE])
def test_outputs_are_those_committed(ran, cell):
    (made,) = (it.outputs for it in ran.cells if it.id == cell.id)
    assert len(made) == len(cell.outputs)
    varies = VARIES in cell.metadata.get("tags", ())
    for one, other in zip(made, cell.outputs, strict=True):
        assert same_output(one, other, varies=varies), (one.get("text"), other.get("text"))


def test_the_comparison_sees_another_text():
    assert same_text("order 1: 0.194 True", "order 1: 0.195 True")
    assert same_text("without: -1.04", "without: -1.05")
    for other in ("0.196 True", "0.194 False", "0.1940 True", "0.194 True 1", "1 True"):
        assert not same_text("0.194 True", other), other
    assert not same_text("20 steps", "21 steps")
    assert not same_text("a" * 64, "b" * 64)


def test_the_comparison_sees_another_picture():
    cells = [cell for cell in CODE if any(map(shows_picture, cell.outputs))]
    assert len(cells) > 10
    for cell in cells:
        levels = images(cell.outputs[-1])
        near, far = levels.copy(), levels.copy()
        near[-1, -9, -9] ^= 1
        far[-1, -9, -9] ^= 2
        assert same_picture(near, levels)
        assert not same_picture(far, levels)
        assert not same_picture(levels[:, :-1], levels)
    film = next(images(cell.outputs[0]) for cell in CODE if cell.id == "gif")
    assert len(film) == 21
    assert not same_picture(film[:-1], film)


def test_the_file_is_clean():
    nbformat.validate(COMMITTED)
    assert NOTEBOOK.stat().st_size < 600_000
    assert clean(COMMITTED) == COMMITTED
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    text = json.dumps(COMMITTED)
    for leaked in (str(ROOT), "site-packages", "/tmp", "/home", "stderr"):
        assert leaked not in text, leaked


def test_what_would_change_at_each_run_is_removed():
    notebook = read()
    cell = next(cell for cell in notebook.cells if cell.id == "samples")
    cell.metadata["execution"] = {"iopub.execute_input": "2020-01-01T00:00:00Z"}
    cell.outputs[0].data["image/jpeg"] = "AAAA"
    notebook.metadata["language_info"]["version"] = "3.10.0"
    assert notebook != COMMITTED
    assert clean(notebook) == COMMITTED


def test_it_needs_what_pip_installs_and_no_more():
    trees = [ast.parse(cell.source) for cell in CODE]
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names >= BROUGHT
    assert names - set(sys.stdlib_module_names) == BROUGHT | PRESENT


def test_it_says_where_diffusers_is_missing(monkeypatch, capsys):
    (cell,) = (cell for cell in CODE if cell.id == "diffusers")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name)
    )
    exec(compile(cell.source, cell.id, "exec"), {})
    assert capsys.readouterr().out == "diffusers is not installed: pip install diffusers\n"


def test_links_lead_to_pages():
    text = "\n".join(cell.source for cell in COMMITTED.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    pages = [link for link in links if not link.startswith("https://")]
    assert len(pages) >= 5
    for page in pages:
        assert (NOTEBOOK.parent / page).resolve().is_file(), page
