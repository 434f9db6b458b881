"""An installation from source, as a user would do it, in the background of the other stages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from gpucheck.settings import Settings

SOURCES = ("csrc", "fastddim", "kernels")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
LIMIT = 300

# With `nice`, since other stages measure times meanwhile.
SCRIPT = f"""
nice -n 15 timeout {LIMIT} "$0" -m pip install -q --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check --target "$1" . > build.log 2>&1
echo $? > build.rc.part && mv build.rc.part build.rc
"""


def begin(settings: Settings) -> subprocess.Popen[bytes]:
    """Begin to install a copy of the sources into `target(settings.work)`."""
    folder = settings.work / "build"
    folder.mkdir()
    copy_sources(settings.root, folder)
    # A rehearsal does not compile.
    extra = {"FASTDDIM_BUILD_EXT": "0"} if settings.dry else {}
    return subprocess.Popen(
        ["sh", "-c", SCRIPT, sys.executable, str(target(settings.work))],
        cwd=folder,
        env={**os.environ, **extra},
        start_new_session=True,
    )


def copy_sources(root: Path, folder: Path) -> None:
    """Copy the files that an installation needs, without earlier results of a build."""
    for name in SOURCES:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(root / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(root / name, folder)


def end(build: subprocess.Popen[bytes]) -> None:
    """Stop the installation, if it still runs."""
    with suppress(ProcessLookupError):
        os.killpg(build.pid, signal.SIGKILL)
    build.wait()


def target(work: Path) -> Path:
    return work / "built"


def exit_code(work: Path) -> int | None:
    """The exit code of the installation, or None while it runs."""
    file = work / "build" / "build.rc"
    return int(file.read_text()) if file.exists() else None


def log(work: Path) -> str:
    return (work / "build" / "build.log").read_text(errors="replace")
