"""`import fastddim`: its effects, and the things that it leaves alone, each in a process of its
own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEAN_IMPORT = """
import sys
import warnings

import torch


def refuse(*args, **kwargs):
    raise AssertionError("import fastddim asked for CUDA")


torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
warnings.simplefilter("error")
before = set(sys.modules)
import fastddim

added = set(sys.modules) - before
expected = {*sys.stdlib_module_names, "fastddim", "numpy", "torch"}
assert not {name for name in added if name.partition(".")[0] not in expected}, added
assert not {name for name in added if name.startswith(("torch._dynamo", "torch._inductor"))}, added
"""

WITHOUT_OPTIONAL_PACKAGES = """
import sys

for name in ("diffusers", "matplotlib", "scipy", "sklearn", "triton"):
    sys.modules[name] = None

import fastddim

schedule = fastddim.Schedule.linear()
x = fastddim.sample(lambda x, t: 0.5 * x, 3, shape=(2, 1, 4, 4), schedule=schedule)
assert x.shape == (2, 1, 4, 4)
assert x.isfinite().all()
"""


def test_import_takes_torch_and_nothing_else(run_python, tmp_path):
    result = run_python("-c", LEAN_IMPORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


def test_samples_without_the_optional_packages(run_python, tmp_path):
    result = run_python("-c", WITHOUT_OPTIONAL_PACKAGES, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("kernels.get_kernel", "this folder is the package 'fastddim.kernels'"),
        ("from kernels import update", "cannot import name 'update' from 'kernels'"),
        ("import kernels.update", "No module named 'kernels.update'"),
    ],
)
def test_kernels_is_empty_as_a_top_level_package(run_python, use, message):
    result = run_python("-c", f"import kernels; {use}", cwd=ROOT)
    assert result.returncode == 1
    assert message in result.stderr


def test_diffusers_imports_from_the_repository_root(run_python):
    # diffusers, and transformers where it is there, look for a package named `kernels`, and from
    # here they find this repository's.
    code = "from diffusers import DDIMScheduler, UNet2DModel; print(UNet2DModel.__name__)"
    result = run_python("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "UNet2DModel\n"
