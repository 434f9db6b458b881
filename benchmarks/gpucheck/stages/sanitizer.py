"""memcheck over a few updates, with an allocation of its own for every tensor."""

from __future__ import annotations

from gpucheck.memcheck import memcheck, tool
from gpucheck.record import Record
from gpucheck.settings import Settings


def run(record: Record, settings: Settings) -> None:
    if not settings.dry and tool() is None:
        record.lacks("compute-sanitizer")
        return
    log = settings.out / "memcheck.txt"
    limit = settings.seconds * 0.9
    wrong = memcheck(settings.implementations, settings.device, log, limit)
    if wrong is None:
        record.show(memcheck="nothing found", implementations=settings.implementations)
    else:
        record.problem(memcheck=wrong)
