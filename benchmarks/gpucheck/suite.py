"""Tests of the package, run by pytest in a process of its own and counted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpucheck.record import Record
from gpucheck.settings import Settings

SHOWN_FAILURES = 12
TEST_SECONDS = 60
# The share of the stage's limit for the tests; the rest is for reading the report.
SHARE = 0.93


@dataclass(frozen=True)
class Counts:
    """A report of pytest: names of tests that passed, (name, message) of the others."""

    passed: list[str]
    failed: list[tuple[str, str]]
    skipped: list[tuple[str, str]]


def read(report: Path) -> Counts:
    """The counts in a JUnit XML report; an error while collecting is a failure."""
    counts = Counts([], [], [])
    for case in ET.parse(report).getroot().iter("testcase"):
        name = case.get("name", "")
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = [child for child in case if child.tag == "skipped"]
        if bad:
            counts.failed.append((name, bad[0].get("message", "")))
        elif skipped:
            counts.skipped.append((name, skipped[0].get("message", "")))
        else:
            counts.passed.append(name)
    return counts


def run_tests(
    record: Record, settings: Settings, *words: str, needed: Sequence[str] = ("",)
) -> None:
    """Run pytest. Failures are problems, and on a GPU also each word of `needed` that is in the
    name of no test that passed.
    """
    if importlib.util.find_spec("pytest") is None:
        record.lacks("the Python package pytest")
        return
    report = settings.work / "report.xml"
    report.unlink(missing_ok=True)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    line += ["--rootdir", str(settings.root), "-c", str(settings.root / "pyproject.toml")]
    line += ["--junitxml", str(report), *words]
    if importlib.util.find_spec("pytest_timeout") is not None:
        line += ["--timeout", str(TEST_SECONDS)]
    try:
        subprocess.run(line, timeout=settings.seconds * SHARE, check=False)
    except subprocess.TimeoutExpired:
        record.problem(tests="out of time, so that there is no report; log.txt has the rest")
        return
    if not report.exists():
        record.problem(tests="pytest left no report; log.txt says why")
        return
    judge(record, read(report), () if settings.dry else needed)


def judge(record: Record, counts: Counts, needed: Sequence[str]) -> None:
    """Record the counts, and the problems among them."""
    reasons = sorted({message[:120] for _, message in counts.skipped})
    record.show(
        passed=len(counts.passed),
        failed=len(counts.failed),
        skipped=len(counts.skipped),
        why_skipped=reasons,
    )
    for name, message in counts.failed[:SHOWN_FAILURES]:
        record.problem(test=name, message=message[:400])
    for word in needed:
        if not any(word in name for name in counts.passed):
            record.problem(tests=f"no test with {word!r} in its name passed")
