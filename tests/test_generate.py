"""Many samples: the same bytes whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import fastddim
from fastddim import runs
from fastddim.cli import main
from fastddim.files import atomic_file
from fastddim.images import load_png, to_uint8
from fastddim.runs import ManifestMismatchError, generation, lock, memory
from fastddim.runs.lock import FILE as LOCK
from fastddim.runs.shards import FORMATS, write_batch

from .support.models import SmallNet
from .support.probes import torch_threads

SHAPE = (3, 4, 4)
COUNT = 22
ARGUMENTS = {"stop": COUNT, "shape": (4, *SHAPE), "eta": 0.5, "seed": 5}

# A run that ends by SIGKILL in the 9th evaluation of the model, as often as `deaths` says.
DYING = """
import os, signal, sys
from pathlib import Path

import torch

import fastddim

out, deaths = Path(sys.argv[1]), int(sys.argv[2])


class Dying(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, t):
        self.calls += 1
        if self.calls == 9 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) < deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x, t)


net = Dying(fastddim.models.load("digits")).eval()
fastddim.generate(
    net, 3, out, stop=42, shape=(4, 1, 8, 8), eta=0.5, merged=out / "all.npz"
)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder, on one thread."""
    monkeypatch.chdir(tmp_path)
    with torch_threads(1):
        yield tmp_path


@pytest.fixture
def net():
    return SmallNet().eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def expected(net, first=0, stop=COUNT, steps=2):
    return fastddim.sample(
        net, steps, eta=0.5, seed=5, sample_offset=first, shape=(stop - first, *SHAPE)
    )


def interrupted(net, after, out="run", **arguments):
    """A run that an exception ends in some batch."""
    batches = []

    def stopping(step, *_):
        batches.append(step)
        if batches.count(0) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastddim.generate(net, 2, out, callback=stopping, **{**ARGUMENTS, **arguments})


def test_the_name_of_generate_is_that_of_the_function_alone():
    assert fastddim.generate is runs.generate
    assert importlib.util.find_spec("fastddim.generate") is None


class TestBytes:
    def test_samples_are_those_of_sample(self, net):
        run = fastddim.generate(net, 2, "run", merged="all.npz", **ARGUMENTS)
        assert (run.start, run.stop, run.batch_size, run.drawn) == (0, COUNT, 4, COUNT)
        with np.load("all.npz") as archive:
            assert archive.files == ["arr_0"]
            assert np.array_equal(archive["arr_0"], to_uint8(expected(net)))
        names = [f"samples-{i:010d}-{min(i + 4, COUNT):010d}" for i in range(0, COUNT, 4)]
        files = [name + end for name in names for end in (".npz", ".sha256")]
        assert sorted(os.listdir("run")) == sorted([*files, "manifest.json", LOCK])
        with np.load(f"run/{names[1]}.npz") as archive:
            assert np.array_equal(archive["arr_0"], to_uint8(expected(net, 4, 8)))

    def test_killed_restarted_and_on_two_ranks_the_bytes_are_those_of_one_process(
        self, run_python, folder
    ):
        Path("dying.py").write_text(DYING)
        environment = {
            "PYTHONPATH": str(Path(fastddim.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        result = run_python("dying.py", "run", "1", cwd=folder, env=environment)
        assert result.returncode == -signal.SIGKILL, result.stderr
        there = len(list(Path("run").glob("*.sha256")))
        assert 1 <= there <= 2
        Path("run/.fastddim-0123456789abcdef.part").write_text("half a shard")
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        result = run_python(
            *(*torchrun, "--max-restarts", "1", "dying.py", "run", "1"),
            cwd=folder,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        assert "Signal 9 (SIGKILL)" in result.stderr or "exitcode: -9" in result.stderr
        scope = {"__name__": "dying"}
        argv, sys.argv = sys.argv, ["dying.py", "alone", "0"]
        try:
            exec(compile(DYING, "dying.py", "exec"), scope)
        finally:
            sys.argv = argv
        assert contents("run") == contents("alone")

    @pytest.mark.parametrize("format", FORMATS)
    def test_resumed_run_is_the_uninterrupted_one(self, net, format):
        whole = fastddim.generate(net, 2, "whole", format=format, **ARGUMENTS)
        interrupted(net, 3, format=format)
        assert len(list(Path("run").glob("*.sha256"))) == 3
        Path("run/.fastddim-0123456789abcdef.part").write_text("half a shard")
        run = fastddim.generate(net, 2, "run", format=format, **ARGUMENTS)
        assert (run.drawn, run.digest) == (COUNT - 12, whole.digest)
        assert contents("run") == contents("whole")

    def test_digest_is_that_of_the_digests(self, net):
        run = fastddim.generate(net, 2, "run", **ARGUMENTS)
        records = b"".join(path.read_bytes() for path in sorted(Path("run").glob("*.sha256")))
        assert run.digest == hashlib.sha256(records).hexdigest() == runs.digest("run")
        for line in records.decode().splitlines():
            value, name = line.split("  ")
            assert hashlib.sha256(Path("run", name).read_bytes()).hexdigest() == value

    def test_time_and_place_leave_no_trace(self, net, monkeypatch):
        fastddim.generate(net, 2, "run", **ARGUMENTS)
        with zipfile.ZipFile("run/samples-0000000000-0000000004.npz") as archive:
            (entry,) = archive.infolist()
        assert (entry.date_time, entry.create_system) == ((1980, 1, 1, 0, 0, 0), 3)
        assert str(Path.cwd()) not in Path("run/manifest.json").read_text()

    def test_float32_shards(self, net):
        fastddim.generate(net, 2, "run", format="safetensors", **ARGUMENTS)
        shard = safetensors.torch.load_file("run/samples-0000000020-0000000022.safetensors")
        assert list(shard) == ["samples"]
        assert torch.equal(shard["samples"], expected(net, 20))

    def test_png_folder(self, net):
        fastddim.generate(net, 2, "run", format="png-folder", **{**ARGUMENTS, "start": 2})
        names = sorted(path.name for path in Path("run").glob("*.png"))
        assert names == [f"{i:06d}.png" for i in range(2, COUNT)]
        drawn = np.stack([load_png(Path("run", name), SHAPE) for name in names])
        assert np.array_equal(drawn, to_uint8(expected(net, 2)))

    def test_state_of_any_shape(self):
        def policy(x, t):
            return 0.5 * x

        arguments = {"stop": 3, "shape": (3, 5), "format": "safetensors"}
        fastddim.generate(policy, 2, "run", model_id="half", **arguments)
        shard = safetensors.torch.load_file("run/samples-0000000000-0000000003.safetensors")
        assert torch.equal(shard["samples"], fastddim.sample(policy, 2, seed=0, shape=(3, 5)))

    def test_numpy_integers_are_written_like_python_s(self, net):
        given = {"start": np.int64(2), "stop": np.int64(COUNT), "seed": np.uint8(5)}
        fastddim.generate(net, 2, "run", **{**ARGUMENTS, **given})
        fastddim.generate(net, 2, "same", **{**ARGUMENTS, "start": 2})
        assert contents("run") == contents("same")


class TestMerge:
    def test_parts_of_other_machines(self, net):
        fastddim.generate(net, 2, "b", **{**ARGUMENTS, "start": 10, "format": "safetensors"})
        fastddim.generate(net, 2, "a", **{**ARGUMENTS, "stop": 10, "shape": (3, *SHAPE)})
        assert runs.merge(["b", "a"], "all.npz") == Path("all.npz")
        with np.load("all.npz") as archive:
            assert np.array_equal(archive["arr_0"], to_uint8(expected(net)))

    def test_grey_becomes_rgb_which_evaluators_ask_for(self):
        grey = SmallNet(1).eval()
        fastddim.generate(
            grey, 2, "run", stop=5, shape=(5, 1, 4, 4), format="png-folder", merged="all.npz"
        )
        images = to_uint8(fastddim.sample(grey, 2, seed=0, shape=(5, 1, 4, 4)))
        with np.load("all.npz") as archive:
            assert archive["arr_0"].shape == (5, 4, 4, 3)
            assert np.array_equal(archive["arr_0"], images.repeat(3, axis=3))

    def test_what_does_not_belong_together_is_refused(self, net):
        fastddim.generate(net, 2, "a", **{**ARGUMENTS, "stop": 4})
        fastddim.generate(net, 2, "gap", **{**ARGUMENTS, "start": 8, "stop": 12})
        fastddim.generate(net, 2, "other", **{**ARGUMENTS, "start": 4, "stop": 8, "seed": 6})
        interrupted(net, 1, "half", start=4)
        for second, message in (
            ("gap", r"samples from 4 on to follow, got \[8, 12\) in gap"),
            ("other", r"expected parts of one run, got\n  seed: 5 in a, 6 in other"),
            ("half", r"half: expected a complete run, got none of the samples \[8, 12\)"),
        ):
            with pytest.raises(ValueError, match=message):
                runs.merge(["a", second], "all.npz")
        with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
            runs.merge("nowhere", "all.npz")
        with pytest.raises(ValueError, match="expected a complete run"):
            runs.digest("half")
        assert not Path("all.npz").exists()

    def test_other_versions_are_told(self, net):
        fastddim.generate(net, 2, "a", **{**ARGUMENTS, "stop": 4})
        fastddim.generate(net, 2, "b", **{**ARGUMENTS, "start": 4, "stop": 8})
        edit_manifest("b", lambda manifest: manifest["versions"].update(torch="1.0"))
        with pytest.warns(UserWarning, match=r'version of torch: ".*" in a, "1\.0" in b'):
            runs.merge(["a", "b"], "all.npz")


def edit_manifest(folder, edit):
    path = Path(folder, "manifest.json")
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


class TestManifest:
    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"seed": 6}, "seed: 5 in the folder, 6 here"),
            ({"eta": 0.0}, "eta: 0.5 in the folder, 0.0 here"),
            ({"stop": 20}, f"stop: {COUNT} in the folder, 20 here (a run can be continued to more"),
            ({"shape": (5, *SHAPE)}, "batch_size: 4 in the folder, 5 here"),
            ({"format": "safetensors"}, 'format: "npz" in the folder, "safetensors" here'),
            ({"dtype": torch.float64}, 'dtype: "float32" in the folder, "float64" here'),
            ({"impl": "reference"}, "here"),
            ({"clip": 1}, "clip: null in the folder, 1.0 here"),
            (
                {"schedule": fastddim.Schedule.cosine()},
                "noise levels of the schedule: others in the folder than here",
            ),
            ({"model_id": "mine"}, 'model_id: null in the folder, "mine" here'),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_another_run_is_refused_with_the_difference(self, net, change, line):
        if change.get("impl") == "reference" and "cpu" not in fastddim.backends.BACKENDS:
            pytest.skip("no compiled backend to differ from")
        interrupted(net, 2)
        before = contents("run")
        with pytest.raises(ManifestMismatchError, match=re.escape(line)):
            fastddim.generate(net, 2, "run", **{**ARGUMENTS, **change})
        assert contents("run") == before

    def test_other_timesteps_weights_and_threads_are_refused(self, net):
        interrupted(net, 2)
        with pytest.raises(ManifestMismatchError, match=r"steps: 2 in the folder, 3 here$"):
            fastddim.generate(net, 3, "run", **ARGUMENTS)
        with pytest.raises(
            ManifestMismatchError, match=r"weights of the model: others in the folder than here"
        ):
            fastddim.generate(SmallNet(seed=1).eval(), 2, "run", **ARGUMENTS)
        with (
            torch_threads(2),
            pytest.raises(ManifestMismatchError, match=r"threads: 1 in the folder, 2 here.*") as it,
        ):
            fastddim.generate(net, 2, "run", **ARGUMENTS)
        assert "last bits" in str(it.value)
        assert "torch.set_num_threads(1) or --threads 1" in str(it.value)

    def test_a_run_begun_alone_goes_on_under_torchrun_as_the_message_says(self, run_python, folder):
        digits = ("generate", "digits", "--steps", "2", "--batch-size", "4")
        command = ("-m", "fastddim.cli", *digits, "--out", "run")
        environment = {
            "PYTHONPATH": str(Path(fastddim.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",  # as torchrun sets it
        }
        with torch_threads(2):
            assert run(*digits, "--count", 14, "--out", "whole").exit_code == 0
            assert run(*digits, "--count", 6, "--out", "run").exit_code == 0
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
        told = run_python(*ranks, "1", *command, "--count", "14", cwd=folder, env=environment)
        assert "threads: 2 in the folder, 1 here" in told.stderr
        (advice,) = set(re.findall("or (--threads 2)", told.stderr))
        words = (*command, "--count", "14", *advice.split())
        result = run_python(*ranks, "2", *words, cwd=folder, env=environment)
        assert result.returncode == 0, result.stderr
        assert contents("run") == contents("whole")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', "[" * 100_000])
    def test_damaged_manifest_is_refused(self, net, text):
        interrupted(net, 1)
        Path("run/manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: expected the manifest of a run"):
            fastddim.generate(net, 2, "run", **ARGUMENTS)

    @pytest.mark.parametrize(
        "values", [{"batch_size": 0}, {"stop": 2**40}, {"sample_shape": [0]}, {"format": "../x"}]
    )
    def test_false_manifest_is_refused(self, net, values):
        fastddim.generate(net, 2, "run", **ARGUMENTS)
        edit_manifest("run", lambda manifest: manifest.update(values))
        with pytest.raises(ValueError, match=f"got .*{next(iter(values))}"):
            runs.digest("run")

    def test_links_are_not_followed(self, net):
        fastddim.generate(net, 2, "run", **ARGUMENTS)
        Path("mine").write_text("precious")
        shard = Path("run/samples-0000000004-0000000008.npz")
        whole = shard.read_bytes()
        shard.unlink()
        shard.symlink_to("../mine")
        with pytest.warns(UserWarning, match="drawn again: samples-0000000004-0000000008"):
            assert fastddim.generate(net, 2, "run", **ARGUMENTS).drawn == 4
        assert Path("mine").read_text() == "precious"
        assert not shard.is_symlink()
        assert shard.read_bytes() == whole
        Path("run/manifest.json").rename("manifest.json")
        Path("run/manifest.json").symlink_to("../manifest.json")
        with pytest.raises(OSError, match="symbolic links"):
            fastddim.generate(net, 2, "run", **ARGUMENTS)

    def test_folder_of_something_else_is_refused(self, net):
        Path("run").mkdir()
        Path("run/thesis.tex").write_text("mine")
        with pytest.raises(ValueError, match=r"out: expected a new or empty folder.* thesis\.tex"):
            fastddim.generate(net, 2, "run", **ARGUMENTS)
        assert Path("run/thesis.tex").read_text() == "mine"

    def test_two_runs_in_one_folder(self, net, monkeypatch):
        monkeypatch.setattr(lock, "_PATIENCE", 0.0)
        interrupted(net, 1)
        with open(f"run/{LOCK}") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            with pytest.raises(BlockingIOError, match="another run is using this folder"):
                fastddim.generate(net, 2, "run", **ARGUMENTS)
        assert fastddim.generate(net, 2, "run", **ARGUMENTS).drawn == COUNT - 4


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_shape(path):
    """Another number of samples, with the digest that fits it."""
    np.savez(path, np.zeros((2, 4, 4, 3), np.uint8))
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".sha256").write_text(f"{content}  {path.name}\n")


class TestFaults:
    @pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink, of_another_shape])
    def test_corrupt_shard_is_drawn_again(self, net, damage):
        whole = fastddim.generate(net, 2, "run", **ARGUMENTS)
        before = contents("run")
        damage(Path("run/samples-0000000008-0000000012.npz"))
        with pytest.raises(ValueError, match="run: corrupt; generate it again"):
            runs.digest("run")
        with pytest.warns(UserWarning, match="corrupt, so drawn again: samples-0000000008"):
            run = fastddim.generate(net, 2, "run", **ARGUMENTS)
        assert (run.drawn, run.digest) == (4, whole.digest)
        assert contents("run") == before

    def test_shard_without_its_digest_is_drawn_again(self, net):
        fastddim.generate(net, 2, "run", **ARGUMENTS)
        before = contents("run")
        Path("run/samples-0000000008-0000000012.sha256").unlink()
        assert fastddim.generate(net, 2, "run", **ARGUMENTS).drawn == 4
        assert contents("run") == before

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_full_disk(self, net, monkeypatch, call):
        original, calls = getattr(os, call), []

        def full(*arguments):
            calls.append(arguments)
            if len(calls) > 8:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left on device"):
                fastddim.generate(net, 2, "run", **ARGUMENTS)
        assert not list(Path("run").glob(".*.part"))
        assert fastddim.generate(net, 2, "run", **ARGUMENTS).drawn < COUNT
        fastddim.generate(net, 2, "whole", **ARGUMENTS)
        assert contents("run") == contents("whole")

    def test_names_reach_the_disk_after_what_they_name(self, net, monkeypatch):
        """Names reach the disk after their contents. A power cut loses unsynced files, so a digest
        may only appear after its shard.
        """
        events = []

        def fsync(descriptor):
            events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

        def replace(old, new):
            assert events[-1] == str(old)
            events.append(Path(new).name)
            rename(old, new)

        rename = os.replace
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        fastddim.generate(net, 2, "run", **{**ARGUMENTS, "stop": 4})
        named = [event for event in events if not event.endswith(".part")]
        run, stem = str(Path("run").resolve()), "samples-0000000000-0000000004"
        made = [str(Path.cwd()), "manifest.json", run]
        assert named == [*made, f"{stem}.npz", run, f"{stem}.sha256", run]

    @pytest.mark.parametrize("out", ["file/run", "file"])
    def test_folder_that_cannot_be_made(self, net, out):
        Path("file").touch()
        with pytest.raises(OSError, match="file"):
            fastddim.generate(net, 2, out, **ARGUMENTS)

    def test_folder_that_cannot_be_written(self, net, monkeypatch):
        monkeypatch.setattr(Path, "open", refusing)
        monkeypatch.setattr(SmallNet, "forward", None)
        with pytest.raises(PermissionError, match="cannot be written"):
            fastddim.generate(net, 2, "run", **ARGUMENTS)

    @pytest.mark.parametrize("check_finite", [True, False])
    def test_nan_is_never_written(self, net, check_finite):
        with torch.no_grad():
            net.bias[0] = torch.nan
        expected = "at step 0" if check_finite else "in sample 0"
        with pytest.raises(ValueError, match=f"finite .*{expected}"):
            fastddim.generate(
                net, 2, "run", format="safetensors", check_finite=check_finite, **ARGUMENTS
            )
        assert sorted(os.listdir("run")) == [LOCK, "manifest.json"]

    def test_error_of_the_writer_surfaces(self, net, monkeypatch):
        def broken(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(generation, "write_batch", broken)
        with pytest.raises(OSError, match="Input/output error"):
            fastddim.generate(net, 2, "run", **ARGUMENTS)

    def test_next_batch_is_drawn_while_the_last_is_written(self, net, monkeypatch):
        """The next batch is drawn while the last is written: the writer waits for it to begin."""
        second = threading.Event()
        batches = []

        def began(step, *_):
            batches.append(step)
            if batches.count(0) == 2:
                second.set()

        def write_later(*arguments):
            assert second.wait(60)
            write_batch(*arguments)

        monkeypatch.setattr(generation, "write_batch", write_later)
        fastddim.generate(net, 2, "run", callback=began, **ARGUMENTS)


def refusing(path, *arguments):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


class TestMemory:
    def test_auto_fits_the_budget_and_is_kept(self, net):
        net.schedule, net.sample_shape = fastddim.Schedule.linear(), SHAPE
        arguments = {**ARGUMENTS, "shape": None, "memory": 20_000}
        run = fastddim.generate(net, 2, "run", **arguments)
        assert 1 < run.batch_size < COUNT
        assert memory.peak_bytes(lambda: expected(net, 0, run.batch_size), torch.device("cpu")) <= (
            20_000
        )
        Path(f"run/samples-0000000000-{run.batch_size:010d}.sha256").unlink()
        arguments["memory"] = None
        again = fastddim.generate(net, 2, "run", **arguments)
        assert (again.batch_size, again.drawn) == (run.batch_size, run.batch_size)

    def test_not_even_one_sample_fits(self, net):
        net.sample_shape = SHAPE
        arguments = {**ARGUMENTS, "shape": None, "memory": 100}
        with pytest.raises(ValueError, match=r"memory: expected at least \d+ bytes for one sample"):
            fastddim.generate(net, 2, "run", **arguments)

    def test_largest_power_of_two(self):
        def draw(n):
            return torch.zeros(1000 + 100 * n, dtype=torch.uint8)

        cpu = torch.device("cpu")
        assert memory.peak_bytes(lambda: draw(3), cpu) == 1300
        for budget, size in ((1100, 1), (2199, 1), (2200, 2), (2800, 8), (3600, 16), (10**9, 1024)):
            assert memory.fitting_batch(draw, budget, cpu) == size, budget

    def test_default_is_a_share_of_what_is_free(self, monkeypatch):
        alone = memory.default_budget(torch.device("cpu"))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert 0 < memory.default_budget(torch.device("cpu")) < alone


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stop": 0}, "stop: expected an integer in [1, 4294967296], got 0"),
            ({"start": 30}, "stop: expected an integer in [31, 4294967296], got 22"),
            ({"start": -1}, "start: expected an integer in [0, 4294967295], got -1"),
            ({"seed": [1]}, "seed: expected an integer, got [1] (list)"),
            ({"batch_size": "big"}, "batch_size: expected an integer or 'auto', got 'big'"),
            ({"batch_size": 4.0}, "batch_size: expected an integer, got 4.0 (float)"),
            ({"shape": (0, *SHAPE)}, "shape[0]: expected an integer in [1, 4294967296], got 0"),
            ({"memory": 5}, "memory: expected None unless batch_size='auto' and shape=None, got 5"),
            ({"format": "jpg"}, "format: expected one of 'npz', 'safetensors', 'png-folder'"),
            ({"batch_size": 3}, "batch_size: expected 4, as in shape, got 3"),
            ({"shape": None}, "shape: expected (B, ...), since the model does not tell its"),
            ({"shape": 4}, "shape: expected a sequence of integers (B, ...), got 4"),
            ({"shape": (4, 3, 0, 4)}, "shape[2]: expected an integer in [1, 4294967296], got 0"),
            (
                {"shape": (4, 4)},
                "expected 'safetensors' for samples that are no images",
            ),
            (
                {"shape": (4, 4, 2, 2), "format": "png-folder"},
                "decode= to make images of them, got 'png-folder' for shape (4, 2, 2)",
            ),
            ({"eta": torch.zeros(4)}, "eta: expected a number or one per step, got a tensor"),
            ({"eta": [0.5]}, "eta: expected one value a step, 2, got 1 of them"),
            ({"merged": "all.zip"}, "merged: expected a name that ends in .npz, got 'all.zip'"),
            ({"model_id": 5}, "model_id: expected a string, got 5"),
            ({"progress": 1}, "progress: expected True or False"),
            ({"callback": 1}, "callback: expected a callable"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_argument(self, net, change, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            fastddim.generate(net, 2, "run", **{**ARGUMENTS, **change})
        assert not Path("run").exists()

    def test_model_that_could_not_be_told_from_others(self):
        with pytest.raises(ValueError, match="model_id: expected a string that tells this model"):
            fastddim.generate(lambda x, t: x, 2, "run", **ARGUMENTS)
        with pytest.raises(ValueError, match="model: expected eval mode"):
            fastddim.generate(SmallNet().train(), 2, "run", **ARGUMENTS)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


COMMAND = ("generate", "digits", "--steps", 2, "--stop", 10, "--batch-size", 4, "--out", "run")


class TestCommand:
    def test_run_merge_and_digest(self):
        result = run(*COMMAND, "--merged", "all.npz", "--seed", 3)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "run\nall.npz\n", "")
        with np.load("all.npz") as archive:
            images = archive["arr_0"]
        model = fastddim.models.load("digits")
        drawn = to_uint8(fastddim.sample(model, 2, batch_size=10, seed=3))
        assert np.abs(images.astype(int) - drawn).max() <= 1
        assert run("merge", "run", "--out", "again.npz").stdout == "again.npz\n"
        assert Path("again.npz").read_bytes() == Path("all.npz").read_bytes()
        assert run("digest", "run").stdout == f"{runs.digest('run')}  run\n"

    def test_progress(self):
        result = run(*COMMAND, "--progress")
        assert re.search(r"generating: 100%.* 10/10 \[\d+:\d+<\d+:\d+, .*sample/s\]", result.stderr)

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--seed", 1], 2, "seed: 0 in the folder, 1 here"),
            (["--steps", 0], 2, "steps: expected an integer in [1, 1000], got 0"),
            (["--start", 10], 2, "stop: expected an integer in [11, 4294967296], got 10"),
            (["--batch-size", "many"], 2, "expected an integer or 'auto', got 'many'"),
            (["--memory", "lots"], 2, "expected bytes such as 500M or 4GiB"),
            (["--memory", "1G"], 2, "memory: expected None unless batch_size='auto'"),
            (["--batch-size", "auto", "--out", "new", "--memory", "1K"], 1, "for one sample"),
            (["--out", "run/manifest.json"], 1, "run/manifest.json: File exists"),
            (["--merged", "gone/all.npz"], 1, "cannot be written: No such file or directory"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_error_is_one_line(self, options, code, message):
        assert run(*COMMAND).exit_code == 0
        result = run(*COMMAND, *options)
        assert (result.exit_code, result.stdout) == (code, ""), result.stderr
        assert re.fullmatch(r"fastddim: error: [^\n]+\n", result.stderr), result.stderr
        assert message in result.stderr

    def test_no_combination_of_arguments_gives_a_traceback(self):
        names = [option.opts[0] for option in main.commands["generate"].params[1:]]
        values = ["0", "1", "-1", "3.5", "nan", "auto", "digits", "npz", "", "é", "run", "1,0"]
        pairs = st.tuples(st.sampled_from(names), st.sampled_from(values))

        @settings(max_examples=60)
        @given(st.lists(pairs.map(list), max_size=4))
        def fuzz(options):
            result = run(
                *("generate", "digits", "--out", "fuzzed", "--stop", "2", "--steps", "1"),
                *(word for pair in options for word in pair),
            )
            assert result.exit_code in (0, 1, 2), result.stderr
            assert isinstance(result.exception, SystemExit | None), result.exception
            assert "Traceback" not in result.stderr
            if result.exit_code:
                assert re.search(r"^fastddim: error: [^\n]+\n\Z", result.stderr, re.MULTILINE)

        fuzz()


def test_unfinished_files_have_names_that_are_cleared_away(net):
    Path("run").mkdir()
    with atomic_file("run/x") as file:
        left = [name for name in os.listdir("run") if Path("run", name).samefile(file.name)]
        Path("run", "kept.part").write_text("mine")
    from fastddim.files import remove_parts

    Path("run", left[0]).touch()
    remove_parts("run")
    assert sorted(os.listdir("run")) == ["kept.part", "x"]


def test_reliability_page_shows_the_committed_results():
    path = Path(__file__).parent / "faults" / "run.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    results = json.loads(faults.RESULTS.read_text())
    page = faults.DOCUMENT.read_text()
    assert faults.updated(page, faults.as_markdown(results)) == page
    assert results["machine"]["modified"] is False, "measured on uncommitted code"
    assert all(row["tries"] > 0 == row["losses"] for row in results["rows"])
    assert len({row["sha256"] for row in results["acceptance"]["rows"]}) == 1
