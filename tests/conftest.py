"""Every test starts from the same seeds, with uninitialised memory poisoned.

Workers of pytest-xdist compute in one thread each, and tests marked `deep` run where asked for.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from harness import machine, version_of

from .support.environment import RunPython, Some

# The same examples in every run, and no time asserted: a slow machine is not a failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


# Settings that make this processor stand in for others.
STAND_INS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR")
OUTCOMES = ("passed", "skipped", "failed", "error")


# Files of a few tests that take long, the longest first. By the number of their tests, as
# pytest-xdist orders files, they would come last, and one worker would wait for another.
LONG = (
    "test_cuda_host.py",
    "test_cuda_ptx.py",
    "test_compile_sampling.py",
    "test_packaging.py",
    "test_cuda_build.py",
    "test_triton_interpreter.py",
    "test_setup.py",
    "test_first_hour.py",
    "test_cuda_mutants.py",
)


# How many deep tests a run leaves out; of workers, which all collect the same, the most.
LEFT_OUT = pytest.StashKey[int]()


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", type=Path, help="the file that the versions and the number of tests go into"
    )
    parser.addoption("--deep", action="store_true", help="run the tests marked `deep` too")


def pytest_configure(config: pytest.Config) -> None:
    """Gives one thread to each worker, and to the processes that its tests start. Workers with
    several threads wait for each other.
    """
    config.stash[LEFT_OUT] = 0
    if config.getoption("numprocesses", None):
        # Inherited by the workers, which start later.
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if is_worker(config):
        torch.set_num_threads(1)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash[LEFT_OUT]:
        terminalreporter.write_sep(
            "=", f"deep tests left to `make test-deep` (pytest --deep): {config.stash[LEFT_OUT]}"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Exempts the controller of workers, which collects nothing itself."""
    stash = node.config.stash
    stash[LEFT_OUT] = max(stash[LEFT_OUT], getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if is_worker(session.config):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]
        return
    path: Path | None = session.config.getoption("--record")
    if path is None:
        return
    outcomes = session.config.pluginmanager.getplugin("terminalreporter").stats
    result = {
        "machine": {
            **machine(),
            "transformers": version_of("transformers"),
            "triton": version_of("triton"),
        },
        "settings": {name: os.environ[name] for name in STAND_INS if name in os.environ},
        "tests": {name: len(outcomes.get(name, [])) for name in OUTCOMES},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--deep"):
        deep = [item for item in items if item.get_closest_marker("deep")]
        config.stash[LEFT_OUT] = len(deep)
        config.hook.pytest_deselected(items=deep)
        items[:] = [item for item in items if not item.get_closest_marker("deep")]
    if is_worker(config):
        tests = Counter(item.path for item in items)
        place = {path: LONG.index(path.name) if path.name in LONG else len(LONG) for path in tests}
        items.sort(key=lambda item: (place[item.path], -tests[item.path], item.path))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and none is available"))


@pytest.fixture
def some(pytestconfig: pytest.Config) -> Some:
    """Some of the cases of a product: each test has its own, by `others`, so that together the
    tests take them all. With `--deep`, `deep` of them, or all.
    """

    def choose(
        cases: Iterable[Any], *others: Any, quick: int, deep: int | None = None
    ) -> list[Any]:
        every = list(cases)
        count = quick if not pytestconfig.getoption("--deep") else deep or len(every)
        return random.Random(str(others)).sample(every, count)

    return choose


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills the memory of `empty` and its relatives with NaN, or the largest integer, until it is
    written.

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
