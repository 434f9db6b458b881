"""The sdist, its wheels and the editable install, built from a copy of the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from .support.environment import COMPILER, ROOT

DRAW_WITH_EACH_MODEL = """
import json
import sys

import fastddim
import fastddim.kernels

for name in ("digits", "fashion"):
    model = fastddim.models.load(name)
    assert fastddim.sample(model, 2, impl=sys.argv[1]).isfinite().all()
print(json.dumps([fastddim.__file__, fastddim.kernels.__file__]))
"""

DIGEST = """
import hashlib
import sys

import torch

import fastddim
from fastddim import ops

assert fastddim.__file__.startswith(sys.argv[1]), fastddim.__file__
assert ops.EXTENSION_ERROR is None, ops.EXTENSION_ERROR


def model(x, t):
    return x * 0.75 / (1 + x * x) + t.reshape(-1, 1, 1, 1).to(x.dtype) * (1 / 1024)


digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for arguments in ({"eta": 1.0}, {"order": 2}, {"clip": 1.0, "prediction": "v_prediction"}):
        given = {"dtype": dtype, "impl": "cpu", "seed": 7}
        x = fastddim.sample(model, 5, shape=(3, 3, 7, 5), **given, **arguments)
        digest.update(x.double().numpy().tobytes())
print(torch.__version__, digest.hexdigest())
"""

IMPORTED_BY_PYTEST = """
import os

import fastddim
import fastddim.kernels


def test_the_wheel_is_tested():
    assert fastddim.__file__.startswith(os.environ["PYTHONPATH"])
    assert fastddim.kernels.__file__.startswith(os.environ["PYTHONPATH"])
"""


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(wheel: Path) -> dict[str, int]:
    """The CRC of each file that the wheel installs, except its own metadata."""
    with zipfile.ZipFile(wheel) as archive:
        found = {info.filename: info.CRC for info in archive.infolist()}
    return {name: crc for name, crc in found.items() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The contents of a clone, without files that were built or written there."""
    folder = tmp_path_factory.mktemp("source") / "checkout"
    anywhere = shutil.ignore_patterns(".*", "*.egg-info", "*.so", "__pycache__")
    at_the_root = shutil.ignore_patterns("build", "demo", "dist", "runs")

    def products(path, names):
        return anywhere(path, names) | (at_the_root(path, names) if Path(path) == ROOT else set())

    return shutil.copytree(ROOT, folder, ignore=products)


