"""The GPU check without a GPU: its runner under stages that go wrong, its results, a dry run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from gpucheck import (
    kit,
    measures,
    memcheck,
    prepare,
    provenance,
    record,
    results,
    suite,
    table,
    timing,
)
from gpucheck.cases import CASES, OUTPUTS, differing
from gpucheck.device import Moved, on_device
from gpucheck.record import Record
from gpucheck.settings import Settings
from gpucheck.stages import counters, ddpm, environment, loops, policies, smoke
from gpucheck.timing import difference, full_precision, spread
from loops import MODELS
from policy_networks import NETWORKS
from torch import Tensor

import fastddim
from fastddim import backends, ops
from fastddim.philox import Keys

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RUN = BENCHMARKS / "gpucheck" / "run.sh"
CPU = torch.device("cpu")

needs_extension = pytest.mark.skipif(
    ops.EXTENSION_ERROR is not None, reason=str(ops.EXTENSION_ERROR)
)


@pytest.fixture
def log(tmp_path: Path) -> Record:
    return Record(tmp_path, "a stage", time.time())


def rows(folder: Path, stage: str | None = None) -> list[dict[str, Any]]:
    return [row for row in record.lines(folder) if stage in (None, row["stage"])]


# Bodies of `run(record, settings)`. Each says first what it found.
ODD_STAGES = {
    "works": "record.row(found=1)",
    "differs": "record.row(found=2); record.problem(wrong=3)",
    "raises": "record.row(found=3); raise ValueError('no good')",
    "leaves": "record.row(found=4); sys.exit(0)",
    "lacks": "record.row(found=5); import a_package_that_is_not_there",
    "is_killed": "record.row(found=6); os.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "record.row(found=7); os.abort()",
    "hangs": """
        child = subprocess.Popen(["sleep", "600"])
        record.row(found=8, child=child.pid)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    """,
    "leaves_a_child": """
        child = subprocess.Popen(["sleep", "600"])
        record.row(found=9, child=child.pid)
    """,
    "fresh": "record.row(found=10)",
    "too_long": "record.row(found=99)",
    "after_all": "record.row(found=11)",
}
ENDS = {
    "works": "ok",
    "differs": "failed",
    "raises": "failed",
    "leaves": "failed",
    "lacks": "lacking",
    "is_killed": "killed by SIGKILL",
    "aborts": "killed by SIGABRT",
    "hangs": "out of time",
    "leaves_a_child": "ok",
    "fresh": "ok",
    "too_long": "not begun",
    "after_all": "ok",
}
LIMITS = {"hangs": 5.0}
# Of the hour that the whole may take.
LEAST = {"too_long": 36000.0}

CHECK = """
import time
from pathlib import Path
from gpucheck import runner
from gpucheck.settings import Settings
from gpucheck.table import Stage
settings = Settings(Path({out!r}), Path("."), Path("."), True, time.time())
said = []
runner.run_all({stages!r}, settings, 3600, said.append, package="odd")
print({{outcome.name: outcome.result for outcome in said}})
"""


def run_odd_stages(out: Path, folder: Path) -> dict[str, str]:
    """The end of each stage, told in a process of its own: the runner forks."""
    package = folder / "odd"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, body in ODD_STAGES.items():
        lines = [line.strip() for line in body.strip().splitlines()]
        run = "\n    ".join(["def run(record, settings):", *lines])
        (package / f"{name}.py").write_text(f"import os, signal, subprocess, sys, time\n{run}\n")
    stages = [
        table.Stage(name, LIMITS.get(name, 300), LEAST.get(name, 1), "", name == "fresh")
        for name in ODD_STAGES
    ]
    path = os.pathsep.join((str(folder), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(out=str(out), stages=stages)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends: dict[str, str] = ast.literal_eval(done.stdout.splitlines()[-1])
    return ends


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of the results, and how each odd stage ended."""
    out = tmp_path_factory.mktemp("out")
    return out, run_odd_stages(out, tmp_path_factory.mktemp("stages"))


