"""Warnings that are given once, at the line of the caller's code that causes them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable

import torch

# Decorators between the caller and the package.
_BETWEEN = ("contextlib", "torch.utils._contextlib")

_given: set[Hashable] = set()


def warn_once(message: str, *about: Hashable) -> None:
    """Warn, unless this process has warned of the same before.

    Args:
        about: values that tell this warning from others.
    """
    if about in _given or torch.compiler.is_compiling():
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"fastddim: {message}", stacklevel=level)
    _given.add(about)


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] == "fastddim" or module in _BETWEEN