@pytest.fixture(scope="module")
def build(checkout, run_python, tmp_path_factory):
    def build(*options, env=None):
        folder = tmp_path_factory.mktemp("build")
        source = shutil.copytree(checkout, folder / "source")
        # Quickly: what is looked at is what the wheel holds, and that its bits are right.
        compiler = folder / "c++"
        compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
        compiler.chmod(0o755)
        env = {"CXX": str(compiler), **(env or {})}
        # What a build requires is here, and each look at it imports torch.
        options = ("--no-isolation", "--skip-dependency-check", "--outdir", folder, *options)
        result = run_python("-m", "build", *options, source, cwd=folder, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
        return folder

    return build


@pytest.fixture(scope="module")
def sdist_and_wheel(build):
    """An sdist, and the wheel that `build` makes of it."""
    folder = build()
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(sdist_and_wheel):
    return sdist_and_wheel[1]


@pytest.fixture(scope="module")
def pure_wheel(build):
    return next(build("--wheel", env={"FASTDDIM_BUILD_EXT": "0"}).glob("*.whl"))


@pytest.fixture(scope="module")
def install(run_python, tmp_path_factory):
    def install(wheel):
        folder = tmp_path_factory.mktemp("installed")
        options = ("--no-deps", "--no-index", "--target", folder)
        result = run_python("-m", "pip", "install", *options, wheel, cwd=folder)
        assert result.returncode == 0, result.stdout + result.stderr
        return folder

    return install


@pytest.fixture(scope="module")
def installed(install, wheel):
    return install(wheel)


@pytest.fixture
def draw_with_each_model(run_python, tmp_path):
    def draw(installed, impl):
        """Draw from an empty folder, and say where the packages came from."""
        env = {"PYTHONPATH": str(installed)}
        result = run_python("-c", DRAW_WITH_EACH_MODEL, impl, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
        return [Path(file).relative_to(installed).as_posix() for file in json.loads(result.stdout)]

    return draw


def test_sdist_holds_the_checkout(checkout, sdist_and_wheel):
    with tarfile.open(sdist_and_wheel[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert files(checkout) <= held


def test_wheel_holds_the_whole_package_and_nothing_else(checkout, wheel):
    package = {f"fastddim/{name}" for name in files(checkout / "fastddim")}
    kernels = {f"fastddim/kernels/{name}" for name in files(checkout / "kernels")}
    held = set(contents(wheel))
    assert held == package | kernels | {"fastddim/_C.abi3.so", "fastddim_command.py"}
    assert {"fastddim/py.typed", "fastddim/models/weights/digits.safetensors"} <= held


def test_wheel_serves_every_python_from_the_oldest_supported(wheel):
    assert "-cp310-abi3-" in wheel.name


def test_wheel_names_its_licence_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        information = zipfile.Path(archive) / f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        assert (information / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()
        assert "License-Expression: Apache-2.0\n" in (information / "METADATA").read_text()
        commands = (information / "entry_points.txt").read_text()
    assert "[console_scripts]\nfastddim = fastddim_command:main\n" in commands


def test_pure_wheel_differs_in_the_extension_alone(wheel, pure_wheel):
    """A pure wheel differs only in the extension, and says so by its version, the only thing that
    `pip install` shows of it.
    """
    assert pure_wheel.name.endswith("+no.kernel.by.request-py3-none-any.whl")
    assert "+" not in wheel.name
    compiled = contents(wheel)
    del compiled["fastddim/_C.abi3.so"]
    assert contents(pure_wheel) == compiled


def test_installed_wheel_works(installed, draw_with_each_model):
    imported = draw_with_each_model(installed, "cpu")
    assert imported == ["fastddim/__init__.py", "fastddim/kernels/__init__.py"]


def test_installed_pure_wheel_works(install, pure_wheel, draw_with_each_model):
    imported = draw_with_each_model(install(pure_wheel), "reference")
    assert imported == ["fastddim/__init__.py", "fastddim/kernels/__init__.py"]


def test_one_wheel_serves_every_torch(installed, tmp_path):
    """One wheel serves every torch: built with this torch, it gives the same bits with those in
    other environments of this checkout.
    """

    def digest(python):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        result = subprocess.run(
            [python, "-c", DIGEST, installed],
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{python}: {result.stderr}"
        version, found = result.stdout.split()
        return version.partition("+")[0], found

    digests = dict(digest(python) for python in (sys.executable, *ROOT.glob(".venv*/bin/python")))
    if len(digests) == 1:
        pytest.skip("needs another torch: make test-oldest and make test-newest install them")
    assert len(set(digests.values())) == 1, digests


def test_installed_command_runs(installed, run_python, tmp_path):
    command = installed / "bin/fastddim"
    result = run_python(command, "--help", cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert result.returncode == 0, result.stderr
    assert "fastddim sample digits" in result.stdout


def test_pytest_in_the_checkout_tests_the_installed_wheel(
    checkout, installed, run_python, tmp_path
):
    source = shutil.copytree(checkout, tmp_path / "checkout")
    test = source / "tests/test_imported.py"
    test.write_text(IMPORTED_BY_PYTEST)
    # As the command `pytest` does: `python -m pytest` would put the checkout itself on the path.
    code = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    result = run_python("-c", code, test, cwd=source, env={"PYTHONPATH": str(installed)})
    assert result.returncode == 0, result.stdout + result.stderr


def test_editable_install_resolves_kernels(run_python, tmp_path):
    url = importlib.metadata.distribution("fastddim").read_text("direct_url.json") or "{}"
    if not json.loads(url).get("dir_info", {}).get("editable"):
        pytest.skip("fastddim is not installed in editable mode")
    result = run_python(
        "-c", "import fastddim.kernels; print(fastddim.kernels.__file__)", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{ROOT / 'kernels/__init__.py'}\n"
