"""Timing in pairs: every contender runs once a round, so that a slow moment affects them all."""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def case_id(*parts: object) -> str:
    """The name of a case, in ASCII and without spaces: easy to type for `pytest -k`.

    Args:
        parts: names, and shapes as tuples of numbers.
    """
    words = ["x".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in parts]
    text = re.sub(r"[()]", "", "-".join(words))
    return re.sub(r"[^\w.+]+", "-", text, flags=re.ASCII).strip("-")


@dataclass
class Timing:
    """Seconds a call, and the ratio to the baseline in the same round: median, 20th and 80th
    percentile.
    """

    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


# All files that a report writes itself.
WRITTEN = (
    *("README.md", "benchmarks/results", "docs/figures"),
    *("docs/gpu.md", "docs/third-party.md", "docs/tune.md", "docs/versions.md"),
    *(f"docs/results/{page}.md" for page in ("policy-speed", "policy-success", "quality", "speed")),
    "docs/tasks/latents.md",
)
MEASURED = (".", *(f":(exclude){place}" for place in WRITTEN))

# Seconds from which on the clock's own cost is negligible.
SHORTEST = 5e-4
# Seconds from which on traces of the contender before are negligible: spinning threads, caches.
SETTLED = 1e-2


def compare(
    contenders: dict[str, Callable[[], Any]],
    baseline: str,
    *,
    budget: float = 1.5,
    least: int = 7,
    shortest: float = SHORTEST,
) -> dict[str, Timing]:
    """Time all contenders in turn, as `in_turn` does, and compare them with one of them."""
    seconds = in_turn(contenders, budget=budget, least=least, shortest=shortest)
    return {name: against(values, seconds[baseline]) for name, values in seconds.items()}


def in_turn(
    contenders: dict[str, Callable[[], Any]], *, budget: float, least: int, shortest: float
) -> dict[str, list[float]]:
    """Measure the seconds a call of each contender in each round.

    Each contender gets about `budget` seconds, but at least `least` rounds. A round calls it as
    often as fills `shortest` seconds.
    """
    once = {name: _once(contender) for name, contender in contenders.items()}
    calls = {name: max(1, min(500, int(shortest / once[name]))) for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    slowest = max(calls[name] * once[name] for name in contenders)
    rounds = max(least, min(201, int(budget / slowest)))
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(_timed(contender, calls[name]))
    return seconds


def against(values: list[float], baseline: list[float]) -> Timing:
    """The rounds of one contender compared with those of another."""
    ratios = [mine / base for mine, base in zip(values, baseline, strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5)
    return Timing(statistics.median(values), statistics.median(ratios), low, high)


def machine() -> dict[str, Any]:
    """The machine and versions that a result depends on, and the commit of the code.

    `commit` and `modified` are None if git does not know them.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
    return {
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version_of("diffusers"),
        "fastddim": version_of("fastddim"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": None if changes is None else bool(changes),
    }


def _once(contender: Callable[[], Any]) -> float:
    """Seconds of one call: the best of several, if calls are short."""
    first = _timed(contender, 1)
    return first if first > 1 else min(_timed(contender, 1) for _ in range(4))


def _timed(contender: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        contender()
    return (time.perf_counter() - start) / calls


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def version_of(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of git; None without git, or if ROOT is not a repository."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
