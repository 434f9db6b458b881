"""tests/test_gpu.py: every path of the kernels, bit for bit against the CPU."""

from __future__ import annotations

from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.suite import run_tests


def run(record: Record, settings: Settings) -> None:
    chosen = "test_advance" if settings.dry else "not sanitizer"
    tests = str(settings.root / "tests" / "test_gpu.py")
    run_tests(record, settings, tests, "-k", chosen, needed=settings.implementations)
