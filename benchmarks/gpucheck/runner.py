"""Runs stages one after the other, each in its own process group and with its own limit.

The parent has imported what the stages use and never touches CUDA, so a forked stage starts at
once. For a stage that needs a new interpreter, and for every stage if a fork would find no device,
this module is run as a script.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from gpucheck.record import FAILED, LACKING, OK, RUNNER, Record
from gpucheck.settings import Settings
from gpucheck.table import Stage

PACKAGE = "gpucheck.stages"
LOG = "log.txt"
RESULTS = {OK: "ok", FAILED: "failed", LACKING: "lacking"}

# Seconds of the time limit that are left for the summary and the result file.
RESERVE = 3.0
# Seconds before its limit at which a stage writes into the log where it hangs.
TRACEBACK = 3.0
POLL = 0.05
# A process that waits for a device may never end after a kill.
REAP = 2.0


@dataclass(frozen=True)
class Outcome:
    """The end of a stage.

    `result` is "ok", "failed", "lacking", "out of time", "not begun" or "killed by SIG…".
    """

    name: str
    result: str
    seconds: float


def run_all(
    stages: Sequence[Stage],
    settings: Settings,
    seconds: float,
    said: Callable[[Outcome], None],
    package: str = PACKAGE,
) -> list[Outcome]:
    """Run the stages within `seconds` of `settings.began`; call `said` at the end of each."""
    record = Record(settings.out, RUNNER, settings.began)
    outcomes = []
    for stage in stages:
        left = settings.began + seconds - RESERVE - time.time()
        outcome = Outcome(stage.name, "not begun", 0.0)
        if left >= stage.least:
            record.row(begins=stage.name)
            limited = dataclasses.replace(settings, seconds=min(stage.limit, left))
            start = time.monotonic()
            result = run_one(stage, limited, package)
            outcome = Outcome(stage.name, result, round(time.monotonic() - start, 2))
        record.row(ends=stage.name, result=outcome.result, seconds=outcome.seconds)
        outcomes.append(outcome)
        said(outcome)
    return outcomes


def run_one(stage: Stage, settings: Settings, package: str = PACKAGE) -> str:
    """Run a stage in a process group of its own, end that group, and return how it ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(stage, settings, f"{package}.{stage.name}")
    try:
        status = _awaited(pid, settings.seconds)
    finally:
        # This also ends processes that the stage started and left behind.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    if status is None:
        _awaited(pid, REAP)
        return "out of time"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return RESULTS.get(os.WEXITSTATUS(status), "failed")


def _awaited(pid: int, seconds: float) -> int | None:
    """The wait status of a child, or None if it still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL)


def _become(stage: Stage, settings: Settings, module: str) -> None:
    """Turn a forked process into the stage; does not return."""
    code = FAILED
    try:
        os.setsid()
        log = os.open(settings.out / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(log, f"\n===== {stage.name}\n".encode())
        os.dup2(log, 1)
        os.dup2(log, 2)
        if stage.fresh or _fork_is_bad():
            script = [sys.executable, "-m", __name__, module, stage.name, settings.to_json()]
            os.execv(sys.executable, script)
        code = run_here(module, stage.name, settings)
    except BaseException:
        traceback.print_exc()
    finally:
        # The interpreter is not shut down, since a device in a bad state could hang it.
        os._exit(code)


def _fork_is_bad() -> bool:
    """Tell whether CUDA was already asked for its devices: after a fork it has none then."""
    return bool(getattr(torch._C, "_cuda_isInBadFork", bool)())


def run_here(module: str, name: str, settings: Settings) -> int:
    """Run a stage in this process, and return its exit code."""
    record = Record(settings.out, name, settings.began)
    faulthandler.dump_traceback_later(max(settings.seconds - TRACEBACK, 1), exit=False)
    try:
        importlib.import_module(module).run(record, settings)
    except ModuleNotFoundError as error:
        record.lacks_module(error)
    except BaseException as error:
        traceback.print_exc()
        record.problem(error=f"{type(error).__name__}: {str(error)[:600]}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return record.code


def main() -> None:
    module, name, settings = sys.argv[1:]
    os._exit(run_here(module, name, Settings.from_json(settings)))


if __name__ == "__main__":
    main()
