"""The check itself: `python -m gpucheck.run OUT SECONDS`, started by run.sh.

Prints one line for each stage when it ends, then the findings of the stages. The exit code is 1
unless every requested stage is "ok" or only lacked something.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpucheck import building, record, results, runner
from gpucheck.provenance import provenance
from gpucheck.record import RUNNER, Record
from gpucheck.runner import Outcome
from gpucheck.settings import Settings
from gpucheck.table import Stage, select

ROOT = Path(__file__).resolve().parents[2]
# A rehearsal is no faster than its machine, which may do other work.
DRY_PATIENCE = 20
# Parts of diffusers to import once, for all stages; diffusers imports its parts on first use.
DIFFUSERS = ("DDIMScheduler", "DDPMScheduler", "UNet2DConditionModel", "UNet2DModel")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpucheck", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("seconds", type=float, help="time limit of the whole check")
    parser.add_argument("--stages", default="", help="names with commas; default: all")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU in tiny sizes")
    parser.add_argument("--work", type=Path, required=True, help="folder for scratch files")
    parsed = parser.parse_args()
    try:
        stages = select(parsed.stages)
    except ValueError as error:
        parser.error(str(error))
    patience = DRY_PATIENCE if parsed.dry else 1
    parsed.stages = [replace(stage, limit=stage.limit * patience) for stage in stages]
    return parsed


def import_all(stages: Sequence[Stage]) -> None:
    """Import the modules that the stages use, if they exist; a stage itself says what it lacks."""
    for stage in stages:
        if not stage.fresh:
            _attempt(partial(importlib.import_module, f"{runner.PACKAGE}.{stage.name}"))
    for name in DIFFUSERS:
        _attempt(partial(_part_of_diffusers, name))


def _part_of_diffusers(name: str) -> Any:
    return getattr(importlib.import_module("diffusers"), name)


def _attempt(load: Callable[..., Any]) -> None:
    try:
        load()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)


def line(outcome: Outcome) -> str:
    return f"{outcome.name:12} {outcome.result:18} {outcome.seconds:6.1f} s"


def summary(out: Path, start: int, outcomes: list[Outcome]) -> None:
    """Print the findings for the summary, in the record from a byte on, then the stages again."""
    print("\n----- findings")
    for row in record.lines(out, start):
        if row.pop("show", False):
            print(row["stage"], {k: v for k, v in row.items() if k not in ("stage", "at")})
    print("\n----- stages")
    for outcome in outcomes:
        print(line(outcome))


def main() -> int:
    began = time.time()
    # A limit from outside also ends the stage, through the runner's `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.out.resolve(), ROOT, options.work.resolve(), options.dry, began)
    start = record.size(options.out)
    about = Record(options.out, RUNNER, began)
    about.row(machine=provenance(settings.dry))
    build = building.begin(settings) if "build" in {s.name for s in options.stages} else None
    try:
        import_all(options.stages)
        about.row(imported_after=round(time.time() - began, 2))
        outcomes = runner.run_all(
            options.stages,
            settings,
            options.seconds,
            lambda outcome: print(line(outcome), flush=True),
        )
    finally:
        if build is not None:
            building.end(build)
    summary(options.out, start, outcomes)
    print(f"\n{results.write(results.gather([options.out]), options.out)}")
    return int(any(outcome.result not in ("ok", "lacking") for outcome in outcomes))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # The interpreter is not shut down, since that may wait for threads of imported modules.
    os._exit(code)
