"""The look-up of torch's stream by the CUDA operators, and the names of torch that they use: on
every release from the oldest supported, however the extension was linked.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from .support.environment import COMPILER, ROOT, RunPython, needs_compiler

# Of torch in csrc/; all are in the headers of torch 2.11, the oldest release that is supported.
TORCH_NAMES = {
    "AOTITorchError",
    "AtenTensorHandle",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "aoti_torch_device_type_cpu",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_dtype",
    "aoti_torch_grad_mode_is_enabled",
    "torch::headeronly::ScalarType",
    "torch::headeronly::toString",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::empty_like",
    "torch::stable::parallel_for",
}
OLDEST = "2.11."

ASK = """
import ctypes, sys
library, stand_in, device = sys.argv[1:]
if stand_in:
    # As torch loads its own libraries.
    kept = ctypes.CDLL(stand_in, mode=ctypes.RTLD_LOCAL)
stream_of = ctypes.CDLL(library).stream_of
stream_of.restype = ctypes.c_char_p
stream = ctypes.c_void_p()
failure = stream_of(int(device), ctypes.byref(stream))
print(hex(stream.value) if failure is None else failure.decode())
"""


def build(source: str, output: Path, *flags: str) -> Path:
    includes = (f"-isystem{path}" for path in include_paths())
    command = [
        COMPILER,
        "-shared",
        "-fPIC",
        *flags,
        *includes,
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    subprocess.run(
        [*command, str(ROOT / "tests/native" / source), "-o", str(output), "-ldl"], check=True
    )
    return output


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    return build("torch_cuda.c", folder / "elsewhere.so", "-xc", "-Wl,-soname,libtorch_cuda.so")


@pytest.fixture(scope="module", params=["--as-needed", "--no-as-needed"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    flags = ("-std=c++20", "-fvisibility=hidden", "-Wl,-z,now", f"-Wl,{request.param}")
    return build("stream.cpp", folder / "stream.so", *flags)


@needs_compiler
def test_the_stream_of_a_library_that_torch_keeps_to_itself(
    library: Path, stand_in: Path, run_python: RunPython, tmp_path: Path
) -> None:
    result = run_python("-c", ASK, library, stand_in, "3", cwd=tmp_path)
    assert result.stdout == "0x1003\n", result.stderr


@needs_compiler
def test_an_error_of_torch_is_passed_on(
    library: Path, stand_in: Path, run_python: RunPython, tmp_path: Path
) -> None:
    result = run_python("-c", ASK, library, stand_in, "9", cwd=tmp_path)
    assert "get(device, &stream)" in result.stdout, result.stderr


@needs_compiler
def test_a_torch_without_cuda_is_named(
    library: Path, run_python: RunPython, tmp_path: Path
) -> None:
    result = run_python("-c", ASK, library, "", "0", cwd=tmp_path)
    assert "fastddim: expected a CUDA build of torch" in result.stdout, result.stderr


def test_the_source_is_written_for_the_oldest_torch() -> None:
    """The source is written for the oldest torch: names that a later release has added would
    compile only there.
    """
    suffixes = (".h", ".cpp", ".cu", ".cuh")
    files = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    source = "\n".join(re.sub(r"//.*|#include.*", "", path.read_text()) for path in files)
    macros_and_c = r"\b(?:(?:STD_|STABLE_)?TORCH_\w+|(?:AOTI|Aten|aoti_|torch_)\w+)"
    used = set(re.findall(rf"{macros_and_c}|\btorch::(?:\w+::)+\w+", source))
    assert used == TORCH_NAMES


@pytest.mark.skipif(
    not torch.__version__.startswith(OLDEST),
    reason=f"needs the headers of torch {OLDEST}x (make test-oldest)",
)
def test_the_oldest_torch_has_these_names() -> None:
    folders = ("headeronly", "csrc/stable", "csrc/inductor/aoti_torch/c")
    headers = [
        path.read_text()
        for folder in folders
        for path in (Path(include_paths()[0]) / "torch" / folder).rglob("*.h")
    ]
    known = set(re.findall(r"\w+", "\n".join(headers)))
    assert {name.split("::")[-1] for name in TORCH_NAMES} <= known
