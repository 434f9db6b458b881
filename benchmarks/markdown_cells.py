"""Numbers and tables in Markdown, in the form of the README and the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def gain(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float, sign: str = "") -> str:
    return f"{value * 100:{sign}.0f} %"


def two(value: float) -> str:
    """At most two significant digits, never in scientific notation."""
    return format(Decimal(f"{value:.2g}"), "f")


def duration(seconds: float, digits: Callable[[float], str] = three) -> str:
    """A duration with its unit, and as many digits as `digits` shows."""
    for unit, of_a_second in (("s", 1), ("ms", 1e3)):
        if seconds * of_a_second >= 1:
            return f"{digits(seconds * of_a_second)} {unit}"
    return f"{digits(seconds * 1e6)} µs"