class TestRunner:
    """Stages that go wrong, one after the other."""

    @pytest.mark.parametrize(("stage", "end"), ENDS.items())
    def test_the_end_is_reported(
        self, ran: tuple[Path, dict[str, str]], stage: str, end: str
    ) -> None:
        out, ends = ran
        assert ends[stage] == end
        (written,) = [row for row in rows(out, "runner") if row.get("ends") == stage]
        assert written["result"] == end

    def test_nothing_found_is_lost(self, ran: tuple[Path, dict[str, str]]) -> None:
        found = [row["found"] for row in rows(ran[0]) if "found" in row]
        assert found == list(range(1, len(ODD_STAGES)))

    def test_the_record_says_what_went_wrong(self, ran: tuple[Path, dict[str, str]]) -> None:
        out, _ = ran
        problems = {row["stage"]: row for row in rows(out) if row.get("problem")}
        assert set(problems) == {"differs", "raises", "leaves"}
        assert problems["raises"]["error"] == "ValueError: no good"
        (lacking,) = [row["lacks"] for row in rows(out) if "lacks" in row]
        assert lacking == "the Python package a_package_that_is_not_there"

    def test_the_log_says_where(self, ran: tuple[Path, dict[str, str]]) -> None:
        text = (ran[0] / "log.txt").read_text()
        assert "ValueError: no good" in text
        # The place where it hung, written before the limit.
        hung = text.partition("===== hangs")[2].partition("=====")[0]
        assert 'odd/hangs.py", line 6 in run' in hung

    @pytest.mark.parametrize("stage", ["hangs", "leaves_a_child"])
    def test_no_process_is_left(self, ran: tuple[Path, dict[str, str]], stage: str) -> None:
        (pid,) = [row["child"] for row in rows(ran[0], stage) if "child" in row]
        status = Path(f"/proc/{pid}/status")
        # Killed, though init may not have read its exit code yet.
        assert not status.exists() or "State:\tZ" in status.read_text()


class TestRecord:
    def test_a_problem_outweighs_what_is_lacking(self, log: Record, tmp_path: Path) -> None:
        log.row(a=1)
        assert log.code == record.OK
        log.lacks("a tool")
        assert log.code == record.LACKING
        log.problem(b=2)
        assert log.code == record.FAILED
        log.lacks("another")
        assert log.code == record.FAILED

    def test_attempt(self, log: Record, tmp_path: Path) -> None:
        assert log.attempt(lambda: 3) == 3
        assert log.code == record.OK
        assert log.attempt(lambda: 1 // 0, case="a") is None
        assert log.code == record.FAILED
        (row,) = rows(tmp_path)
        assert row["case"] == "a"
        assert row["error"].startswith("ZeroDivisionError")

    def test_a_line_that_was_cut_off_is_left_out(self, log: Record, tmp_path: Path) -> None:
        log.row(a=1)
        start = record.size(tmp_path)
        with (tmp_path / record.NAME).open("a") as file:
            file.write('{"stage": "a st')
        assert [row["a"] for row in record.lines(tmp_path)] == [1]
        assert list(record.lines(tmp_path, start)) == []


MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580", "torch": "2.11.0", "commit": "abc"}


def a_call(folder: Path, ends: dict[str, str], mark: int = 0, **machine: Any) -> Path:
    """The record of a call of the check, or one more in a record that is there."""
    folder.mkdir(exist_ok=True)
    runner = Record(folder, record.RUNNER, time.time())
    runner.row(machine={**MACHINE, **machine})
    for name, end in ends.items():
        if end != "not begun":
            runner.row(begins=name)
            Record(folder, name, time.time()).show(mark=mark)
        if end != "cut off":
            runner.row(ends=name, result=end, seconds=1.0)
    return folder


class TestResults:
    def test_two_runs_are_one(self, tmp_path: Path) -> None:
        first = a_call(tmp_path / "1", {"smoke": "ok", "loops": "not begun", "bits": "failed"}, 1)
        second = a_call(tmp_path / "2", {"loops": "ok", "bits": "ok", "smoke": "not begun"}, 2)
        result = results.gather([first, second])
        ends = {end["name"]: end["result"] for end in result["stages"]}
        assert list(ends.items()) == [("smoke", "ok"), ("bits", "ok"), ("loops", "ok")]
        marks = [(row["stage"], row["mark"]) for row in result["rows"]]
        assert marks == [("smoke", 1), ("bits", 2), ("loops", 2)]
        assert all("show" not in row for row in result["rows"])

    def test_two_calls_into_one_folder(self, tmp_path: Path) -> None:
        a_call(tmp_path, {"smoke": "failed"}, 1)
        a_call(tmp_path, {"smoke": "ok", "bits": "not begun"}, 2)
        result = results.gather([tmp_path])
        assert [row["mark"] for row in result["rows"]] == [2]
        assert [end["result"] for end in result["stages"]] == ["ok", "not begun"]

    def test_a_check_that_was_killed(self, tmp_path: Path) -> None:
        result = results.gather([a_call(tmp_path, {"smoke": "ok", "bits": "cut off"})])
        assert [end["result"] for end in result["stages"]] == ["ok", "cut off"]
        assert [row["stage"] for row in result["rows"]] == ["smoke", "bits"]

    @pytest.mark.parametrize("key", ["gpu", "commit", "torch"])
    def test_other_machines_are_not_mixed(self, tmp_path: Path, key: str) -> None:
        first = a_call(tmp_path / "1", {"smoke": "ok"})
        second = a_call(tmp_path / "2", {"bits": "ok"}, **{key: "other"})
        with pytest.raises(ValueError, match=f"expected the same {key} in all, got .* 'other'"):
            results.gather([first, second])

    @pytest.mark.parametrize("gpu", [MACHINE["gpu"], "dry run"])
    def test_dry_runs_are_not_collected(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str
    ) -> None:
        out = a_call(tmp_path / "out", {"smoke": "ok"}, gpu=gpu)
        monkeypatch.setattr(sys, "argv", ["results", str(out), "--into", str(tmp_path)])
        if gpu == "dry run":
            with pytest.raises(SystemExit):
                results.main()
        else:
            results.main()
        written = [file.name for file in tmp_path.glob("gpu-*.json")]
        assert written == ([] if gpu == "dry run" else ["gpu-h100.json"])

    def test_a_folder_without_a_check(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"OUT: expected a folder with results\.jsonl"):
            results.gather([tmp_path])

    def test_the_file_gains_stages_of_the_same_code(self, tmp_path: Path) -> None:
        for number, commit, expected in (
            (1, "abc", ["smoke"]),
            (2, "abc", ["smoke", "bits"]),
            (3, "other", ["loops"]),
        ):
            name = ["smoke", "bits", "loops"][number - 1]
            result = results.gather([a_call(tmp_path / str(number), {name: "ok"}, commit=commit)])
            file = results.write(results.added(result, tmp_path), tmp_path)
            assert file.name == "gpu-h100.json"
            written = json.loads(file.read_text())
            assert [end["name"] for end in written["stages"]] == expected
            assert written["machine"]["commit"] == commit

    @pytest.mark.parametrize(
        ("gpu", "name"),
        [
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
            ("NVIDIA GeForce RTX 4090", "rtx-4090"),
            ("NVIDIA H200", "h200"),
            ("", "unknown"),
        ],
    )
    def test_names(self, gpu: str, name: str) -> None:
        assert results.name(gpu) == name


class TestMoved:
    def test_a_view_stays_what_it_is(self) -> None:
        """A view on the device keeps its strides, its offset, its surroundings, and the views that
        share its memory.
        """
        buffer = torch.arange(20, dtype=torch.float32)
        x, y = buffer[3:15].view(3, 4).t(), buffer[3:]
        moved = Moved(CPU)
        copy, shared, again = moved.there(x), moved.there(y), moved.there(x)
        assert torch.equal(copy, x)
        assert (copy.stride(), copy.storage_offset()) == (x.stride(), 3)
        assert copy.data_ptr() != x.data_ptr()
        assert copy.data_ptr() == shared.data_ptr() == again.data_ptr()
        assert copy.data_ptr() % 16 == 12

    def test_what_is_written_comes_back(self) -> None:
        buffer = torch.zeros(8)

        def function(x: Tensor, *, keys: Keys, out: Tensor, other: None) -> None:
            assert x.data_ptr() == out.data_ptr() != view.data_ptr()
            assert [key.item() for key in keys] == [1, 2, 3]
            out.fill_(1)
            # Beside the view, as a faulty kernel would.
            out.as_strided((1,), (1,), 5).fill_(2)

        view = buffer[2:5]
        keys = Keys(*(torch.tensor([i]) for i in (1, 2, 3)))
        on_device(function, CPU)(view, keys=keys, out=view, other=None)
        assert buffer.tolist() == [0, 0, 1, 1, 1, 2, 0, 0]

    def test_nothing_to_move(self) -> None:
        moved = Moved(CPU)
        assert moved.there(torch.empty(0, 3)).shape == (0, 3)
        assert moved.there(None) is None
        assert moved.there("x") == "x"


def off_by_one_bit(function: Callable[..., None]) -> Callable[..., None]:
    """An update whose last element is not right."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def call(**arguments: Any) -> None:
        function(**arguments)
        out = arguments["out"]
        out.view(integers[out.element_size()]).view(-1)[-1:].bitwise_xor_(1)

    return call


@needs_extension
class TestSmoke:
    def test_one_bit_is_a_problem(self, log: Record, tmp_path: Path) -> None:
        update_out = backends.BACKENDS["cpu"].update_out
        smoke.compare(log, "cpu", on_device(update_out, CPU))
        assert log.code == record.OK
        assert len(rows(tmp_path)) == len(CASES)
        smoke.compare(log, "broken", off_by_one_bit(update_out))
        assert log.code == record.FAILED
        problems = [row for row in rows(tmp_path) if row.get("problem")]
        assert {row["case"] for row in problems} == set(CASES)
        assert {row["wrong"]["out"] for row in problems} == {1}

    def test_what_is_not_written_is_wrong(self) -> None:
        case = CASES["everything"]
        arguments = case.arguments()
        outputs = {name: arguments[name].numel() for name in OUTPUTS}
        assert differing(lambda **arguments: None, case) == outputs

    def test_misaligned_is_misaligned(self) -> None:
        arguments = CASES["misaligned"].arguments()
        for name in ("x", "model_output", "out"):
            assert arguments[name].storage_offset() == 1
            assert arguments[name].data_ptr() % 16 == 4

    def test_a_tensor_ends_with_its_memory(self) -> None:
        """A tensor ends with its memory, so that memcheck sees reads beyond it."""
        for case in CASES.values():
            for value in case.arguments().values():
                if isinstance(value, Tensor):
                    end = value.storage_offset() + value.numel()
                    assert end * value.element_size() == value.untyped_storage().nbytes()

    def test_an_implementation_that_is_not_there(
        self, log: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Settings, "implementations", ("cuda", "cpu"))
        smoke.run(log, settings_of(tmp_path))
        assert log.code == record.FAILED
        (problem,) = [row for row in rows(tmp_path) if row.get("problem")]
        assert problem["impl"] == "cuda"
        assert len([row for row in rows(tmp_path) if row.get("case")]) == len(CASES)


def settings_of(folder: Path) -> Settings:
    return Settings(folder, ROOT, folder, dry=True, began=time.time(), seconds=60)


class TestSuite:
    REPORT = """<testsuites><testsuite>
        <testcase name="test_a[cuda]" /><testcase name="test_b[cuda]" />
        <testcase name="test_a[triton]"><skipped message="triton: is not there" /></testcase>
        {}
        </testsuite></testsuites>"""

    def judged(self, log: Record, folder: Path, more: str = "") -> list[dict[str, Any]]:
        (folder / "report.xml").write_text(self.REPORT.format(more))
        suite.judge(log, suite.read(folder / "report.xml"), ("cuda", "triton"))
        return rows(folder)

    def test_a_skipped_implementation_is_a_failure(self, log: Record, tmp_path: Path) -> None:
        counts, problem = self.judged(log, tmp_path)
        assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 0, 1)
        assert counts["why_skipped"] == ["triton: is not there"]
        assert problem["tests"] == "no test with 'triton' in its name passed"
        assert log.code == record.FAILED

    def test_all_is_well(self, log: Record, tmp_path: Path) -> None:
        (counts,) = self.judged(log, tmp_path, '<testcase name="test_b[triton]" />')
        assert counts["passed"] == 3
        assert log.code == record.OK

    @pytest.mark.parametrize("kind", ["failure", "error"])
    def test_failures(self, log: Record, tmp_path: Path, kind: str) -> None:
        bad = f'<testcase name="test_c[triton]"><{kind} message="differs" /></testcase>'
        counts, failure, _ = self.judged(log, tmp_path, bad)
        assert counts["failed"] == 1
        assert failure["test"] == "test_c[triton]"
        assert failure["message"] == "differs"
        assert log.code == record.FAILED


class TestLoops:
    def test_contenders_that_disagree_or_fail(self, log: Record, tmp_path: Path) -> None:
        def fails() -> Tensor:
            raise RuntimeError("no graph")

        contenders = {
            "graph=False": lambda: torch.full((3,), 100.0),
            "close": lambda: torch.tensor([100.0, 100.1, 100.0]),
            "far": lambda: torch.tensor([100.0, 100.3, 100.0]),
            "nan": lambda: torch.tensor([100.0, float("nan"), 100.0]),
            "fails": fails,
            "diffusers": lambda: torch.zeros(3),
        }
        alive = loops.agreeing(log, contenders, base="graph=False", other_noise=True)
        assert list(alive) == ["graph=False", "close", "far", "nan", "diffusers"]
        problems = [row["contender"] for row in rows(tmp_path) if row.get("problem")]
        assert problems == ["fails", "far", "nan"]

    def test_tf32_is_allowed_for_where_it_is_on(self, log: Record) -> None:
        contenders = {
            "graph=False": lambda: torch.full((3,), 100.0),
            "close": lambda: torch.tensor([100.0, 101.0, 100.0]),
        }
        allowed = {"most": loops.TF32_AGREEMENT, "precise": False}
        loops.agreeing(log, contenders, base="graph=False", **allowed)
        assert log.code == record.OK
        contenders["far"] = lambda: torch.tensor([100.0, 103.0, 100.0])
        loops.agreeing(log, contenders, base="graph=False", **allowed)
        assert log.code == record.FAILED

    def test_full_precision_is_for_the_comparison_alone(self) -> None:
        before = torch.backends.cudnn.allow_tf32
        with full_precision():
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == before

    def test_the_time_until_a_call_returns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The time until a call returns leaves out the wait for the device, and no call begins
        after the limit.
        """
        clock = iter(range(1000))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
        awaited: list[torch.device] = []
        monkeypatch.setattr(timing, "wait", awaited.append)
        # A call is two looks at the clock, and one more asks whether there is time.
        assert timing.seconds_to_return(lambda: None, CPU, most=8.0) == [1.0, 1.0, 1.0]
        assert awaited == [CPU] * 4
        assert len(timing.seconds_to_return(lambda: None, CPU, most=1e9)) == timing.CALLS

    def test_numbers(self) -> None:
        assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
        assert spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}
        assert spread([1.0, 2.0, 3.0, 4.0])["median"] == 2.5


def test_counters_are_read() -> None:
    text = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","9","update_kernel","dram__bytes.sum","Mbyte","805.3"
"0","9","update_kernel","launch__registers_per_thread","register/thread","32"
"1","9","update_kernel","dram__bytes.sum","Mbyte","805.9"
"""
    first, second = counters.parse(text)
    assert first["dram__bytes.sum"] == "805.3 Mbyte"
    assert first["launch__registers_per_thread"] == "32 register/thread"
    assert second == {"kernel": "update_kernel", "dram__bytes.sum": "805.9 Mbyte"}
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM") == []


class TestMemcheck:
    """memcheck, by stand-ins for compute-sanitizer, which run the program and end as it would."""

    @pytest.fixture
    def tool(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        def install(script: str) -> None:
            file = tmp_path / "compute-sanitizer"
            file.write_text(f"#!/bin/bash\n{script}\n")
            file.chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

        return install

    def check(self, folder: Path) -> str | None:
        return memcheck.memcheck(["cuda"], torch.device("cuda"), folder / "memcheck.txt", limit=60)

    def test_findings(self, tool: Callable[[str], None], tmp_path: Path) -> None:
        tool(f'echo "Invalid read of size 4" > {tmp_path}/memcheck.txt; exit 9')
        assert "Invalid read of size 4" in str(self.check(tmp_path))

    def test_wrong_results(self, tool: Callable[[str], None], tmp_path: Path) -> None:
        tool("exit 3")
        assert self.check(tmp_path) == "results differ from those of the CPU"

    def test_the_program_fails(self, tool: Callable[[str], None], tmp_path: Path) -> None:
        tool("exit 1")
        assert self.check(tmp_path) == "exit code 1"

    def test_what_is_run(self, tool: Callable[[str], None], tmp_path: Path) -> None:
        tool(f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $PYTHONSAFEPATH $@" > {tmp_path}/words')
        assert self.check(tmp_path) is None
        words = (tmp_path / "words").read_text()
        assert words.startswith("1 1 --tool memcheck --error-exitcode 9 --log-file ")
        assert words.endswith("-m gpucheck.cases cuda cuda\n")


def test_what_a_gpu_would_measure_is_what_is_predicted() -> None:
    on_gpu = Settings(ROOT, ROOT, ROOT, dry=False, began=0.0)
    assert on_gpu.implementations == measures.IMPLEMENTATIONS
    assert [f"graph={mode}" for mode in on_gpu.modes] == list(measures.LOOP_CONTENDERS[:-1])
    assert ddpm.contenders(None, torch.zeros(1), ddpm.FEW, ddpm.MANY, on_gpu.modes).keys() == set(
        measures.DDPM_CONTENDERS
    )
    assert set(measures.LOOP_ETAS) <= set(MODELS)
    assert list(measures.POLICIES) == list(NETWORKS)


class TestKit:
    def test_unpacked_elsewhere(self, tmp_path: Path) -> None:
        """The Triton cache works elsewhere: it names absolute paths, which here are those of its
        new place.
        """
        packed, work = tmp_path / "kit", tmp_path / "work"
        for folder in (packed / kit.SITE / "fastddim", packed / kit.WHEELS, work):
            folder.mkdir(parents=True)
        (packed / kit.SITE / "fastddim" / "__init__.py").touch()
        with zipfile.ZipFile(packed / kit.WHEELS / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("a.py", "")
        with zipfile.ZipFile(packed / kit.KERNELS, "w") as cache:
            group = {"child_paths": {"k.cubin": "/made/elsewhere/KEY/k.cubin"}}
            cache.writestr("KEY/__grp__k.json", json.dumps(group))
            cache.writestr("KEY/k.cubin", "code")
        kit.unpack(packed, work)
        assert (work / "site" / "fastddim" / "__init__.py").exists()
        assert (work / "site" / "a.py").exists()
        moved = json.loads((work / "triton" / "KEY" / "__grp__k.json").read_text())
        assert Path(moved["child_paths"]["k.cubin"]).read_text() == "code"

    def test_prepared_for_the_gpu_machine_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ["--kit", str(tmp_path / "kit"), "--torch", "1.0", "--python", "2.7"]
        monkeypatch.setattr(sys, "argv", ["prepare", *words])
        monkeypatch.setattr(prepare, "nvcc_release", lambda home: "12.4")
        with pytest.raises(SystemExit, match=r"torch: expected 1\.0, got") as refused:
            prepare.main()
        message = str(refused.value)
        assert "python: expected 2.7, got 3." in message
        assert "nvcc: expected 13.0, got 12.4" in message
        assert list(tmp_path.iterdir()) == []


def test_the_package_is_in_small_files() -> None:
    for file in (BENCHMARKS / "gpucheck").rglob("*.*"):
        if file.suffix in (".py", ".sh", ".c"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def run_check(
    out: Path, *words: str, under: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """The check as its one command, in a rehearsal."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [*under, "bash", str(RUN), str(out), *words],
        cwd=out.parent,
        env={
            **inherited,
            "GPUCHECK_PYTHON": sys.executable,
            "GPUCHECK_DRY": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def unshared() -> tuple[str, ...]:
    """A command that takes the network away from another one; empty if that is not allowed."""
    for words in (("unshare", "-n"), ("unshare", "-rn")):
        if shutil.which("unshare") and not subprocess.run([*words, "true"], check=False).returncode:
            return words
    return ()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit that holds a copy of the package under test."""
    folder = tmp_path_factory.mktemp("kit")
    package = folder / kit.SITE / "fastddim"
    shutil.copytree(Path(fastddim.__file__).parent, package)
    kernels = importlib.import_module("fastddim.kernels")
    shutil.copytree(Path(kernels.__file__).parent, package / "kernels", dirs_exist_ok=True)
    facts = {
        **{key: harness.machine()[key] for key in ("commit", "modified", "fastddim")},
        **{name: harness.version_of(name) for name in ("torch", "triton")},
        "nvcc": "13.0",
        "sources": provenance.digest(ROOT),
    }
    (folder / "kit.json").write_text(json.dumps(facts))
    return folder


class TestSources:
    """A check with a kit of other sources is a problem, whatever git says of either."""

    def test_every_source_counts(self, tmp_path: Path) -> None:
        for folder in provenance.SOURCES:
            (tmp_path / folder / "inner").mkdir(parents=True)
        digests = {provenance.digest(tmp_path)}
        for name in ("csrc/a.h", "csrc/inner/b.cu", "fastddim/c.py", "kernels/d.py", "tests/e.cpp"):
            (tmp_path / name).write_text("")
            digests.add(provenance.digest(tmp_path))
            (tmp_path / name).write_text("1")
            digests.add(provenance.digest(tmp_path))
        assert len(digests) == 11
        last = provenance.digest(tmp_path)
        (tmp_path / "fastddim/_C.so").write_text("a build is no source")
        assert provenance.digest(tmp_path) == last

    @pytest.mark.parametrize("same", [True, False])
    def test_the_kit_is_of_the_checkout(
        self, same: bool, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        facts = json.loads((prepared / "kit.json").read_text())
        facts["sources"] = facts["sources"] if same else "others"
        (tmp_path / "kit.json").write_text(json.dumps(facts))
        monkeypatch.setenv("GPUCHECK_KIT", str(tmp_path))
        log = Record(tmp_path, "environment", 0.0)
        # The package under test is found below the folder of the kit.
        work = Path(fastddim.__file__).resolve().parents[1]
        environment._package(log, Settings(tmp_path, ROOT, work, True, 0.0))
        assert log.code == (record.OK if same else record.FAILED)


@pytest.fixture(scope="module")
def stages(pytestconfig: pytest.Config) -> tuple[table.Stage, ...]:
    """The rehearsed stages: all of them with `--deep`."""
    return table.select("" if pytestconfig.getoption("--deep") else "environment,smoke,bits")


@pytest.fixture(scope="module")
def out(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, stages: tuple[table.Stage, ...]
) -> Path:
    """The results of the check, run without a network if possible."""
    out = tmp_path_factory.mktemp("dry") / "out"
    names = ",".join(stage.name for stage in stages)
    done = run_check(out, "3000", names, under=unshared(), GPUCHECK_KIT=str(prepared))
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    (out.parent / "stdout").write_text(done.stdout)
    return out


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    (file,) = out.glob("gpu-*.json")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


@needs_extension
class TestDryRun:
    def test_every_stage_is_ok(
        self, out: Path, result: dict[str, Any], stages: tuple[table.Stage, ...]
    ) -> None:
        ends = {end["name"]: end["result"] for end in result["stages"]}
        assert ends == {stage.name: "ok" for stage in stages}
        # One line each, as it ends; and once more at the end.
        said = (out.parent / "stdout").read_text()
        for stage in stages:
            assert len(re.findall(rf"^{stage.name} +ok +[\d.]+ s$", said, re.MULTILINE)) == 2

    def test_the_package_of_the_kit_is_tested(self, result: dict[str, Any]) -> None:
        (tested,) = [row["tested"] for row in result["rows"] if "tested" in row]
        assert tested.endswith("/site/fastddim/__init__.py")
        assert not Path(tested).is_relative_to(ROOT)

    @pytest.mark.deep
    def test_what_is_measured(self, result: dict[str, Any]) -> None:
        measured = {row["measure"]: row for row in result["rows"] if "measure" in row}
        expected = {
            "update, cpu, float32, eta 0, 1 MiB",
            "update, cpu, bfloat16, eta 1, 1 MiB",
            "loop, null model, eta 1, graph=False",
            "loop, diffusers U-Net, eta 0, diffusers",
            "latent U-Net, diffusers",
            "latent U-Net, graph=False",
            "latent U-Net, network alone",
            "ddpm, digits U-Net, diffusers DDIM, 2",
            "ddpm, digits U-Net, diffusers DDPM, 4",
            "ddpm, fashion U-Net, fastddim, 2",
            "ddpm, fashion U-Net, fastddim, 4",
            "compiled, policy head, torch.compile",
            "policy, MLP, network alone",
            "policy, MLP, graph=False",
        }
        assert expected <= set(measured)
        for row in measured.values():
            seconds = row["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert measured["update, cpu, float32, eta 0, 1 MiB"]["copy_bytes_per_second"] > 0
        with_call = {name for name, row in measured.items() if "host_seconds" in row}
        assert with_call == {
            *(
                measures.loop(model, eta, mode)
                for mode in ("graph=False", "graph=auto")
                for model, etas in measures.LOOP_ETAS.items()
                for eta in etas
            ),
            *(
                measures.policy(network, contender)
                for network in policies.DRY_POLICIES
                for contender in ("network alone", "graph=False")
            ),
        }
        for name in with_call:
            assert measured[name]["host_seconds"]["median"] > 0

    def test_where_it_comes_from(self, result: dict[str, Any]) -> None:
        machine = result["machine"]
        assert machine["gpu"] == "dry run"
        assert machine["commit"] == harness.machine()["commit"]
        assert machine["torch"] == torch.__version__
        assert {"modified", "python", "triton", "cuda", "nvcc", "diffusers"} <= set(machine)

    def test_few_files_with_plain_names(self, out: Path) -> None:
        files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
        assert {"results.jsonl", "log.txt", "summary.txt"} <= {file.name for file in files}
        # On a GPU memcheck's log is one more.
        assert len(files) <= 7
        for file in files:
            assert len(file.parts) <= 3
            assert re.fullmatch(r"[A-Za-z0-9._/-]+", str(file))

    @pytest.mark.usefixtures("out")
    def test_no_network_is_needed(self) -> None:
        if not unshared():
            pytest.skip("unshare cannot take the network away here")

    def test_without_diffusers_it_says_so(self, tmp_path: Path) -> None:
        """Without diffusers the check says so, and measures the rest."""
        site = tmp_path / "kit" / kit.SITE
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text("import sys; sys.modules['diffusers'] = None")
        out = tmp_path / "out"
        done = run_check(out, "3000", "latent_unet,ddpm", GPUCHECK_KIT=str(tmp_path / "kit"))
        assert done.returncode == 0, done.stdout + done.stderr
        result = results.gather([out])
        ends = {end["name"]: end["result"] for end in result["stages"]}
        assert ends == {"latent_unet": "lacking", "ddpm": "lacking"}
        lacking = {row["lacks"] for row in result["rows"] if "lacks" in row}
        assert lacking == {"the Python package diffusers"}
        assert "lacks': 'the Python package diffusers" in done.stdout
        measured = {row["measure"] for row in result["rows"] if "measure" in row}
        names = ("digits U-Net", "fashion U-Net")
        assert measured == {f"ddpm, {name}, fastddim, {n}" for name in names for n in (2, 4)}


def test_unknown_stages_are_refused(tmp_path: Path) -> None:
    done = run_check(tmp_path / "out", "20", "smoke,odd", GPUCHECK_KIT=str(tmp_path / "kit"))
    assert done.returncode == 2
    assert "stages: expected names among environment, smoke" in done.stdout
    assert "got odd" in done.stdout
