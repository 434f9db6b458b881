"""The site as `make docs` builds it, built once for all workers and later runs."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import artefacts
from .environment import ROOT

FOLDER = artefacts.FOLDER / "sites"
READ = ("mkdocs.yml", "README.md", "fastddim_command.py", "docs", "fastddim", "kernels")
"""Files and folders that the build reads."""
KEPT = 24 * 60 * 60
"""Seconds for which a site that no run asks for stays."""


@functools.cache
def built() -> Path:
    """The folder of the site, found again by what it is made of; not to be changed."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    made = FOLDER / artefacts.digest(*sources(), *builders())
    with artefacts.locked("sites"):
        if not made.exists():
            FOLDER.mkdir(exist_ok=True)
            forget()
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                build(Path(folder, "site"))
                # Whole or not at all, also where the run is killed.
                Path(folder, "site").rename(made)
        made.touch()
    return made


def sources() -> Iterator[str | bytes]:
    """The name and the content of every file that the build reads."""
    for name in READ:
        place = ROOT / name
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        for file in files:
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                yield str(file.relative_to(ROOT))
                yield file.read_bytes()


def builders() -> Iterator[str]:
    """The versions of Python and of the packages that build the site."""
    yield sys.version
    for requirement in importlib.metadata.requires("fastddim") or ():
        if 'extra == "docs"' in requirement:
            (name,) = re.findall(r"^[\w.-]+", requirement)
            yield f"{name} {importlib.metadata.version(name)}"


def build(folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def forget() -> None:
    """Remove the sites that no run has asked for lately."""
    for site in FOLDER.iterdir():
        if time.time() - site.stat().st_mtime > KEPT:
            shutil.rmtree(site)
