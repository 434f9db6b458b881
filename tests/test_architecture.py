"""The architecture of the package: docs/architecture.md, read and compared with the code."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from fastddim import options
from fastddim.actions.options import ActionOptions, ActionStreamOptions, TickOptions
from fastddim.runs.options import GenerateOptions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"

# Longer ones hide what they do.
MOST_LINES = 400


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    )


def layers() -> dict[str, int]:
    """The line of each module or package in the picture."""
    (picture,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return {name: i for i, line in enumerate(picture.splitlines()) for name in line.split()}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    named = ("fastddim", *parts) if parts[0] == "kernels" else parts
    return ".".join(part for part in named if part != "__init__")


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    own = module_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in MODULES else module


MODULES = {module_of(path): path for path in sources("fastddim", "kernels")}


def top(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "fastddim" and len(parts) > 1 else None


class TestImports:
    def test_every_module_is_in_the_picture(self) -> None:
        assert {top(module) for module in MODULES} - {None} == set(layers())

    @pytest.mark.parametrize("module", MODULES)
    def test_from_lines_above_alone(self, module: str) -> None:
        own, where = top(module), layers()
        if own is None:
            return
        for imported in imports(MODULES[module]):
            other = top(imported)
            assert other is None or other == own or where[other] < where[own], imported

    def test_no_circle(self) -> None:
        """No circle of imports exists, even within a package; the imports of a package itself count
        as its modules'.
        """
        graph = {
            module: {name for name in imports(path) if name in MODULES and name != module}
            for module, path in MODULES.items()
            if path.name != "__init__.py"
        }
        done: set[str] = set()

        def visit(module: str, trail: tuple[str, ...]) -> None:
            assert module not in trail, " -> ".join((*trail, module))
            if module in done or module not in graph:
                return
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

        for module in graph:
            visit(module, ())


def hops() -> Iterator[tuple[str, Path]]:
    """The functions and the files that the page names together."""
    text = PAGE.read_text()
    for names, file in re.findall(r"^\| (`.*?) \| `(\S+?)` \|", text, re.MULTILINE):
        yield from ((name, ROOT / file) for name in re.findall(r"`(\S+?)`", names))
    for sentence in re.findall(r"`\w+`,? (?:of|in)\s`\S+`", text):
        name, file = re.findall(r"`(\S+?)`", sentence)
        if "/" in file:
            yield name, ROOT / file


def defined(path: Path) -> set[str]:
    if path.suffix != ".py":
        text = path.read_text()
        return set(re.findall(r"\b(\w+)\(", re.sub(r"^[ \t].*$", "", text, flags=re.MULTILINE)))
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if hasattr(item, "name")}
            names |= {item.name for item in node.body if hasattr(item, "name")}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if hasattr(node, "name"):
            names.add(node.name)
    return names


def test_the_functions_of_the_page_exist() -> None:
    named = list(hops())
    assert len(named) > 20
    missing = [f"{name} in {path}" for name, path in named if name not in defined(path)]
    assert not missing


@pytest.mark.parametrize("folder", ["fastddim", "kernels", "csrc", "benchmarks"])
def test_no_file_is_long(folder: str) -> None:
    suffixes = (".py", ".h", ".c", ".cpp", ".cu", ".cuh")
    files = sources(folder, suffixes=suffixes)
    assert files
    long = {
        path.name: n for path in files if (n := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def declarations(path: Path) -> Iterator[str]:
    """Parameters with a default, fields with one, and options of commands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            yield from (a.arg for a in positional[len(positional) - len(arguments.defaults) :])
            pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            yield from (a.arg for a, default in pairs if default is not None)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and item.value is not None:
                    assert isinstance(item.target, ast.Name)
                    yield item.target.id


# What the paper's formulas, the timesteps and the kernels' operands have by the same name is no
# option: these modules serve as functions of their own.
OTHERS = (
    "backends",
    "integrations",
    "models",
    "ops",
    "philox",
    "plan",
    "process",
    "schedule",
    "steptable",
)


def test_an_option_is_declared_in_three_places_at_most() -> None:
    names = {
        field.name
        for cls in (
            options.SampleOptions,
            options.InvertOptions,
            options.StreamOptions,
            options.RequestOptions,
            GenerateOptions,
            ActionOptions,
            ActionStreamOptions,
            TickOptions,
        )
        for field in fields(cls)
    }
    places = defaultdict(set)
    for path in sources("fastddim"):
        if top(module_of(path)) in OTHERS:
            continue
        for name in declarations(path):
            if name in names:
                # A `Stepper` is called as `step` is.
                if path.name == "stepper.py":
                    places[name].add("api.py")
                    continue
                places[name].add("cli" if "cli" in path.parts else path.name)
    assert places["eta"] == {"options.py", "api.py", "cli"}
    assert {name: where for name, where in places.items() if len(where) > 3} == {}


@pytest.mark.parametrize("option", sorted(f.name for f in fields(options.SampleOptions)))
def test_sample_says_what_an_option_means(option: str) -> None:
    import fastddim

    assert re.search(rf"^ +{option}: ", str(fastddim.sample.__doc__), re.MULTILINE)


def test_the_loop_updates_in_one_place() -> None:
    callers = {
        path.name
        for path in sources("fastddim/loop", "fastddim/stream")
        if re.search(r"\bupdate_out\(", path.read_text())
    }
    assert callers == {"step.py"}


PRIVATE = {
    "fastddim/backends/cuda.py": "whether an operator has a kernel",
    "fastddim/loop/cuda.py": "capture",
    "fastddim/processor.py": "what the CPU has",
    "fastddim/runs/memory.py": "which storage a tensor has",
    "fastddim/steptable.py": "the level of forward-mode differentiation, without a call",
    "fastddim/tracing.py": "what watches operators: torch.jit, modes, a profiler",
    "fastddim/transforms.py": "which transforms are at work, and a kernel below that of autograd",
}


def test_private_names_of_torch_are_in_one_module_per_kind_of_use() -> None:
    private = re.compile(
        r"torch\._C\.\w+|from torch\._C\w* import|forward_ad\._\w+|\._cdata\b|torch\.cpu, name"
    )
    found = {
        str(path.relative_to(ROOT))
        for path in sources("fastddim", "kernels")
        if private.search(path.read_text())
    }
    assert found == set(PRIVATE)
