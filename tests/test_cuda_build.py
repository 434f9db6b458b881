"""The CUDA kernels as compiled for every target: the contents of their machine code, and a library
that builds, links and loads next to any torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from gpucheck.machine_code import count, nvcc, output_of, sass_of, short, tool

from .support.environment import COMPILER, ROOT, needs_compiler
from .support.gpuless.toolchain import compile_ptx, needs_nvcc

# Architecture, registers a thread at full occupancy, at three quarters and at half of it: 65,536
# registers for 2,048 threads of a multiprocessor, or for 1,536, in units of eight.
LARGE, SMALL = (32, 40, 64), (40, 56, 80)
TARGETS = {80: LARGE, 86: SMALL, 89: SMALL, 90: LARGE, 100: LARGE, 120: SMALL}

pytestmark = [
    needs_compiler,
    needs_nvcc,
    pytest.mark.skipif(
        tool("cuobjdump") is None or tool("nvdisasm") is None,
        reason="there is no cuobjdump or nvdisasm (Triton brings both)",
    ),
]


def update(state: str, model: str, kind: str, noise: str) -> str:
    """The short name of a kernel with chunks of the ordinary size."""
    return f"update<{state}, {model}, {kind}, {noise}, {8 if state in HALVES else 4}>"


HALVES = ("Half", "BFloat16")
# The elements of a thread.
PIXELS = {
    f"update_pixels<{channels}, {noise}>": size
    for channels, size in ((1, 8), (3, 12), (4, 16))
    for noise in ("false", "true")
}
LONG = [f"update<{half}, {half}, plain, true, 16>" for half in HALVES]


# Of a toolkit that knows one target, where one is named.
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ] && [ -n "{known}" ]; then echo "{known}"; exit; fi
exec "{nvcc}" "$@"
"""


class Function(NamedTuple):
    """One kernel on one target."""

    registers: int
    stack: int
    shared: int
    local: int
    sass: Counter[str]


