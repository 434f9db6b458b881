"""Optional packages: without one, the tests that use it are skipped and say so."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import pytest


class Missing:
    """Stands in for a package that is not installed; using it skips the test."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> NoReturn:
        # Collecting tests, pytest asks whatever a module holds for private attributes.
        if name.startswith("_"):
            raise AttributeError(name)
        pytest.skip(f"{self._package} is not installed")


def optional(package: str) -> Any:
    """The package, to be used inside of tests and fixtures."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return Missing(package)
