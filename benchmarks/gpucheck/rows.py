"""Rows of the result file of predictions."""

from __future__ import annotations

from typing import Any


def row(
    measure: str, seconds: float, bound: str, parts: dict[str, float], **more: Any
) -> dict[str, Any]:
    """A prediction; its numbers have four digits, two more than they are worth.

    Args:
        measure: a name of measures.py.
        bound: the largest of the parts, or what it stands for.
        parts: seconds by what they go into.
    """
    found = {"measure": measure, "seconds": seconds, "bound": bound, **more, "parts": parts}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value
