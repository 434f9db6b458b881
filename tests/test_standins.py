"""Other processors: settings of torch and MKL that take their code paths. The quick tests of bits
run again under each, in a process of its own.
"""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from .support.environment import RunPython

TESTS = Path(__file__).parent
FILES = ("test_golden.py", "test_elementary.py", "integrations/test_processors.py")
# The golden digests, coefficients of tensors and of numbers, and drop-ins where numbers cancel.
SELECTED = "this_processor or noise or numbers or (test_processors and this)"

# After the tests it prints the instruction sets that torch chose, and MKL's branch where there is
# MKL.
SCRIPT = """
import ctypes, pathlib, sys, pytest, torch
code = pytest.main(sys.argv[1:])
print("\\n" + torch.backends.cpu.get_cpu_capability())
if torch.backends.mkl.is_available():
    library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    print("MKL branch", ctypes.CDLL(str(library)).mkl_serv_cbwr_get(1))
sys.exit(code)
"""

CHOSEN = torch.backends.cpu.get_cpu_capability()
needs_avx2 = pytest.mark.skipif(
    CHOSEN not in ("AVX2", "AVX512"), reason=f"needs a CPU with AVX2, and torch chose {CHOSEN}"
)
needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="needs MKL, which this torch is built without"
)


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("ATEN_CPU_CAPABILITY", "default", "DEFAULT"),
        pytest.param("ATEN_CPU_CAPABILITY", "avx2", "AVX2", marks=[needs_avx2, pytest.mark.deep]),
        pytest.param("MKL_CBWR", "COMPATIBLE", "MKL branch 3", marks=[needs_mkl, pytest.mark.deep]),
    ],
)
def test_bits_under(
    setting: str, value: str, told: str, run_python: RunPython, tmp_path: Path
) -> None:
    report = tmp_path / "report.xml"
    result = run_python(
        *("-c", SCRIPT, "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"),
        *("-c", TESTS.parent / "pyproject.toml", "-k", SELECTED, *(TESTS / name for name in FILES)),
        cwd=tmp_path,
        env={setting: value, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert told in result.stdout.splitlines()[-2:]
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    ran = {case.get("classname", "").rpartition(".")[2] for case in suite}
    assert ran == {Path(name).stem for name in FILES}
    assert int(suite.get("tests", 0)) >= 60
    assert suite.get("skipped") == "0"
