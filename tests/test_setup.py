"""The decisions of setup.py: the parts of the extension that are built, and the result if one is
missing. The compilers here are scripts that note what they were to compile, and fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

from fastddim import __version__

from .support.environment import COMPILER, ROOT, needs_compiler

# Runs setup.py as often as it is told, each time in a process of its own that begins where torch is
# imported, which takes longer than the rest. That torch has CUDA, by what it says of itself.
WITH_CUDA = """
import json, os, runpy, sys
import torch
torch.version.cuda = "13.0"
import setuptools, torch.utils.cpp_extension
for line in sys.stdin:
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
call = json.loads(line)
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.clear()
os.environ.update(call["environment"])
sys.argv = ["setup.py", *call["arguments"]]
runpy.run_path("setup.py", run_name="__main__")
"""

CXX = f"""#!/bin/sh
case "$*" in
  *.cpp*) echo "$@" >> {{calls}}; exit 1 ;;
esac
exec {COMPILER} "$@"
"""

NVCC = """#!/bin/sh
case "$*" in
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 88 89 90 100 103 120 ;;
  *--dryrun*) echo '#$ TOP={top}' >&2; echo '#$ LIBRARIES= "-L{top}/none"' >&2 ;;
  *) echo "$@" >> {calls}; exit 1 ;;
esac
"""


class Machine:
    """A machine with compilers in a folder of their own, and a record of their calls."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder = folder
        self._server = server
        self._calls = folder / "calls"
        self._calls.touch()
        self.compiler = self._script(folder / "c++", CXX)
        self._script(folder / "cuda/bin/nvcc", NVCC)
        self.runtime = folder / "cuda/lib/libcudart_static.a"

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    def setup(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTDDIM")}
        environment |= {"CXX": str(self.compiler), "CUDA_HOME": str(self.folder / "cuda")}
        said = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        call = {"arguments": arguments, "environment": environment | variables, **said}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(call), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        stdout, stderr = (Path(path).read_text() for path in said.values())
        return subprocess.CompletedProcess(arguments, status, stdout, stderr)

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        folders = ("--build-temp", str(self.folder / "objects"), "--build-lib", str(self.folder))
        return self.setup("-q", "build_ext", *folders, **variables)

    def _script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(calls=self._calls, top=self.folder / "cuda"))
        path.chmod(0o755)
        return path


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WITH_CUDA]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


@pytest.fixture
def machine(tmp_path: Path, server: subprocess.Popen[str]) -> Machine:
    return Machine(tmp_path, server)


def test_without_nvcc_the_cuda_kernels_are_left_out(machine: Machine) -> None:
    (machine.folder / "cuda/bin/nvcc").unlink()
    result = machine.setup("--name")
    assert result.returncode == 0, result.stderr
    assert (
        "building without the CUDA kernels: expected nvcc on PATH or in CUDA_HOME, found none"
        in result.stderr
    )


def test_without_the_static_runtime_the_cuda_kernels_are_left_out(machine: Machine) -> None:
    result = machine.setup("--name")
    assert result.returncode == 0, result.stderr
    expected = f"libcudart_static.a in the toolkit of {machine.folder}/cuda/bin/nvcc, found none"
    assert f"building without the CUDA kernels: expected {expected}" in result.stderr


@pytest.mark.parametrize("missing", ["nvcc", "libcudart_static.a"])
def test_what_cuda_needs_is_an_error_where_cuda_was_asked_for(
    machine: Machine, missing: str
) -> None:
    """Missing parts of CUDA are an error under FASTDDIM_BUILD_CUDA=1, which is not
    quietly ignored.
    """
    if missing == "nvcc":
        (machine.folder / "cuda/bin/nvcc").unlink()
    result = machine.setup("--name", FASTDDIM_BUILD_CUDA="1")
    assert result.returncode != 0
    assert f"FASTDDIM_BUILD_CUDA=1: expected {missing}" in result.stderr


@needs_compiler
def test_every_target_is_built_that_nvcc_knows(machine: Machine) -> None:
    """Every target is built that nvcc knows, and the PTX that newer GPUs compile for themselves."""
    machine.runtime.parent.mkdir()
    machine.runtime.touch()
    assert machine.build().returncode != 0
    (nvcc,) = machine.calls
    built = [word.removeprefix("-gencode=") for word in nvcc.split() if "-gencode" in word]
    assert built == [
        *(f"arch=compute_{arch},code=sm_{arch}" for arch in (80, 86, 89, 90, 100, 120)),
        "arch=compute_100,code=compute_100",
    ]


@needs_compiler
@pytest.mark.parametrize("asked", ["0", "1"])
def test_warnings_are_errors_only_where_asked_for(machine: Machine, asked: str) -> None:
    """Warnings are errors only on request: an unknown compiler may warn of anything, and the
    package still installs.
    """
    machine.runtime.parent.mkdir()
    machine.runtime.touch()
    assert machine.build(FASTDDIM_WERROR=asked).returncode != 0
    (nvcc,) = machine.calls
    assert "csrc/cuda/update.cu" in nvcc
    assert ("-Werror=all-warnings" in nvcc) == (asked == "1")
    machine.runtime.unlink()
    assert machine.build(FASTDDIM_WERROR=asked).returncode != 0
    compiled = machine.calls[1:]
    assert compiled
    for call in compiled:
        assert "-Wall -Wextra" in call
        assert ("-Werror" in call.split()) == (asked == "1")


def version(folder: Path, code: str, **variables: str) -> str:
    """The version of the package that `pip install` would build, from the metadata that it asks for
    first.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTDDIM")}
    result = subprocess.run(
        [sys.executable, "-c", code, "-q", "dist_info", "--output-dir", str(folder)],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (information,) = folder.glob("*.dist-info")
    return information.name.removeprefix("fastddim-").removesuffix(".dist-info")


PLAINLY = """
import runpy, sys
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""

# As pip's builds do: the packages of the environment are taken off the path of this interpreter.
HIDING = """
import os, sys
from importlib.machinery import PathFinder
hidden = [f for f in sys.path if f and PathFinder.find_spec("torch", [f]) is not None]
assert hidden
sys.path = [os.environ["OVERLAY"], *(f for f in sys.path if f not in hidden)]
"""


@pytest.mark.parametrize(
    ("variables", "label"),
    [
        ({"FASTDDIM_BUILD_EXT": "0"}, "by.request"),
        ({"CXX": "/none/c++ -O2"}, "without.compiler"),
    ],
)
def test_a_version_without_the_kernel_says_why(
    tmp_path: Path, variables: dict[str, str], label: str
) -> None:
    """A version without the kernel says why, since pip shows only the version of a build that
    succeeds, in its last line.
    """
    assert version(tmp_path, PLAINLY, **variables) == f"{__version__}+no.kernel.{label}"


def test_a_version_without_torch_says_so(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['torch'] = None\n" + PLAINLY
    assert version(tmp_path, hidden, CXX=sys.executable) == f"{__version__}+no.kernel.without.torch"


def test_a_build_of_its_own_finds_the_torch_of_the_environment(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    folder = Path(setuptools.__file__).parents[1]
    for path in (*folder.glob("setuptools*"), folder / "_distutils_hack"):
        (overlay / path.name).symlink_to(path)
    code = HIDING + PLAINLY
    found = version(tmp_path, code, CXX=sys.executable, OVERLAY=str(overlay))
    assert found == __version__
