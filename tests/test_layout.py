"""Shared code of tests is in tests/support: a test module may change without a look at
other tests.
"""

from __future__ import annotations

import ast
from pathlib import Path

from .support.environment import ROOT

FILES = [path for folder in ("tests", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")]
MODULES = {path.stem for path in FILES if path.name.startswith(("test_", "bench_", "conftest"))}


def imported(path: Path) -> set[str]:
    """The last parts of the names of the modules that a file imports, also by `import_module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(name.name for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(name.value) for name in node.args if isinstance(name, ast.Constant)}
    return {name.rpartition(".")[2] for name in found}


def test_no_test_or_benchmark_is_imported() -> None:
    found = {str(path.relative_to(ROOT)): imported(path) & MODULES for path in FILES}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_imports_are_found(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(
        "import tests.test_a\n"
        "from . import test_b\n"
        "from .test_c import helper\n"
        "import_module('tests.integrations.test_d')\n"
    )
    assert {"test_a", "test_b", "test_c", "test_d"} <= imported(source)
