"""The documentation: its code runs, and its reference has every public name."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import fastddim
from fastddim import backends, integrations, philox
from fastddim.cli import main

from .support.accuracy import check
from .support.optional import optional
from .support.updates import DTYPES, LAYOUTS, make_case

griffe = optional("griffe")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = {p.relative_to(DOCS).as_posix(): p.read_text("utf-8") for p in DOCS.rglob("*.md")}
REFERENCE = {
    name: (yaml.safe_load(options) or {}).get("options", {})
    for page, text in PAGES.items()
    if page.startswith("reference/")
    for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)
}
"""The names on the pages of the reference, with the options of mkdocstrings."""


def navigated(entry):
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigated(part)]


def run(page):
    """The names that the Python code of a page defines, run from top to bottom in one
    namespace.

    A block with a title is not run: it is a file, or belongs to another package.
    """
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastddim")
        for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
            exec(compile(code, page, "exec"), names)
    return names


def test_the_navigation_is_the_pages():
    assert sorted(navigated(SETTINGS["nav"])) == sorted(PAGES)


def linked(page):
    """The pages that a page links to."""
    folder = (DOCS / page).parent
    targets = re.findall(r"\]\(([^)#:\s]+\.md)[^)]*\)", PAGES[page])
    return {(folder / t).resolve().relative_to(DOCS.resolve()).as_posix() for t in targets}


def test_every_page_is_reached_by_links_from_the_home_page():
    reached, found = set(), {"index.md"}
    while found:
        reached |= found
        found = {target for page in found for target in linked(page)} - reached
    assert sorted(set(PAGES) - reached) == []


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"index.md"}))
def test_a_page_begins_with_its_purpose(page):
    title, first = PAGES[page].split("\n\n")[:2]
    assert re.fullmatch("# .+", title)
    assert not re.match(r"[#|!-]|```|:::", first), first


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.startswith("tasks/") or page == "dropins.md"]
)
def test_the_page_of_a_task_ends_with_where_to_go_on(page):
    heading, _, last = PAGES[page].rpartition("\n## ")[2].partition("\n")
    assert heading == "Where to go on"
    assert "](" in last


def test_parts_of_the_readme_are_included_once():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marks = re.findall(r"<!-- --8<-- \[(start|end):(\w+)\] -->", readme)
    parts = [name for edge, name in marks if edge == "start"]
    assert marks == [(edge, name) for name in parts for edge in ("start", "end")]
    included = [n for text in PAGES.values() for n in re.findall(r'--8<-- "README.md:(\w+)"', text)]
    assert sorted(included) == sorted(parts)


def public_names(module):
    """The exported names of a module of griffe, else its own names without an underscore."""
    if module.exports is not None:
        return [str(name) for name in module.exports]
    members = module.members.items()
    return [n for n, m in members if not n.startswith("_") and not (m.is_alias or m.is_module)]


def of_another_package(member):
    return member.is_alias and not member.target_path.startswith("fastddim.")


@pytest.fixture(scope="module")
def documented(shown):
    """The path of each object that the reference shows."""
    paths = set()
    for name, options in REFERENCE.items():
        entry = shown[name.removeprefix("fastddim.")]
        paths.add(entry.canonical_path)
        if entry.is_module and options.get("members") is not False:
            members = [entry[n] for n in options.get("members", public_names(entry))]
            own = [m for m in members if not of_another_package(m)]
            paths |= {m.canonical_path for m in own if m.docstring}
    return paths


def public_modules():
    """The modules that export names, or that the reference shows whole.

    The modules of the backends are left out, whose functions are those of
    `fastddim.backends.Backend`, and so is the command line, which has a page of its own.
    """
    found = {name for name, options in REFERENCE.items() if "members" not in options}
    for module in pkgutil.walk_packages(fastddim.__path__, "fastddim."):
        source = importlib.util.find_spec(module.name).origin
        if source.endswith(".py") and "\n__all__ = [" in Path(source).read_text("utf-8"):
            found.add(module.name)
    modules = {"fastddim", *(n for n in found if inspect.ismodule(pkgutil.resolve_name(n)))}
    return sorted(n for n in modules if not n.startswith(("fastddim.backends.", "fastddim.cli")))


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_in_the_reference(name, shown, documented):
    module = shown[name.removeprefix("fastddim.")] if name != "fastddim" else shown
    own = [m for m in map(module.__getitem__, public_names(module)) if not of_another_package(m)]
    assert own
    assert [m.path for m in own if m.canonical_path not in documented] == []


def annotations(documented):
    """The annotations of what callers give and get, methods of a class among them."""
    if documented.is_function:
        yield from (p.annotation for p in documented.parameters)
        yield documented.returns
    elif documented.is_class:
        for name, member in documented.members.items():
            if not member.is_alias and (name == "__call__" or not name.startswith("_")):
                yield from annotations(member)


def test_the_types_of_arguments_are_in_the_reference(shown, documented):
    used = set()
    for path in documented:
        for annotation in annotations(shown[path.removeprefix("fastddim.")]):
            parts = annotation.iterate() if isinstance(annotation, griffe.Expr) else ()
            used |= {p.canonical_path for p in parts if isinstance(p, griffe.ExprName)}
    own = [name.removeprefix("fastddim.") for name in used if name.startswith("fastddim.")]
    types = {shown[name] for name in own if "._" not in name}
    assert len(types) > 20
    assert sorted(t.path for t in types if t.canonical_path not in documented) == []


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_what_the_reference_names_has_docstrings(name):
    """Names in the reference have docstrings; without one a name would be left out."""
    documented = pkgutil.resolve_name(name)
    assert inspect.getdoc(documented)
    chosen = REFERENCE[name].get("members")
    for member, value in vars(documented).items() if inspect.ismodule(documented) else ():
        own = getattr(value, "__module__", None) == documented.__name__
        shown = member in chosen if chosen else chosen is None and not member.startswith("_")
        if own and callable(value) and shown:
            assert inspect.getdoc(value), member


def test_every_drop_in_is_in_the_reference():
    names = {module.name for module in pkgutil.iter_modules(integrations.__path__)}
    documented = {name.removeprefix("fastddim.integrations.") for name in REFERENCE}
    assert {name for name in names if not name.startswith("_")} <= documented


@pytest.mark.parametrize("page", [p for p in PAGES if not p.startswith("reference/")])
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_the_noise_written_out_has_the_bits_of_the_package():
    normal = run("noise.md")["normal"]
    z = philox.step_noise((40, 7), 2, seed=11)
    latents = philox.initial_latents((40, 7), seed=2**64 - 1)
    for b, e in itertools.product(range(40), range(7)):
        assert normal(e, 2, b, 11) == z[b, e]
        assert normal(e, 0, b, 2**64 - 1, stream=0) == latents[b, e]


def test_the_largest_normal_is_the_one_stated():
    formula = r"$\sqrt{-2 \ln 2^{-33}} \approx "
    (largest,) = re.findall(rf"{re.escape(formula)}([\d.]+)\$", PAGES["noise.md"])
    smallest = philox.uniform(torch.tensor([0]))
    assert philox.box_muller(smallest, torch.ones(1))[0].item() == pytest.approx(
        math.sqrt(66 * math.log(2)), rel=1e-6
    )
    assert float(largest) == pytest.approx(math.sqrt(66 * math.log(2)), abs=0.005)


def test_timesteps_are_the_ones_shown():
    rows = re.findall(r"^\| `(\w+)`.* \| .* \| ([\d, ]+) \|$", PAGES["method.md"], re.MULTILINE)
    shown = {name: [int(t) for t in timesteps.split(",")] for name, timesteps in rows}
    assert shown == {
        name: fastddim.select_timesteps(1000, 5, name).tolist()
        for name in ("uniform", "quadratic", "leading", "trailing", "linspace")
    }


@pytest.fixture
def example_backend(monkeypatch, tmp_path):
    """The backend of docs/backends.md, as the package would find it."""
    (code,) = re.findall(
        r'```python title="\S*numpy.py"\n(.*?)```', PAGES["backends.md"], re.DOTALL
    )
    path = tmp_path / "numpy_example.py"
    path.write_text(code)
    name = "fastddim.backends.numpy_example"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(backends.BACKENDS, "numpy", module)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_example_backend_computes_the_update(example_backend, dtype):
    generator = torch.Generator().manual_seed(20)
    noises = itertools.cycle(("none", "given", "keyed"))
    for (layout, extras), noise in zip(
        itertools.product(LAYOUTS, (False, True)), noises, strict=False
    ):
        case = make_case(
            generator,
            (3, 4, 5, 7),
            dtype=dtype,
            layout=layout,
            noise=noise,
            clip=0.7,
            rederive_eps=extras,
            guided=extras,
            learned_variance=extras,
            per_sample=extras,
            history=extras,
            mask=extras,
            epsilon=extras,
            model_input=torch.bfloat16,
        )
        check(example_backend, case)


def test_the_example_backend_serves_sample(example_backend):
    model = fastddim.models.load("digits", dtype=torch.float64)
    for options in (
        {"eta": 1.0, "clip": 1.0, "seed": 1},
        {"order": 2, "seed": 1},
        {"eta": [0.5] * 4, "seed": [4, 2]},
    ):
        own, expected = (
            fastddim.sample(model, 4, batch_size=2, dtype=torch.float64, impl=impl, **options)
            for impl in ("numpy", "reference")
        )
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
    assert example_backend.unavailable(torch.device("cuda")) == "it runs on the CPU only"


@pytest.mark.parametrize(
    "name",
    [
        *("sample", "invert", "generate", "Sampler.__init__", "Sampler.__call__"),
        *("Stream.__init__", "Stream.submit"),
    ],
)
def test_signatures_are_shown_as_callers_see_them(shown, name):
    function = pkgutil.resolve_name(f"fastddim.{name}")
    parameters = [(p.name, p.kind.value) for p in shown[name].parameters]
    expected = inspect.signature(function).parameters.values()
    assert len(parameters) > 2
    assert parameters == [(p.name, p.kind.description) for p in expected]


@pytest.fixture(scope="module")
def shown():
    """The package as the reference shows it."""
    extensions = griffe.load_extensions(DOCS / "signatures.py")
    return griffe.load("fastddim", extensions=extensions, search_paths=[ROOT])


def test_the_command_page_is_the_help_of_the_commands():
    spec = importlib.util.spec_from_file_location("commands", DOCS / "commands.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = hook.on_page_markdown(PAGES["commands.md"])
    assert hook.MARK not in text
    helps = text.partition("## fastddim\n")[2]
    assert re.findall(r"^## (.*)$", helps, re.MULTILINE) == list(main.commands)
    for name, command in main.commands.items():
        assert f"Usage: fastddim {name} " in text
        assert command.epilog.splitlines()[-1].strip() in text
        for parameter in command.params:
            assert all(option in text for option in parameter.opts if option.startswith("-"))
    assert "Number of sampling steps.  [default: 50]" in text
    assert hook.on_page_markdown("# Another page\n") == "# Another page\n"
