"""A function of options is, for callers and their tools, a function of the options' fields."""

from __future__ import annotations

import importlib.util
import inspect
import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import fastddim
from fastddim import api, options, signatures
from fastddim.actions import options as action_options
from fastddim.runs import options as run_options

from .support.environment import ROOT, RunPython
from .support.models import elementwise_model

FUNCTIONS: dict[Any, Any] = {
    fastddim.sample: options.SampleOptions,
    fastddim.invert: options.InvertOptions,
    fastddim.generate: run_options.GenerateOptions,
    fastddim.Sampler.__init__: options.SamplerOptions,
    fastddim.Sampler.__call__: options.DrawOptions,
    fastddim.ActionSampler.__init__: action_options.ActionOptions,
    fastddim.ActionSampler.__call__: action_options.TickOptions,
    fastddim.ActionStream.__init__: action_options.ActionStreamOptions,
    fastddim.Stream.__init__: options.StreamOptions,
    fastddim.Stream.submit: options.RequestOptions,
}

each_function = pytest.mark.parametrize(
    ("function", "taken"), FUNCTIONS.items(), ids=[f.__qualname__ for f in FUNCTIONS]
)


@each_function
def test_parameters_are_the_fields(function: Any, taken: Any) -> None:
    shown = dict(inspect.signature(function).parameters)
    shown.pop("self", None)
    declared = {field.name: field for field in fields(taken)}
    assert set(shown) == set(declared)
    for name, parameter in shown.items():
        assert parameter.annotation == declared[name].type
        required = parameter.default is parameter.empty
        assert required or parameter.default == declared[name].default
        assert (parameter.kind is parameter.KEYWORD_ONLY) == declared[name].kw_only


@each_function
def test_types_resolve(function: Any, taken: Any) -> None:
    results = {"Run": fastddim.runs.Run, "Ticket": fastddim.stream.Ticket}
    names = vars(options) | vars(run_options) | vars(action_options) | results
    hints = typing.get_type_hints(function, names)
    assert {field.name for field in fields(taken)} | {"return"} == set(hints)


@each_function
def test_the_documentation_is_the_functions(function: Any, taken: Any) -> None:
    # That of a class may tell about its making.
    documented = function.__doc__ or fastddim.Sampler.__doc__
    assert "Raises:" in documented
    assert function.__module__ != "fastddim.signatures"


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^sample\(\) got an unexpected keyword argument 'etaa'"):
        fastddim.sample(elementwise_model, 5, shape=(1, 2), etaa=1.0)  # type: ignore[call-arg]


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^Sampler.__init__\(\) missing 1 .* argument: 'steps'"):
        fastddim.Sampler(elementwise_model)  # type: ignore[call-arg]


def test_a_sampler_takes_keywords_alone() -> None:
    sampler = fastddim.Sampler(elementwise_model, 2, shape=(1, 2))
    with pytest.raises(TypeError, match="positional argument"):
        sampler(3)  # type: ignore[misc]


def test_shared_fields_are_taken_and_others_given() -> None:
    given = options.SampleOptions(elementwise_model, 5, eta=0.5, shape=(1, 2), seed=3)
    taken = signatures.shared(options.SamplerOptions, given, order=2)
    assert (taken.model, taken.steps, taken.eta, taken.order) == (elementwise_model, 5, 0.5, 2)
    assert not hasattr(taken, "seed")


def test_the_overloads_of_a_step_have_its_options() -> None:
    """The overloads of a step have its options, with their types; `inspect` and `help` show the
    arguments themselves, with defaults.
    """
    shown = typing.get_type_hints(fastddim.step)
    own = {"x_t", "model_output", "alpha_t", "alpha_prev", "return_x0", "return"}
    shared = typing.get_type_hints(api.StepOptions)
    assert shared == {name: kind for name, kind in shown.items() if name not in own}
    parameters = inspect.signature(fastddim.step).parameters
    assert set(parameters) == set(shown) - {"return"}
    assert parameters["return_x0"].default is False


CALLS = """
import fastddim
import torch
from torch import Tensor

def model(x: Tensor, t: Tensor) -> Tensor:
    return x

fastddim.sample(model, 5, eta=0.5, spacing="trailing")
fastddim.Sampler(model, 5)(seed=3)
fastddim.Stream(model, batch_size=1).submit(5, eta=1.0)

def steps(x: Tensor, keep: bool) -> None:
    x_prev: Tensor = fastddim.step(x, x, 0.5, 0.6, prediction="v", eta=1.0)
    x_prev = fastddim.step(x, x, 0.5, 0.6, return_x0=False)
    both: tuple[Tensor, Tensor] = fastddim.step(x, x, 0.5, 0.6, return_x0=True, impl="cpu")
    either: Tensor | tuple[Tensor, Tensor] = fastddim.step(x, x, 0.5, 0.6, return_x0=keep)

fastddim.sample(model, 5, etaa=0.5)
fastddim.sample(model, 5, spacing="trailling")
fastddim.sample(model, 5, temperature=2.0, guidance_scale="7")
fastddim.Sampler(model, 5)(sed=3)
fastddim.Stream(model, batch_size=1).submit(5, clip="0")
fastddim.sample(model, 5, prediction="flow")
fastddim.sample(model, 5, impl="gpu")
fastddim.step(torch.zeros(2), torch.zeros(2), 0.5, 0.6, clamp=1.0)
x: Tensor = fastddim.step(torch.zeros(2), torch.zeros(2), 0.5, 0.6, return_x0=True)
"""


SETTINGS = """
[mypy]
strict = True
untyped_calls_exclude = torch
[mypy-diffusers.*,mpmath.*,sklearn.*,transformers.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-readme]
allow_untyped_defs = True
"""


def sources() -> dict[str, str]:
    """Files of a user: the calls above, the README from its quick start on, and the examples."""
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme[readme.index("## Quick start") :]
    quick_start, *others = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    files = {"calls": CALLS, "quick_start": quick_start, "readme": "".join([quick_start, *others])}
    examples = (ROOT / "examples").glob("*.py")
    return files | {path.stem: path.read_text("utf-8") for path in examples}


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_type_checkers_know_names_and_types(run_python: RunPython, tmp_path: Path) -> None:
    """`mypy --strict` refuses the wrong calls above, and nothing in the README and the examples."""
    for name, source in sources().items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    # A package that is linked to is none that mypy finds, and one that is installed is found.
    folder = Path(fastddim.__file__).parents[1]
    env = {} if folder.name == "site-packages" else {"MYPYPATH": str(folder)}
    cache = ROOT / "build" / "tests" / "mypy"  # of torch, which takes a minute
    result = run_python("-m", "mypy", "--cache-dir", cache, ".", cwd=tmp_path, env=env)
    found = re.findall(r"^(\S+)\.py:(\d+): error", result.stdout, re.MULTILINE)
    first = 1 + CALLS.splitlines().index("fastddim.sample(model, 5, etaa=0.5)")
    expected = {("calls", str(line)) for line in range(first, first + 9)}
    assert set(found) == expected, result.stdout + result.stderr
