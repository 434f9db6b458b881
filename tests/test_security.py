"""SECURITY.md says what the package does: it unpickles nothing, reads no other kind of picture than
PNG, opens no connection and starts no process.
"""

from __future__ import annotations

import ast
import importlib
import io
import os
from pathlib import Path

import numpy as np
import pytest

import fastddim
from fastddim.runs.archives import decode_npz

from .support.environment import ROOT

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SOURCES = [
    *sorted((ROOT / "fastddim").rglob("*.py")),
    *sorted((ROOT / "kernels").rglob("*.py")),
    ROOT / "fastddim_command.py",
]


NODES = [
    (path.relative_to(ROOT), node)
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
]
CALLS = [(path, node) for path, node in NODES if isinstance(node, ast.Call)]


def name_of(call):
    """The last two parts of the name that is called, such as `np.load`."""
    return ".".join(ast.unparse(call.func).split(".")[-2:])


def keywords_of(name):
    """Those of each call of a name, as they are written."""
    return [
        {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        for _, call in CALLS
        if name_of(call) == name
    ]


def imported():
    """The packages that the package imports."""
    for _, node in NODES:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_package_unpickles_nothing():
    unsafe = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}
    assert [(path, name_of(call)) for path, call in CALLS if name_of(call) in unsafe] == []
    assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & set(imported())
    loads = keywords_of("np.load")
    assert len(loads) >= 3
    assert all(keywords["allow_pickle"] == "False" for keywords in loads)


def test_pictures_are_read_as_png_alone():
    opened = keywords_of("Image.open")
    assert opened
    assert all(keywords["formats"] == "['PNG']" for keywords in opened)


def test_models_of_diffusers_are_read_from_the_disk_as_safetensors():
    loads = keywords_of("unet_class.from_pretrained")
    assert loads
    assert len(loads) == sum(name_of(call).endswith(".from_pretrained") for _, call in CALLS)
    for keywords in loads:
        assert (keywords["use_safetensors"], keywords["local_files_only"]) == ("True", "True")


def test_the_package_opens_no_connection_and_starts_no_process():
    packages = {"asyncio", "ftplib", "http", "httpx", "huggingface_hub", "multiprocessing"}
    packages |= {"requests", "smtplib", "socket", "socketserver", "subprocess", "telnetlib"}
    assert not packages & set(imported())
    calls = {name_of(call).split(".")[-1] for _, call in CALLS}
    assert not {"urlopen", "urlretrieve", "system", "popen", "execv", "fork"} & calls


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def harmful(tmp_path):
    """The content of an `.npz` file with a pickle in it, and what it would make."""
    made, buffer = tmp_path / "made", io.BytesIO()
    content = np.empty(1, dtype=object)
    content[0] = Harmful(made)
    np.savez(buffer, arr_0=content, arr_1=content, latents=content)
    return buffer.getvalue(), made


def test_the_harmful_file_is_harmful(harmful):
    content, made = harmful
    with np.load(io.BytesIO(content), allow_pickle=True) as archive:
        archive["arr_0"]
    assert made.is_dir()


def test_a_pickle_in_an_archive_of_samples_is_refused(harmful):
    content, made = harmful
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_npz(content, labelled=False)
    assert not made.exists()


@pytest.mark.parametrize("name", ["classes", "files"])
def test_a_pickle_in_an_archive_of_the_command_line_is_refused(name, harmful, tmp_path):
    content, made = harmful
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    module = importlib.import_module(f"fastddim.cli.{name}")
    arguments = (path, "latents") if name == "files" else (path,)
    with pytest.raises(Exception, match="allow_pickle"):
        module._read_array(*arguments)
    assert not made.exists()


def test_the_limit_of_tuned_steps_is_the_one_stated(tmp_path):
    assert "at most 16 MiB" in SECURITY
    path = tmp_path / "steps.json"
    path.write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(ValueError, match=f"at most {16 * 2**20} bytes"):
        fastddim.load_steps(path)
