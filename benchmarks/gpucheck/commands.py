"""Other programs, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The path of this process, and then the folder of `gpucheck`.
PATH = (os.environ.get("PYTHONPATH", ""), str(Path(__file__).resolve().parents[1]))


def output(*words: str, limit: float = 20) -> str:
    """The whole output of a program, or the reason why it did not run to its end."""
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
    """Run a module as a script in a folder, optionally under a tool, and return its exit code; None
    if it was out of time. It prints to the output of this process.
    """
    path = os.pathsep.join(filter(None, (env.pop("PYTHONPATH", ""), *PATH)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **env}
    line = [*under, sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(line, cwd=folder, env=environment, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode
