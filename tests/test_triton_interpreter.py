"""The Triton kernels under Triton's own interpreter, in a process of their own.

TRITON_INTERPRET is read where a kernel is defined and holds for the whole process, so the cases are
in tests/interpreter/parity.py, which only this test runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .support.environment import ROOT, needs_extension

pytest.importorskip("triton", reason="Triton is not installed")


@needs_extension
@pytest.mark.parametrize(
    ("selection", "least"),
    [(("-m", "not deep"), 40), pytest.param(("--deep", "-m", "deep"), 70, marks=pytest.mark.deep)],
    ids=["quick", "deep"],
)
def test_the_cases_of_the_interpreter_pass(
    selection: tuple[str, ...], least: int, tmp_path: Path
) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)),
            *(*selection, str(ROOT / "tests/interpreter/parity.py")),
        ],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
    assert "skipped" not in result.stdout
