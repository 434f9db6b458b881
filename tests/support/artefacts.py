"""Outputs of C++ compilers and nvcc for tests, made once for all workers and later
runs.

An artefact is found again by all that it was made of: the command, the compiler's version, and the
contents of every file that the compiler read, which it lists itself (`-MD`). A change of any of
them compiles anew, so that no test runs old code.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .environment import ROOT

FOLDER = ROOT / "build" / "tests"


def compiled(
    compiler: str | Path,
    source: Path,
    flags: Sequence[str],
    *,
    suffix: str = "",
    tree: Path = ROOT,
) -> Path:
    """The file that `compiler` makes of one source with `flags`; not to be changed.

    What is linked does not count: a compiler lists no libraries and objects.

    Args:
        suffix: of the file's name, for programs that ask for one.
        tree: a folder above the source and its headers. Where it lies makes no difference, so that
            copies with the same changes share what is made of them.
    """
    command = [str(compiler), *flags, str(source.relative_to(tree))]
    asked = digest(version(str(compiler)), *command, source.read_bytes())
    with locked(asked):
        listed = FOLDER / f"{asked}.json"
        if listed.exists():
            made = artefact(asked, tree, json.loads(listed.read_text()), suffix)
            if made is not None and made.exists():
                return made
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            output, rule, names = (Path(folder) / name for name in ("made", "rule", "names"))
            subprocess.run(
                [*command, "-o", str(output), "-MD", "-MF", str(rule)], cwd=tree, check=True
            )
            read = prerequisites(rule.read_text())
            made = artefact(asked, tree, read, suffix)
            assert made is not None, f"{rule.read_text()} lists a file that is not there"
            names.write_text(json.dumps(read))
            # Whole or not at all, also where the run is killed.
            output.replace(made)
            names.replace(listed)
        return made


def artefact(asked: str, tree: Path, read: Iterable[str], suffix: str) -> Path | None:
    """The path of the artefact that a command makes of these files in their present state; None if
    one is gone.
    """
    files = [tree / name for name in sorted(read)]
    if not all(file.is_file() for file in files):
        return None
    contents = (part for file in files for part in (file.name, file.read_bytes()))
    return FOLDER / f"{digest(asked, *contents)}{suffix}"


def prerequisites(rule: str) -> list[str]:
    """The files right of the colon of a rule for make."""
    _, _, right = rule.replace("\\\n", " ").partition(": ")
    names = right.replace("\\ ", "\0").split()
    return sorted({name.replace("\0", " ") for name in names})


def digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(f"{len(data)} ".encode() + data)
    return found.hexdigest()


@functools.cache
def version(compiler: str) -> str:
    path = shutil.which(compiler)
    assert path is not None, f"there is no {compiler}"
    told = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    return f"{Path(path).resolve()}\n{told}"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """A lock that one process holds at a time, and that is released if that process is killed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(FOLDER / f"{name}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
