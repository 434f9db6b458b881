"""Names of benchmark cases, and the comparison of two commits by them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import compare
import pytest
from compare import Change, Contender, changes, multiples, report
from cpu_results import result_of
from harness import case_id

from .support.environment import RunPython

ROOT = Path(__file__).resolve().parent.parent

STUB = {
    "setup.py": """
from setuptools import setup
setup(name="stub", version="1", packages=["fastddim"])
""",
    "pytest.ini": """
[pytest]
python_files = bench_*.py
addopts = --import-mode=importlib
""",
    "fastddim/__init__.py": "MULTIPLE = 2.0\n",
    "benchmarks/conftest.py": """
import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--results", type=Path)


@pytest.fixture(scope="module")
def rows(request):
    collected = []
    yield collected
    folder = request.config.getoption("--results")
    folder.mkdir(parents=True)
    (folder / "stub.json").write_text(json.dumps({"rows": collected}))
""",
    "benchmarks/bench_stub.py": """
import pytest

import fastddim


@pytest.mark.parametrize("name", ["one", "removed"], ids=["η = 1", "η = 2"])
def test_it(name, rows):
    timings = {"floor": {"ratio": 1.0}, "fastddim": {"ratio": fastddim.MULTIPLE}}
    rows.append({"case": name, "timings": timings})
