"""LeRobot's real-time chunking, for tests that compare with it live."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from pathlib import Path

import pytest

from .peers import modules_named

PACKAGES = ("lerobot", "lerobot.configs", "lerobot.policies", "lerobot.policies.rtc")


@functools.cache
def lerobot_rtc() -> types.SimpleNamespace:
    """Modules `modeling`, `configuration` and `types`, without what their packages import."""
    spec = importlib.util.find_spec("lerobot")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("compares with the package lerobot, which is not installed")
    root = Path(spec.submodule_search_locations[0])
    packages = {name: types.ModuleType(name) for name in PACKAGES}
    for name, package in packages.items():
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    with modules_named(packages):
        return types.SimpleNamespace(
            modeling=importlib.import_module("lerobot.policies.rtc.modeling_rtc"),
            configuration=importlib.import_module("lerobot.policies.rtc.configuration_rtc"),
            types=importlib.import_module("lerobot.configs.types"),
        )
