"""Other programs, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# As this process was started, and then the folder of `gpucheck`.
PATH = (os.environ.get("PYTHONPATH", ""), str(Path(__file__).resolve().parents[1]))


def output(*words: str, limit: float = 20) -> str:
    """Everything that a program prints, or why it could not be run to its end."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=limit, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()


def python(
    module: str,
    *arguments: str,
    folder: Path,
    limit: float,
    under: tuple[str, ...] = (),
    **env: str,
) -> int | None:
    """The exit code of a module that is run as a script in a folder, under a tool where one is
    given. It prints where this process prints. None: it was out of time.
    """
    path = os.pathsep.join(filter(None, (env.pop("PYTHONPATH", ""), *PATH)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **env}
    line = [*under, sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(line, cwd=folder, env=environment, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode
