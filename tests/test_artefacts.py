"""Outputs of compilers are kept, and made anew when one of their inputs changes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from .support import artefacts
from .support.environment import COMPILER, needs_compiler

pytestmark = needs_compiler

SOURCE = '#include "inner/number.h"\nextern "C" int number() { return NUMBER + MORE; }\n'


class Tree:
    """Sources that may change, and a compiler that counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._compiler, self._runs = folder.with_name("compiler"), folder.with_name("runs")
        (folder / "inner").mkdir(parents=True)
        self.write("number.cpp", SOURCE)
        self.write("inner/number.h", "#define NUMBER 4\n")
        self.change_compiler(COMPILER)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def change_compiler(self, version: str) -> None:
        self._compiler.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo {version}; exit; fi\n'
            f'echo >> {self._runs}\nexec {COMPILER} "$@"\n'
        )
        self._compiler.chmod(0o755)
        artefacts.version.cache_clear()

    @property
    def runs(self) -> int:
        return len(self._runs.read_text()) if self._runs.exists() else 0

    def number(self, more: int = 1) -> int:
        """The number in the library that is compiled of the present sources."""
        flags = ["-shared", "-fPIC", f"-DMORE={more}"]
        made = artefacts.compiled(
            self._compiler, self.folder / "number.cpp", flags, tree=self.folder
        )
        return int(ctypes.CDLL(str(made)).number())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(artefacts, "FOLDER", tmp_path / "artefacts")
    return Tree(tmp_path / "tree")


def test_what_does_not_change_is_made_once(tree: Tree) -> None:
    assert [tree.number() for _ in range(3)] == [5, 5, 5]
    assert tree.runs == 1


def test_a_changed_source_is_compiled(tree: Tree) -> None:
    assert tree.number() == 5
    tree.write("number.cpp", SOURCE.replace("NUMBER +", "10 * NUMBER +"))
    assert tree.number() == 41
    tree.write("number.cpp", SOURCE)
    assert (tree.number(), tree.runs) == (5, 2)


def test_a_changed_header_is_compiled(tree: Tree) -> None:
    assert tree.number() == 5
    tree.write("inner/number.h", "#define NUMBER 7\n")
    assert tree.number() == 8


def test_a_header_of_a_header_counts(tree: Tree) -> None:
    """A header of a header counts, even if it was no part of the first compilation."""
    assert tree.number() == 5
    tree.write("inner/number.h", '#include "other.h"\n')
    tree.write("inner/other.h", "#define NUMBER 8\n")
    assert tree.number() == 9
    tree.write("inner/other.h", "#define NUMBER 9\n")
    assert tree.number() == 10


def test_a_header_that_is_gone_is_an_error(tree: Tree) -> None:
    assert tree.number() == 5
    (tree.folder / "inner/number.h").unlink()
    with pytest.raises(subprocess.CalledProcessError):
        tree.number()


def test_flags_count(tree: Tree) -> None:
    assert [tree.number(more) for more in (1, 2, 1)] == [5, 6, 5]
    assert tree.runs == 2


def test_the_compiler_counts(tree: Tree) -> None:
    assert tree.number() == 5
    tree.change_compiler("newer")
    assert (tree.number(), tree.runs) == (5, 2)


def test_a_file_of_the_same_time_and_size_counts(tree: Tree) -> None:
    header = tree.folder / "inner/number.h"
    assert tree.number() == 5
    before = header.stat()
    tree.write("inner/number.h", "#define NUMBER 6\n")
    os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tree.number() == 7


def test_copies_share_what_is_made_of_them(tree: Tree, tmp_path: Path) -> None:
    assert tree.number() == 5
    tree.folder = shutil.copytree(tree.folder, tmp_path / "copy")
    assert (tree.number(), tree.runs) == (5, 1)
    tree.write("inner/number.h", "#define NUMBER 5\n")
    assert (tree.number(), tree.runs) == (6, 2)


def test_one_of_several_processes_compiles(tree: Tree) -> None:
    """One of several processes compiles, and the others wait: locks of one file exclude each other
    within a process as well.
    """
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(tree.number())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [5] * 4
    assert tree.runs == 1


def test_a_failed_compilation_leaves_nothing(tree: Tree) -> None:
    tree.write("number.cpp", "no source")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            tree.number()
    tree.write("number.cpp", SOURCE)
    assert tree.number() == 5
