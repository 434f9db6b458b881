"""The command `fastddim`, which imports PyTorch only when it computes.

Help and shell completion do not need PyTorch, whose import takes seconds. But `import fastddim`
imports PyTorch too. So this module puts the package into `sys.modules` before it has run, and
imports `fastddim.cli` without the rest of the package. The package runs when an attribute of it is
first read.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

__all__ = ["main"]


class _Package(ModuleType):
    """A package that has not run yet."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        package: ModuleType = self
        package.__class__ = ModuleType
        spec.loader.exec_module(package)
        return getattr(package, name)


def main() -> None:
    """Run the command line."""
    if "fastddim" not in sys.modules:
        spec = find_spec("fastddim")
        assert spec is not None
        package = module_from_spec(spec)
        package.__class__ = _Package
        sys.modules["fastddim"] = package
    from fastddim.cli import main as command

    command(prog_name="fastddim")
