"""The GPU tests of captured loops and of the process, without compiled models."""

from __future__ import annotations

from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.suite import run_tests


def run(record: Record, settings: Settings) -> None:
    tests = settings.root / "tests"
    files = ["test_process.py"] if settings.dry else ["test_graph.py", "test_process.py"]
    paths = [str(tests / file) for file in files]
    run_tests(record, settings, *paths, "-m", "gpu", "-k", "not compiled")