# Of the GPU that the limits are the tightest on; with `--deep` all of them are built.
QUICK = 90
each_target = pytest.mark.parametrize(
    "arch", [QUICK, *(pytest.param(n, marks=pytest.mark.deep) for n in TARGETS if n != QUICK)]
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The extension with the CUDA kernels, as setup.py builds it where nvcc is a script that calls
    the one of a toolkit elsewhere.
    """
    folder = tmp_path_factory.mktemp("build")
    script = folder / "cuda/bin/nvcc"
    script.parent.mkdir(parents=True)
    known = "" if pytestconfig.getoption("--deep") else f"compute_{QUICK}"
    script.write_text(NVCC.format(nvcc=nvcc(), known=known))
    script.chmod(0o755)
    # The code for CPUs is not looked at here, so it is compiled quickly.
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "FASTDDIM_BUILD_CUDA": "1", "CUDA_HOME": str(folder / "cuda")}
    environment["CXX"] = str(compiler)
    arguments = ["build_ext", "--build-temp", str(folder / "objects"), "--build-lib", str(folder)]
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder / "fastddim/_C.abi3.so"


@pytest.fixture(scope="module")
def functions(library: Path) -> dict[int, dict[str, Function]]:
    """Every kernel of every target, by its short name."""
    folder = library.parent / "cubin"
    folder.mkdir()
    output_of([tool("cuobjdump"), "-xelf", "all", str(library)], folder)
    found = {}
    for cubin in folder.glob("*.cubin"):
        usage = output_of([tool("cuobjdump"), "-res-usage", cubin.name], folder)
        sass = sass_of(output_of([tool("nvdisasm"), "-c", cubin.name], folder))
        resources = re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
        arch = re.search(r"sm_(\d+)", cubin.name)
        assert arch is not None
        found[int(arch[1])] = {
            short(name): Function(*map(int, numbers), sass[name]) for name, *numbers in resources
        }
    return found


@pytest.mark.deep
def test_every_target_is_there(functions: dict[int, dict[str, Function]], library: Path) -> None:
    assert set(functions) == set(TARGETS)
    ptx = output_of([tool("cuobjdump"), "--list-ptx", str(library)], library.parent)
    assert "sm_100.ptx" in ptx
    for kernels in functions.values():
        updates = 6 * 3 * 2 + len(LONG) + len(PIXELS) + 2 * 2
        assert len(kernels) == len(functions[90]) == updates + 2 + 2 * (6 + 2)


@each_target
def test_no_stack_no_spills(functions: dict[int, dict[str, Function]], arch: int) -> None:
    for name, function in functions[arch].items():
        assert (function.stack, function.local) == (0, 0), name
        assert count(function.sass, "LDL") == count(function.sass, "STL") == 0, name


ATOMICS_AND_BARRIERS = ("BAR", "ATOM", "ATOMG", "ATOMS", "RED", "MEMBAR")


@each_target
def test_only_fits_share_memory(functions: dict[int, dict[str, Function]], arch: int) -> None:
    """Only the kernels that fit rows have shared memory, barriers and atomics: additions of
    integers in shared memory.
    """
    fits = 0
    for name, function in functions[arch].items():
        held = {op: count(function.sass, op) for op in ATOMICS_AND_BARRIERS}
        if not name.startswith("fit<"):
            assert function.shared == 0, name
            assert not any(held.values()), name
            continue
        fits += 1
        # Sums, histogram with its tree, and the largest and smallest word.
        words = 2 * 256 * (8 if "double" in name else 4)
        assert function.shared <= 4 * 256 * 8 + (2048 + 512) * 4 + words + 1024, name
        assert held["BAR"] > 0, name
        assert held["ATOMS"] > 0, name
        assert {op for op, n in held.items() if n} == {"BAR", "ATOMS"}, name
        assert all(".POPC.INC" in op or ".ADD" in op for op in function.sass if "ATOMS" in op), name
    assert fits == 6 + 2


@each_target
def test_fits_and_gradients_leave_room_for_half_of_the_threads(
    functions: dict[int, dict[str, Function]], arch: int
) -> None:
    """Fits and gradients leave room for half of the threads, those of float64 for three blocks."""
    *_, half = TARGETS[arch]
    for name, function in functions[arch].items():
        if name.startswith(("fit<", "backward")):
            limit = 80 if "double" in name else half
            assert function.registers <= limit, f"{name}: {function.registers}"


@each_target
def test_gradients_are_moved_in_words(functions: dict[int, dict[str, Function]], arch: int) -> None:
    """Six operands are loaded and three gradients stored, each as one word; of float64 as two where
    words have 16 bytes.
    """
    for state in ("float", "Half", "BFloat16", "double"):
        size = 8 if state in HALVES else 4
        sass = functions[arch][f"backward<{state}, {state}, {size}>"].sass
        if state == "double" and arch >= 100:
            assert wide(sass, ".256") == (6, 3)
        else:
            words = 2 if state == "double" else 1
            assert wide(sass) == (6 * words, 3 * words)


@each_target
def test_registers_leave_room_for_threads(
    functions: dict[int, dict[str, Function]], arch: int
) -> None:
    """A step without noise runs at full occupancy, one with it at three quarters or more, and with
    long chunks at half or more.
    """
    full, three_quarters, half = TARGETS[arch]
    kernels = functions[arch]
    for state, model in (("float", "float"), ("float", "Half"), ("Half", "Half")):
        assert kernels[update(state, model, "plain", "false")].registers <= full
        assert kernels[update(state, model, "plain", "true")].registers <= three_quarters
        assert kernels[update(state, model, "guided", "true")].registers <= three_quarters
    assert kernels[update("float", "float", "guided", "false")].registers <= full
    assert kernels[update("BFloat16", "BFloat16", "plain", "false")].registers <= full
    assert kernels[update("BFloat16", "BFloat16", "plain", "true")].registers <= three_quarters
    assert all(kernels[name].registers <= half for name in LONG)


@each_target
def test_accesses_are_wide(functions: dict[int, dict[str, Function]], arch: int) -> None:
    """One load of each input and one store of each output move a whole chunk; chunks of 32 bytes
    take two of each on GPUs that have words of 16 bytes alone.
    """
    for state in ("float", "Half", "BFloat16"):
        for noise in ("false", "true"):
            # Noise that is drawn is not read.
            of_any = 6 if noise == "true" else 7
            for kind, loads, stores in (("plain", 2, 2), ("guided", 3, 3), ("any", of_any, 5)):
                sass = functions[arch][update(state, state, kind, noise)].sass
                assert wide(sass) == (loads, stores)
    mixed = functions[arch][update("float", "BFloat16", "plain", "false")].sass
    assert wide(mixed) == (1, 1)
    for name in (*LONG, update("double", "double", "plain", "false")):
        sass = functions[arch][name].sass
        assert wide(sass) == (0, 0) if arch >= 100 else (4, 4)
        assert wide(sass, ".256") == (2, 2) if arch >= 100 else (0, 0)
    for name in PIXELS:
        # Two blocks of a multiprocessor.
        assert functions[arch][name].registers <= 128


def wide(sass: Counter[str], width: str = ".128") -> tuple[int, int]:
    """Loads and stores of 16 bytes; a row of coefficients, which stays in the cache, is none."""
    found = [name for name in sass.elements() if width in name]
    return (
        sum(name.startswith("LDG") and ".EF" in name for name in found),
        sum(name.startswith("STG") for name in found),
    )


PTX_OPERATIONS = {"FFMA": r"fma\.rn\.f32", "FMUL": r"mul\.rn\.f32", "FADD": r"(?:add|sub)\.rn\.f32"}


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.deep) for arch in (80, 100, 120))]
)
def test_ptxas_contracts_nothing(functions: dict[int, dict[str, Function]], arch: int) -> None:
    """ptxas contracts nothing: machine code has as many fused and unfused operations as the PTX,
    whose results the tests compare bit for bit.
    """
    ptx = compile_ptx(ROOT / "csrc/cuda/update.cu", f"sm_{arch}", "-fmad=false")
    bodies = {
        short(name): body
        for name, body in re.findall(r"\.entry (\w+)\((.*?)(?=\.visible|\Z)", ptx, re.DOTALL)
    }
    compared = 0
    for name, function in functions[arch].items():
        # float64 conversions and 64-bit division have sequences of their own.
        if "double" in name or not name.startswith(("update<", "update_pixels<", "backward<")):
            continue
        body = bodies[name]
        assert not re.search(r"\b(?:fma|mul|add|sub)\.f32", body), "an operation may be contracted"
        rest, n = re.subn(r"rsqrt\.approx\.ftz\.f32", "", body)
        # Two of each quad.
        assert n == (drawn(name) // 2 if "true" in name else 0)
        assert "approx" not in rest
        assert ".ftz" not in rest
        assert "sqrt" not in rest
        for opcode, operation in PTX_OPERATIONS.items():
            expected = len(re.findall(rf"\b{operation}", body)) + packed(body, opcode)
            found = count(function.sass, opcode) + 2 * count(function.sass, opcode + "2")
            assert found == expected, f"{name}: {opcode}"
            compared += 1
    assert compared == (5 * 3 * 2 + len(LONG) + len(PIXELS) + 5) * 3


def drawn(name: str) -> int:
    """The number of normals that a thread of a kernel draws."""
    size = int(name.rpartition(" ")[2].removesuffix(">")) if name.startswith("update<") else 0
    return size or PIXELS[name]


def packed(body: str, opcode: str) -> int:
    """The number of operations; those on pairs count twice."""
    name = {"FFMA": "fma", "FMUL": "mul", "FADD": "(?:add|sub)"}[opcode]
    return 2 * len(re.findall(rf"\b{name}\.rn\.f32x2", body))


IMPORTED = """
import importlib.util, sys, warnings
path = sys.argv[1]

class Finder:
    def find_spec(self, name, *_):
        if name == "fastddim._C":
            return importlib.util.spec_from_file_location(name, path)

sys.meta_path.insert(0, Finder())
import torch, fastddim
from fastddim import ops
assert ops.EXTENSION_ERROR is None and sys.modules["fastddim._C"].__file__ == path
for name in ("update_out", "fit_rows", "backward_out", "normal_out", "advance"):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastddim::{name}", key)
print(fastddim.step(torch.ones(1, 4), torch.zeros(1, 4), 0.25, 1.0).tolist())
"""


def test_the_library_loads_beside_any_torch(library: Path, tmp_path: Path) -> None:
    """The library loads next to any torch, also one without CUDA: the runtime is linked in, and the
    stream is looked up when used.
    """
    result = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(library)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[[2.0, 2.0, 2.0, 2.0]]"
    dynamic = output_of(["nm", "-D", "--undefined-only", "--demangle", str(library)], tmp_path)
    assert not [line for line in dynamic.splitlines() if "c10::" in line or "at::" in line]
    assert "cuda" not in dynamic.replace("aoti_torch_device_type_cuda", "")
    assert {"dlopen", "dlsym"} <= set(re.findall(r"U (\w+)", dynamic))


def test_the_launcher_can_neither_wait_nor_allocate(library: Path) -> None:
    """The launcher needs the CUDA runtime only to register and to launch, so it can neither wait
    nor allocate.
    """
    listed = output_of(
        ["nm", "--undefined-only", str(library.parent.parent / "objects/update.o")], ROOT
    )
    needed = {line.split()[-1] for line in listed.splitlines() if "cuda" in line.split()[-1]}
    assert needed == {
        "__cudaGetKernel",
        "__cudaLaunchKernel",
        "__cudaPopCallConfiguration",
        "__cudaPushCallConfiguration",
        "__cudaRegisterFatBinary",
        "__cudaRegisterFatBinaryEnd",
        "__cudaRegisterFunction",
        "__cudaUnregisterFatBinary",
        "cudaGetErrorString",
        "cudaGetLastError",
    }
