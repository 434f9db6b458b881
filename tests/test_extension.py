"""The line about a missing extension: its cause, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from typing import Any

import pytest
import torch

from fastddim.extension import why_missing

CURE = "pip install --no-deps --force-reinstall --no-cache-dir"


class Installed:
    """An installation of the package, as its metadata describe it."""

    def __init__(self, version: str, origin: dict[str, Any] | None) -> None:
        self.version, self._origin = version, origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._origin is None else json.dumps(self._origin)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(label: str, origin: dict[str, Any] | None = None, *, built: bool = False) -> None:
        installed = Installed(f"0.1.0{label}", origin)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.version)
        found = object() if built else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    return install


@pytest.mark.parametrize(
    ("label", "cause"),
    [
        ("+no.kernel.without.torch", "where torch was not installed yet; run:"),
        (
            "+no.kernel.without.compiler",
            "without a C++ compiler; install one such as g++, then run:",
        ),
        ("+no.kernel.by.request", "with FASTDDIM_BUILD_EXT=0; unset it, then run:"),
        ("", "without it; run:"),
    ],
)
def test_cause(install: Any, label: str, cause: str) -> None:
    install(label)
    assert why_missing(ImportError("No module")) == (
        f"the compiled extension is missing: this installation was built {cause} {CURE} fastddim"
    )


def test_an_extension_that_does_not_load(install: Any) -> None:
    install("", built=True)
    assert why_missing(ImportError("_C.so: undefined symbol: x\nand more")) == (
        f"the compiled extension does not load with torch {torch.__version__} "
        f"(_C.so: undefined symbol: x); run: {CURE} fastddim"
    )


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        ({"url": "file:///my%20files/fastddim-0.1.0.tar.gz"}, "'/my files/fastddim-0.1.0.tar.gz'"),
        ({"url": "file:///src/fastddim", "dir_info": {"editable": True}}, "-e /src/fastddim"),
        ({"url": "file:///src/fastddim", "dir_info": {}}, "/src/fastddim"),
        ({"url": "https://host/fastddim.zip"}, "https://host/fastddim.zip"),
        (
            {"url": "https://host/fastddim.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "git+https://host/fastddim.git@abc",
        ),
    ],
)
def test_the_command_installs_the_same_again(
    install: Any, origin: dict[str, Any], named: str
) -> None:
    install("+no.kernel.without.torch", origin)
    assert why_missing(ImportError()).endswith(f"run: {CURE} {named}")


def test_without_an_installation(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("")

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert why_missing(ImportError()).endswith(f"built without it; run: {CURE} fastddim")
