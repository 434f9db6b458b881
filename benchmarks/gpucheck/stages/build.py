"""An installation from source on this machine: its end, and a check of the result."""

from __future__ import annotations

import time

from gpucheck import building
from gpucheck.commands import python
from gpucheck.record import Record
from gpucheck.settings import Settings

POLL = 0.2
SHARE = 0.9


def run(record: Record, settings: Settings) -> None:
    deadline = time.monotonic() + settings.seconds * SHARE
    while (code := building.exit_code(settings.work)) is None:
        if time.monotonic() > deadline:
            record.problem(build="not done yet")
            return
        time.sleep(POLL)
    tail = building.log(settings.work)[-1500:]
    (record.problem if code else record.show)(exit_code=code, log=tail)
    if code:
        return
    # A rehearsal builds without the compiled kernels, and only imports the package.
    implementations = ("cuda",) if not settings.dry else ()
    works = python(
        "gpucheck.cases",
        str(settings.device),
        *implementations,
        folder=settings.work,
        limit=max(deadline - time.monotonic(), 1),
        PYTHONPATH=str(building.target(settings.work)),
    )
    (record.problem if works else record.show)(built_package_exit_code=works)
