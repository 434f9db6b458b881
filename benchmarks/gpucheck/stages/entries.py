"""The GPU tests of every entry point for users, bit for bit against the CPU."""

from __future__ import annotations

from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.suite import run_tests


def run(record: Record, settings: Settings) -> None:
    run_tests(record, settings, str(settings.root / "tests" / "test_gpu_entries.py"))
