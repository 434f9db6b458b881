"""The peers themselves, for tests that compare with them live, and what such tests share.

Some of the packages that they import are not needed for sampling: stand-ins take their place while
a peer is imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@functools.cache
def lucidrains() -> tuple[types.ModuleType, types.ModuleType]:
    """Modules `denoising_diffusion_pytorch` and `classifier_free_guidance`."""
    name = "denoising_diffusion_pytorch"
    with _package(name, "torchvision", "ema_pytorch", "accelerate"):
        return (
            importlib.import_module(f"{name}.denoising_diffusion_pytorch"),
            importlib.import_module(f"{name}.classifier_free_guidance"),
        )


@functools.cache
def lucidrains_module(module: str) -> types.ModuleType:
    """Another module of `denoising_diffusion_pytorch`."""
    name = "denoising_diffusion_pytorch"
    with _package(name, "torchvision", "ema_pytorch", "accelerate", "pytorch_fid"):
        return importlib.import_module(f"{name}.{module}")


@functools.cache
def k_diffusion_sampling() -> types.ModuleType:
    """Module `k_diffusion.sampling`."""
    with _package("k_diffusion", "torchvision", "torchdiffeq", "torchsde"):
        return importlib.import_module("k_diffusion.sampling")


@functools.cache
def ldm_ddim() -> types.ModuleType:
    """Module `ldm.models.diffusion.ddim`."""
    _require("ldm")
    return importlib.import_module("ldm.models.diffusion.ddim")


@functools.cache
def guided_diffusion() -> types.ModuleType:
    """The port of guided-diffusion's `gaussian_diffusion` and `respace` in Tortoise (coqui-tts)."""
    path = _require("TTS") / "tts" / "layers" / "tortoise" / "diffusion.py"
    spec = importlib.util.spec_from_file_location("tortoise_diffusion", path)
    module = importlib.util.module_from_spec(spec)
    unused = ("TTS", "TTS.tts", "TTS.tts.layers", "TTS.tts.layers.tortoise", "k_diffusion")
    unused += ("TTS.tts.layers.tortoise.dpm_solver", "k_diffusion.sampling")
    with modules_named({name: _stand_in() for name in unused}):
        spec.loader.exec_module(module)
    # torch.compile looks modules up by the names of their functions.
    sys.modules[spec.name] = module
    return module


class _Registry:
    """The part of `draccus.ChoiceRegistry` that the configs of LeRobot need."""

    @staticmethod
    def register_subclass(_name: str) -> Callable[[type], type]:
        return lambda config: config


@functools.cache
def lerobot() -> types.SimpleNamespace:
    """LeRobot's diffusion policy: modules `modeling`, `configuration` and `types`, and all of its
    `modules` by name.
    """
    packages = lerobot_packages("optim", "policies", "policies.diffusion", "utils")
    for needed in ("diffusers.schedulers", "einops"):  # which look for some of the stand-ins
        pytest.importorskip(needed)
    stand_ins = {name: _stand_in() for name in _LEROBOT_UNUSED}
    for name in ("draccus", "draccus.choice_types"):
        stand_ins[name] = types.ModuleType(name)
        stand_ins[name].ChoiceRegistry = _Registry
    with modules_named({**packages, **stand_ins}):
        found = types.SimpleNamespace(
            modeling=importlib.import_module("lerobot.policies.diffusion.modeling_diffusion"),
            configuration=importlib.import_module(
                "lerobot.policies.diffusion.configuration_diffusion"
            ),
            types=importlib.import_module("lerobot.configs.types"),
        )
        found.modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "lerobot"}
        return found


_LEROBOT_UNUSED = ("torchvision", "lerobot.configs.train", "lerobot.datasets")
_LEROBOT_UNUSED += ("lerobot.datasets.feature_utils", "lerobot.datasets.io_utils")
_LEROBOT_UNUSED += ("lerobot.datasets.utils", "lerobot.processor", "lerobot.utils.io_utils")
_LEROBOT_UNUSED += ("lerobot.utils.utils",)
# Since LeRobot 0.6 these packages have names of their modules.
_LEROBOT_NAMES = {"configs": ("types", "policies"), "optim": ("optimizers", "schedulers")}


