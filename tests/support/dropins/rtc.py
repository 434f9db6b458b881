"""LeRobot's real-time chunking, for tests that compare with it live."""

from __future__ import annotations

import functools
import importlib
import types

from .peers import lerobot_packages, modules_named


@functools.cache
def lerobot_rtc() -> types.SimpleNamespace:
    """Modules `modeling`, `configuration` and `types`, without what their packages import."""
    with modules_named(lerobot_packages("policies", "policies.rtc")):
        return types.SimpleNamespace(
            modeling=importlib.import_module("lerobot.policies.rtc.modeling_rtc"),
            configuration=importlib.import_module("lerobot.policies.rtc.configuration_rtc"),
            types=importlib.import_module("lerobot.configs.types"),
        )
