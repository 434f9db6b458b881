"""Every test starts from the same seeds, with uninitialised memory poisoned."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from harness import machine, version_of

from .support.environment import RunPython

# The same examples in every run, and no time asserted: a slow machine is not a failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


# Settings that make this processor stand in for others.
STAND_INS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR")
OUTCOMES = ("passed", "skipped", "failed", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", type=Path, help="the file that the versions and the number of tests go into"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--record")
    if path is None:
        return
    outcomes = session.config.pluginmanager.getplugin("terminalreporter").stats
    result = {
        "machine": {**machine(), "triton": version_of("triton")},
        "settings": {name: os.environ[name] for name in STAND_INS if name in os.environ},
        "tests": {name: len(outcomes.get(name, [])) for name in OUTCOMES},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is available"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What `empty` and its relatives return holds NaN, or the largest integer, until it is written.

    torch does this itself in deterministic mode (`torch.utils.deterministic`), below its Python
    interface, so that an output allocated in C++ is poisoned as well.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run this Python in a new process, with no PYTHON* variable but those in `env`.

    The caller judges the result, which holds stdout and stderr.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(
        *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**inherited, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