""",
}


class TestIds:
    @pytest.mark.parametrize(
        ("parts", "expected"),
        [
            (((1, 4, 64, 64), "eta0"), "1x4x64x64-eta0"),
            (((64,), "eta0.5"), "64-eta0.5"),
            (("k-diffusion sample_euler(_ancestral)",), "k-diffusion-sample_euler_ancestral"),
            (("latent-diffusion, guided", "η = 1"), "latent-diffusion-guided-1"),
        ],
    )
    def test_of_parts(self, parts: tuple[Any, ...], expected: str) -> None:
        assert case_id(*parts) == expected

    def test_of_every_benchmark(self, run_python: RunPython) -> None:
        """The names of every benchmark can be typed unchanged, each selects its case, and no two
        are the same.
        """
        listed = run_python("-m", "pytest", "benchmarks", "--collect-only", "-q", cwd=ROOT)
        assert listed.returncode == 0, listed.stdout
        cases = re.findall(r"^benchmarks/(\w+)\.py::\w+\[(.*)\]$", listed.stdout, re.MULTILINE)
        assert len({module for module, _ in cases}) == len(list(ROOT.glob("benchmarks/bench_*.py")))
        assert len(set(cases)) == len(cases) > 50
        for _, case in cases:
            assert re.fullmatch(r"[\w.+-]+", case, re.ASCII), case


class TestArithmetic:
    def test_multiples_of_the_reference(self) -> None:
        step = {
            "case": "η = 0, 64",
            "timings": {
                "floor": {"ratio": 1.0},
                "fastddim": {"ratio": 1.2},
                "fastddim in place": {"ratio": 0.9},
                "diffusers": {"ratio": 9.0},
            },
        }
        loop = {
            "case": "null model",
            "eta": 0.0,
            "shape": [1, 4],
            "timings": {"fastddim": {"ratio": 1.0}, "diffusers": {"ratio": 8.0}},
        }
        stream = {
            "case": "head",
            "load": 2.0,
            "requests": 77,
            "timings": {
                "one after the other": {"latency_median": 3.0},
                "stream": {"latency_median": 0.6},
            },
        }
        assert multiples([step, loop, stream]) == pytest.approx(
            {
                Contender("η = 0, 64", "fastddim", "floor"): 1.2,
                Contender("η = 0, 64", "fastddim in place", "floor"): 0.9,
                Contender("null model, eta 0.0, shape 1x4", "fastddim", "diffusers"): 1 / 8,
                Contender("head, load 2.0", "stream", "one after the other"): 0.2,
            }
        )

    @pytest.mark.parametrize(
        "name", ["step-cpu", "dropins-cpu", "loops-cpu", "sampling-cpu", "stream-cpu"]
    )
    def test_of_committed_results(self, name: str) -> None:
        """Every row of every committed result has a reference, and a name of its own."""
        rows = result_of(name)["rows"]
        found = multiples(rows)
        assert len({contender.case for contender in found}) == len(rows)
        assert all(value > 0 for value in found.values())

    def test_a_row_without_a_reference(self) -> None:
        with pytest.raises(SystemExit, match=r"^mine: expected one of floor, original"):
            multiples([{"case": "mine", "timings": {"fastddim": {"ratio": 1.0}}}])

    def test_changes_are_medians_of_the_rounds(self) -> None:
        one, two, three = (Contender(case, "fastddim", "floor") for case in "abc")
        base = [{one: 1.0, two: 2.0}, {one: 2.0, two: 2.0}, {one: 4.0, two: 2.0}]
        head = [{one: 2.0, three: 1.0}, {one: 3.0, three: 1.0}, {one: 2.0, three: 1.0}]
        found = changes(base, head)
        assert found == {one: Change(2.0, 2.0, [2.0, 1.5, 0.5])}
        text = report(found, set(base[0]), set(head[0]))
        assert "| a | fastddim | floor | 2 | 2 | 1.5 | 0.5 to 2 |  |" in text
        assert text.endswith("Only base has:\n- b: fastddim\n\nOnly head has:\n- c: fastddim")

    @pytest.mark.parametrize(
        ("ratios", "verdict"),
        [([1.1, 1.2], "slower"), ([0.9, 0.8], "faster"), ([0.9, 1.1], ""), ([1.0, 1.1], "")],
    )
    def test_a_verdict_is_of_all_rounds(self, ratios: list[float], verdict: str) -> None:
        assert Change(1.0, 1.0, ratios).verdict == verdict

    def test_nothing_in_common(self) -> None:
        assert report({}, set(), set()) == "No case is in both commits."


class TestTwoCommits:
    """Comparisons of two commits of a repository whose package says how fast it is."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name, content in STUB.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content, encoding="utf-8")
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        for arguments in (("init",), ("add", "."), (*author, "commit", "-m", "first")):
            subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
        return tmp_path

    def test_a_commit_and_the_working_tree(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (root / "fastddim/__init__.py").write_text("MULTIPLE = 1.5\n")
        bench = root / "benchmarks/bench_stub.py"
        text = bench.read_text(encoding="utf-8")
        text = text.replace('["one", "removed"], ids=["η = 1", "η = 2"]', '["one", "new"]')
        bench.write_text(text, encoding="utf-8")
        found = compare.compare("HEAD", "bench_stub", 2, "one or new", root)
        assert "| one | fastddim | floor | 2 | 1.5 | 0.75 | 0.75 to 0.75 | faster |" in found
        assert found.endswith(
            "Only base has:\n- removed: fastddim\n\nOnly head has:\n- new: fastddim"
        )
        told = capsys.readouterr().err
        assert "-k 'one or new' selects nothing in base: all of it runs" in told
        rounds = re.findall(r"round (\d) of 2: (\w+)", told)
        assert rounds == [("1", "base"), ("1", "head"), ("2", "head"), ("2", "base")]
        trees = subprocess.run(
            ["git", "worktree", "list"], cwd=root, check=True, capture_output=True, text=True
        )
        assert len(trees.stdout.splitlines()) == 1
        assert not any((root / "build/compare" / name).exists() for name in ("base", "head"))
        assert "MULTIPLE = 1.5" in (root / "fastddim/__init__.py").read_text()

    def test_what_is_not_there(self, root: Path) -> None:
        with pytest.raises(SystemExit, match=r"^git worktree add .*invalid reference: nothing"):
            compare.compare("nothing", "bench_stub", 1, None, root)
        with pytest.raises(SystemExit, match=r"^bench: expected a module .* base lacks it"):
            compare.compare("HEAD", "bench_other", 1, None, root)

    def test_a_benchmark_that_fails_shows_why(self, root: Path) -> None:
        (root / "fastddim/__init__.py").write_text("raise RuntimeError('broken here')\n")
        with pytest.raises(SystemExit, match=r"(?s)broken here.*status 2$"):
            compare.compare("HEAD", "bench_stub", 1, None, root)

    def test_rounds_are_counted_from_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            compare.main(["HEAD", "--rounds", "0"])
        assert "--rounds: expected 1 or more, got 0" in capsys.readouterr().err
