"""The settings that the other tests rely on: an output that a kernel leaves unwritten must show."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from .support.environment import ROOT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uninitialised_floats_are_nan(dtype):
    like = torch.zeros(5, dtype=dtype)
    for tensor in (
        torch.empty(5, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((5,), (2,), dtype=dtype),
        like.new_empty(5),
        like.new_empty_strided((5,), (2,)),
    ):
        assert tensor.isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_uninitialised_integers_are_the_largest(dtype):
    assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_seeds():
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


TESTS = """
import os

import pytest
import torch


def test_quick():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == 1


@pytest.mark.deep
def test_deep():
    pass
"""


@pytest.mark.parametrize(("options", "passed"), [(["-n", "1"], 1), (["--deep"], 2)])
def test_deep_tests_run_where_asked_for(options, passed, tmp_path):
    """Deep tests run on request: the record and the summary say what ran and what did not, also of
    workers.
    """
    (tmp_path / "test_file.py").write_text(TESTS)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"),
            *("-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, *options),
            *(f"--record={tmp_path / 'record.json'}", tmp_path / "test_file.py"),
        ],
        cwd=ROOT,
        # A run without workers has as many threads as it is told.
        env={**inherited, "OMP_NUM_THREADS": "2" if "-n" in options else "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    tests = json.loads((tmp_path / "record.json").read_text())["tests"]
    assert tests == {"passed": passed, "skipped": 0, "failed": 0, "error": 0}
    left = "deep tests left to `make test-deep` (pytest --deep): 1"
    assert (left in result.stdout) == (passed == 1)
