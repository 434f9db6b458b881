"""Facts that only native code can show: indices beyond 2³¹, and the promises of the build."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddim import philox
from fastddim.plan import Row

from .support.environment import COMPILER, ROOT, needs_compiler, needs_extension

# Of what https://docs.python.org/3.10/c-api/stable.html lists.
STABLE_PYTHON = {
    "PyCMethod_New",
    "PyCapsule_GetPointer",
    "PyCapsule_New",
    "PyDict_GetItemWithError",
    "PyErr_Clear",
    "PyErr_Format",
    "PyErr_NoMemory",
    "PyErr_Occurred",
    "PyErr_SetString",
    "PyEval_RestoreThread",
    "PyEval_SaveThread",
    "PyExc_RuntimeError",
    "PyExc_TypeError",
    "PyFloat_AsDouble",
    "PyFloat_Type",
    "PyLong_AsDouble",
    "PyLong_AsLong",
    "PyLong_AsUnsignedLongLong",
    "PyLong_AsVoidPtr",
    "PyLong_Type",
    "PyModule_Create2",
    "PyObject_CallFunctionObjArgs",
    "PyObject_CallNoArgs",
    "PyObject_GetAttr",
    "PyObject_IsTrue",
    "PyTuple_GetItem",
    "PyTuple_Pack",
    "PyTuple_Size",
    "PyUnicode_InternFromString",
    "PyUnicode_Type",
    "_Py_Dealloc",
    "_Py_FalseStruct",
    "_Py_NoneStruct",
    "_Py_TrueStruct",
}


@pytest.fixture(scope="module")
def last_tile(tmp_path_factory: pytest.TempPathFactory) -> ctypes._NamedFuncPointer:
    library = tmp_path_factory.mktemp("native") / "last_tile.so"
    sources = [ROOT / "tests/native/last_tile.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    # An index that is too narrow is so in the source, and -O2 takes twice as long to compile.
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).last_tile
    function.restype = ctypes.c_int64
    return function


@needs_compiler
@pytest.mark.parametrize("instruction_set", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("rows", "width", "gap"),
    [
        (1, 2**34 - 5, 0),
        (2**17, 2**16 + 1, 0),
        (2**20, 2**12 + 1, 3),
        (2**32, 3, 1),
    ],
)
def test_indices_beyond_32_bits(
    last_tile: ctypes._NamedFuncPointer, instruction_set: str, rows: int, width: int, gap: int
) -> None:
    """Indices beyond 32 bits reach the end of a sample of up to 2³⁴ elements: addresses, and the
    counter of the noise.
    """
    generator = torch.Generator().manual_seed(1)
    x, m = torch.randn(2, 4096, generator=generator)
    out = torch.full((4096,), float("nan"))
    row = dict.fromkeys(Row._fields, 0.0) | {"cx": 1.0, "r": 1e9, "k0": 0.5, "km": 0.25, "pn": 2.0}
    table = torch.tensor([row[name] for name in Row._fields])
    keys = philox.make_keys(9, 1, sample_offset=3, step_index=4)
    key = torch.cat(list(keys))

    def end(values: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(values.data_ptr() + 4 * values.numel())

    count = last_tile(
        instruction_set.encode(),
        *(ctypes.c_int64(v) for v in (rows, width, width + gap)),
        end(x),
        end(m),
        end(out),
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_void_p(key.data_ptr()),
    )
    if not count:
        pytest.skip(f"this CPU has no {instruction_set}")
    elements = torch.arange(rows * width - count, rows * width)
    behind = (rows - 1 - elements // width) * (width + gap) + width - 1 - elements % width
    places = 4095 - behind
    z = noise_at(elements, keys)
    expected = 0.5 * x[places].double() + 0.25 * m[places].double() + 2.0 * z.double()
    torch.testing.assert_close(out[places].double(), expected, rtol=1e-6, atol=1e-6)
    written = torch.zeros(4096, dtype=torch.bool)
    written[places] = True
    assert bool((out.isnan() == ~written).all())


def noise_at(elements: torch.Tensor, keys: philox.Keys) -> torch.Tensor:
    """z of single elements of a sample, straight from the counter."""
    counter = (elements // 4, keys.step, keys.sample, torch.tensor([philox.STEP_NOISE]))
    words = philox.philox4x32(counter, (keys.seed & 0xFFFFFFFF, keys.seed >> 32))
    u = [philox.uniform(word) for word in words]
    z = torch.stack([*philox.box_muller(u[0], u[1]), *philox.box_muller(u[2], u[3])], dim=-1)
    return z[torch.arange(len(elements)), elements % 4]


@needs_extension
def test_the_library_needs_only_the_stable_abi() -> None:
    """No C++ symbol of torch or c10, so that one build serves every later torch."""
    import fastddim._C

    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", fastddim._C.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "aoti_torch_get_sizes" in symbols
    unstable = [line for line in symbols.splitlines() if "c10::" in line or "at::" in line]
    assert unstable == []
    python = {line.split()[-1] for line in symbols.splitlines() if re.search(r" _?Py", line)}
    assert python <= STABLE_PYTHON


@needs_compiler
def test_instruction_sets_share_no_code(tmp_path: Path) -> None:
    """The linker merges equal names, so code for AVX must not define names that others define."""
    if os.uname().machine != "x86_64":
        pytest.skip("there is one instruction set on this machine")
    defined = {}
    for name in ("plain", "avx2", "avx512"):
        built = tmp_path / f"{name}.o"
        source = ROOT / f"csrc/cpu/{name}.cpp"
        flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-c"]
        subprocess.run([COMPILER, *flags, str(source), "-o", str(built)], check=True)
        lines = subprocess.run(
            ["nm", "--defined-only", "--extern-only", str(built)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        defined[name] = {line.split()[-1] for line in lines if line.split()[-1].startswith("_Z")}
        assert defined[name]
    assert not defined["plain"] & defined["avx2"]
    assert not defined["plain"] & defined["avx512"]
    assert not defined["avx2"] & defined["avx512"]


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["fastddim._C"] = None  # importing it raises ImportError

import torch, fastddim

x, m = torch.ones(1, 4), torch.zeros(1, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for _ in range(3):
        fastddim.step(x, m, 0.25, 1.0)
        fastddim.sample(lambda x, t: x, 2, schedule=fastddim.Schedule.linear(), shape=(1, 4))
print(len(caught), caught[0].message)
print(fastddim.step(x, m, 0.25, 1.0, impl="reference").tolist())
try:
    fastddim.step(x, m, 0.25, 1.0, impl="cpu")
except ValueError as error:
    print(error)
"""


def test_without_the_extension(run_python: Callable[..., Any], tmp_path: Path) -> None:
    """The reference takes over with one warning; the backend asked for by name is refused."""
    result = run_python("-c", WITHOUT_EXTENSION, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    warning, values, refusal = result.stdout.splitlines()
    assert warning.startswith("1 fastddim: no 'cpu' backend: the compiled extension is missing")
    assert values == "[[2.0, 2.0, 2.0, 2.0]]"
    assert refusal.startswith(
        "impl: 'cpu' cannot be used on cpu: the compiled extension is missing"
    )