def lerobot_packages(*names: str) -> dict[str, types.ModuleType]:
    """LeRobot, its configs and other packages of it, importable without the imports of their
    `__init__`.
    """
    root, packages = _require("lerobot"), {}
    for name in ("", "configs", *names):
        full = f"lerobot.{name}".rstrip(".")
        package = packages[full] = types.ModuleType(full)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        package.__getattr__ = functools.partial(_of_module, full, _LEROBOT_NAMES.get(name, ()))
    return packages


def _of_module(package: str, modules: tuple[str, ...], name: str) -> Any:
    """The attribute of the first of a package's modules that has it."""
    if not name.startswith("_"):
        for module in modules:
            found = importlib.import_module(f"{package}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def same_draws(*runs: Callable[[], Any], seed: int = 11) -> list[Any]:
    """The results of all runs, each from one state of torch's generator; all must leave it in one
    state.
    """
    results, states = [], []
    for run in runs:
        torch.manual_seed(seed)
        results.append(run())
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states[1:])
    return results


def assert_same(own: Any, expected: Any, tolerance: float) -> None:
    """Asserts that nested lists, tuples and dicts of tensors agree: keys, shapes, dtypes and
    values.

    Where a tensor has values above 1 the tolerance is relative to the largest.
    """
    if isinstance(expected, Tensor):
        finite = expected[expected.isfinite()].abs()
        atol = tolerance * max([1.0, *finite.flatten().tolist()])
        torch.testing.assert_close(own, expected, rtol=0, atol=atol, equal_nan=True)
    elif isinstance(expected, dict):
        assert own.keys() == expected.keys()
        for key in expected:
            assert_same(own[key], expected[key], tolerance)
    elif isinstance(expected, list | tuple):
        assert len(own) == len(expected)
        for pair in zip(own, expected, strict=True):
            assert_same(*pair, tolerance)
    else:
        assert own == expected


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_example(
    documented: Any, imports: dict[str, Any] | None = None, **names: Any
) -> dict[str, Any]:
    """The variables after the example in the docstring of a module or a class: five lines.

    Args:
        imports: modules by the names that the example imports them by.
        **names: what is there before.
    """
    (example,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(documented), flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 5
    with modules_named(imports or {}):
        exec(compile(example, documented.__name__, "exec"), names)
    return names


def _require(package: str) -> Path:
    """The folder of a package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"compares with the package {package}, which is not installed")
    return Path(spec.submodule_search_locations[0])


@contextlib.contextmanager
def _package(name: str, *absent: str) -> Iterator[None]:
    """A package whose `__init__`, with all that it imports, does not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(_require(name))]
    stand_ins = {n: _stand_in() for n in absent if importlib.util.find_spec(n) is None}
    modules = {"torchvision": ("transforms",), "pytorch_fid": ("fid_score", "inception")}
    for parent in modules.keys() & stand_ins.keys():
        stand_ins |= {f"{parent}.{module}": _stand_in() for module in modules[parent]}
    with modules_named({name: package, **stand_ins}):
        yield


@contextlib.contextmanager
def modules_named(given: dict[str, Any]) -> Iterator[None]:
    """Modules under other names for a while; they and all that is imported below them are then
    removed.
    """

    def named() -> set[str]:
        return {n for n in sys.modules for g in given if n == g or n.startswith(f"{g}.")}

    before = {n: sys.modules.pop(n) for n in named()}
    sys.modules.update(given)
    try:
        yield
    finally:
        for n in named():
            del sys.modules[n]
        sys.modules.update(before)


def _stand_in() -> mock.MagicMock:
    return mock.MagicMock(__spec__=None, __path__=[])
