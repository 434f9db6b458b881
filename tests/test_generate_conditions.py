"""Many samples with conditions of their own, decoded, in runs that grow."""

from __future__ import annotations

import csv
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import fastddim
from fastddim import runs
from fastddim.images import load_png, to_uint8
from fastddim.runs import ManifestMismatchError
from fastddim.runs.shards import FORMATS

from .support.models import SmallNet
from .support.probes import torch_threads

SHAPE = (3, 4, 4)
COUNT = 22
LABELS = torch.arange(COUNT) * 3 % 5
ARGUMENTS = {"stop": COUNT, "batch_size": 4, "shape": (4, *SHAPE), "eta": 0.5, "seed": 5}
SCHEDULE = fastddim.Schedule.linear()


class LabelNet(SmallNet):
    """The network with a shift by an embedding of the label; the last label stands for none."""

    num_classes = 5

    def __init__(self, channels: int = 3, seed: int = 0) -> None:
        super().__init__(channels, seed=seed)
        self.schedule = SCHEDULE
        self.sample_shape = (channels, 4, 4)
        shifts = torch.randn(6, channels, generator=torch.Generator().manual_seed(seed + 1))
        self.shifts = nn.Parameter(shifts)

    def forward(self, x, t, y):
        return super().forward(x, t) + self.shifts[y][:, :, None, None]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder, on one thread."""
    monkeypatch.chdir(tmp_path)
    with torch_threads(1):
        yield tmp_path


@pytest.fixture
def net():
    return LabelNet().eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def generate(net, out="run", steps=2, **changes):
    arguments = {**ARGUMENTS, "conditions": {"y": LABELS}, **changes}
    return fastddim.generate(net, steps, out, **arguments)


def expected(net, first=0, stop=COUNT, labels=LABELS):
    """The samples, batch by batch as the run draws them."""
    parts = [
        fastddim.sample(
            net,
            2,
            eta=0.5,
            seed=5,
            sample_offset=i,
            shape=(min(4, stop - i), *SHAPE),
            model_kwargs={"y": labels[i : min(i + 4, stop)]},
        )
        for i in range(first, stop, 4)
    ]
    return torch.cat(parts)


def interrupted(net, after, out="run", **changes):
    """A run that an exception ends in some batch."""
    batches = []

    def stopping(step, *_):
        batches.append(step)
        if batches.count(0) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(net, out, callback=stopping, **changes)


class TestConditions:
    def test_each_sample_has_its_own(self, net):
        assert generate(net, merged="all.npz").drawn == COUNT
        with np.load("all.npz") as archive:
            assert archive.files == ["arr_0", "arr_1"]
            assert np.array_equal(archive["arr_0"], to_uint8(expected(net)))
            assert archive["arr_1"].dtype == np.int64
            assert np.array_equal(archive["arr_1"], LABELS.numpy())
        with np.load("run/samples-0000000020-0000000022.npz") as archive:
            assert np.array_equal(archive["arr_1"], LABELS[20:].numpy())
        assert json.loads(Path("run/manifest.json").read_text())["labels"] == "y"

    def test_labels_in_every_format(self, net):
        generate(net, "tensors", format="safetensors")
        shard = safetensors.torch.load_file("tensors/samples-0000000020-0000000022.safetensors")
        assert sorted(shard) == ["labels", "samples"]
        assert torch.equal(shard["labels"], LABELS[20:])
        assert torch.equal(shard["samples"], expected(net)[20:])
        generate(net, "pictures", format="png-folder")
        lines = [
            line
            for path in sorted(Path("pictures").glob("*.csv"))
            for line in csv.reader(path.read_text().splitlines())
        ]
        assert lines == [[f"{i:06d}.png", str(int(label))] for i, label in enumerate(LABELS)]
        merged = {runs.merge(name, f"{name}.npz").read_bytes() for name in ("tensors", "pictures")}
        assert len(merged) == 1

    @pytest.mark.parametrize("format", FORMATS)
    def test_goes_on_and_mends_with_labels(self, net, format):
        whole = generate(net, "whole", format=format)
        interrupted(net, 3, format=format)
        assert generate(net, format=format).digest == whole.digest
        assert contents("run") == contents("whole")
        damaged = next(
            path
            for path in sorted(Path("run").iterdir())
            if path.suffix not in (".sha256", ".json")
            and path.name.startswith(("samples-0000000004", "000004"))
        )
        damaged.write_bytes(damaged.read_bytes()[:-3])
        with pytest.warns(UserWarning, match="corrupt, so drawn again: samples-0000000004"):
            assert generate(net, format=format).drawn == 4
        assert contents("run") == contents("whole")

    def test_a_function_is_the_same_run_as_all_rows(self, net):
        asked = []

        def rows(start, stop):
            asked.append((start, stop))
            return {"y": LABELS[start:stop].tolist()}

        generate(net)
        generate(net, "same", conditions=rows)
        assert contents("run") == contents("same")
        assert {stop - start for start, stop in asked} == {1, 4, 2}
        again = generate(net, "same", conditions={"y": LABELS.numpy().astype(np.int32)})
        assert again.drawn == 0

    def test_nested_and_wide_rows(self):
        class Wide(SmallNet):
            def forward(self, x, t, added, scale):
                wide = added["embeds"].mean((1, 2)) + scale["b"]
                return super().forward(x, t) * wide[:, None, None, None]

        net = Wide().eval()
        values = torch.linspace(0, 1, 5 * 6).reshape(5, 2, 3)
        scale = torch.linspace(1, 2, 5)
        fastddim.generate(
            net,
            2,
            "run",
            stop=15,
            start=10,
            batch_size=2,
            shape=(2, *SHAPE),
            format="safetensors",
            conditions={"added": {"embeds": values}},
            model_kwargs={"scale": {"b": torch.ones(())}},
        )
        shard = safetensors.torch.load_file("run/samples-0000000014-0000000015.safetensors")
        assert list(shard) == ["samples"]
        drawn = fastddim.sample(
            net,
            2,
            seed=0,
            sample_offset=14,
            shape=(1, *SHAPE),
            model_kwargs={"added": {"embeds": values[4:]}, "scale": {"b": torch.ones(())}},
        )
        assert torch.equal(shard["samples"], drawn)
        manifest = json.loads(Path("run/manifest.json").read_text())
        assert list(manifest["conditions"]) == ["added.embeds"]
        assert scale.shape == (5,)

    def test_an_automatic_batch_size(self, net):
        run = generate(net, batch_size="auto", shape=None, memory=20_000)
        assert 1 < run.batch_size < COUNT
        with np.load(f"run/samples-{0:010d}-{run.batch_size:010d}.npz") as archive:
            assert np.array_equal(archive["arr_1"], LABELS[: run.batch_size].numpy())

    @pytest.mark.parametrize(
        "wrap",
        [lambda v: {"v": v}, lambda v: [v], torch.Tensor.numpy],
        ids=["mapping", "list", "array"],
    )
    def test_what_all_samples_share_is_digested_to_its_last_number(self, net, wrap):
        class Shared(LabelNet):
            def forward(self, x, t, y, shared):
                return super().forward(x, t, y)

        net, values = Shared().eval(), torch.zeros(1, 5000)
        generate(net, model_kwargs={"shared": wrap(values)})
        assert generate(net, model_kwargs={"shared": wrap(values.clone())}).drawn == 0
        values[0, 2500] = 1
        with pytest.raises(ManifestMismatchError, match="model_kwargs: others in the folder than"):
            generate(net, model_kwargs={"shared": wrap(values)})

    @pytest.mark.parametrize(
        ("conditions", "label"),
        [
            ({"a": LABELS, "y": LABELS + 1}, "y"),
            ({"a": LABELS, "class_labels": LABELS + 1}, "class_labels"),
            ({"a": LABELS, "b": LABELS.float()}, "a"),
            ({"a": LABELS, "b": LABELS}, None),
            ({"a": LABELS.float()}, None),
            ({"a": LABELS[:, None]}, None),
            ({"a": LABELS > 1}, None),
        ],
        ids=str,
    )
    def test_which_of_them_are_the_labels(self, conditions, label):
        class Any(SmallNet):
            def forward(self, x, t, **conditions):
                return super().forward(x, t)

        generate(Any().eval(), conditions=conditions)
        manifest = json.loads(Path("run/manifest.json").read_text())
        assert manifest.get("labels") == label
        with np.load("run/samples-0000000000-0000000004.npz") as archive:
            assert ("arr_1" in archive.files) is (label is not None)
            if label is not None:
                assert np.array_equal(archive["arr_1"], conditions[label][:4].numpy())

    @pytest.mark.parametrize(
        ("conditions", "message"),
        [
            ({"y": LABELS[:20]}, "conditions['y']: expected one row for each of the 22 samples"),
            ({"y": LABELS[:20]}, "[0, 22), got 20 rows"),
            ({"y": torch.tensor(3)}, "conditions['y']: expected one row for each"),
            ({"y": 3}, "got a single value"),
            ({"y": ["cat"] * COUNT}, "conditions['y']: expected a tensor, an array or a list"),
            ({"a": {"b": LABELS[:1]}}, "conditions['a']['b']: expected one row for each"),
            ({}, "conditions: expected a mapping of names to tensors"),
            (LABELS, "conditions: expected a mapping of names to tensors"),
            (
                lambda start, stop: LABELS[start:stop],
                "or a function (start, stop) that returns one",
            ),
            (lambda start, stop: {"y": LABELS[:5]}, "samples [0, 1), got 5 rows"),
        ],
        ids=["short", "range", "0-dim", "number", "strings", "nested", "empty", "bare", "a", "b"],
    )
    def test_wrong_rows_are_refused_before_any_work(self, net, conditions, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            generate(net, conditions=conditions)
        assert not Path("run").exists()

    def test_names_in_both_are_refused(self, net):
        with pytest.raises(ValueError, match="not in model_kwargs too, got y"):
            generate(net, model_kwargs={"y": LABELS[:1]})

    def test_a_function_that_changes_its_mind(self, net):
        with pytest.raises(ValueError, match=r"samples \[20, 22\), got 4 rows"):
            generate(
                net,
                conditions=lambda start, stop: (
                    {"y": LABELS[: min(4, stop - start + 3)]}
                    if start == 20
                    else {"y": LABELS[start:stop]}
                ),
            )
        with pytest.raises(ValueError, match=r"expected y in each call, got z for \[20, 22\)"):
            generate(net, conditions=lambda start, stop: {"yz"[start == 20]: LABELS[start:stop]})
        assert not list(Path("run").glob("*.npz"))
        calls = []

        def random(start, stop):
            calls.append(start)
            return {"y": LABELS[start:stop] + (calls.count(8) > 1)}

        with pytest.raises(ValueError, match=r"conditions: expected the same rows .* \[8, 12\)"):
            generate(net, conditions=random)

    def test_other_labels_are_refused(self, net):
        interrupted(net, 2)
        before = contents("run")
        message = r"conditions\['y'\]: others in the folder than here$"
        with pytest.raises(ManifestMismatchError, match=message):
            generate(net, conditions={"y": LABELS.flip(0)})
        with pytest.raises(
            ManifestMismatchError, match=r"conditions\['y'\]: some in the folder, no"
        ):
            generate(net, conditions=None, model_kwargs={"y": LABELS[:1]})
        assert contents("run") == before

    def test_parts_of_other_labels_are_joined(self, net):
        generate(net, "b", start=10, conditions={"y": LABELS[10:]}, format="safetensors")
        generate(net, "a", stop=10, conditions={"y": LABELS[:10]}, shape=(3, *SHAPE), batch_size=3)
        runs.merge(["b", "a"], "all.npz")
        with np.load("all.npz") as archive:
            assert np.array_equal(archive["arr_1"], LABELS.numpy())
            images = archive["arr_0"]
        assert np.array_equal(images[10:], to_uint8(expected(net, 10)))
        plain = {"conditions": None, "model_kwargs": {"y": torch.tensor([1])}}
        generate(net, "c", start=10, **plain)
        with pytest.raises(ValueError, match=r'labels: "y" in a, nothing in c'):
            runs.merge(["a", "c"], "wrong.npz")


# A class-balanced run that ends by SIGKILL in the 9th evaluation of the model, as often as asked.
DYING = """
import os, signal, sys
from pathlib import Path

import torch

import fastddim


class Labelled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = fastddim.models.load("digits")
        torch.manual_seed(0)
        self.shifts = torch.nn.Embedding(11, 64)
        self.calls = 0

    def forward(self, x, t, y):
        self.calls += 1
        if self.calls == 9 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) < deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x, t) + 0.1 * self.shifts(y).reshape(x.shape)


out, deaths, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
fastddim.generate(
    Labelled().eval(), 3, out, stop=stop, shape=(4, 1, 8, 8), eta=0.5, merged=out / "all.npz",
    schedule=fastddim.Schedule.linear(), conditions={"y": torch.arange(stop) % 10},
    guidance_scale=2.0, uncond_kwargs={"y": 10},
)
"""


class TestGuidance:
    @pytest.mark.parametrize("uncond", [5, torch.tensor([5]), torch.tensor(5)], ids=str)
    def test_halves_are_stacked(self, net, uncond):
        generate(net, format="safetensors", guidance_scale=3.0, uncond_kwargs={"y": uncond})
        for first, stop in ((4, 8), (20, 22)):
            name = f"run/samples-{first:010d}-{stop:010d}.safetensors"
            count = stop - first
            drawn = fastddim.sample(
                net,
                2,
                eta=0.5,
                seed=5,
                sample_offset=first,
                shape=(count, *SHAPE),
                guidance_scale=3.0,
                model_kwargs={"y": torch.cat([torch.full((count,), 5), LABELS[first:stop]])},
            )
            assert torch.equal(safetensors.torch.load_file(name)["samples"], drawn)

    def test_another_model_for_the_unconditional_half(self, net):
        weak = LabelNet(seed=7).eval()
        guided = {"guidance_scale": 2.0, "uncond_model": weak, "format": "safetensors"}
        generate(net, **guided)
        shard = safetensors.torch.load_file("run/samples-0000000020-0000000022.safetensors")
        drawn = fastddim.sample(
            net,
            2,
            eta=0.5,
            seed=5,
            sample_offset=20,
            shape=(2, *SHAPE),
            guidance_scale=2.0,
            uncond_model=weak,
            model_kwargs={"y": LABELS[20:]},
        )
        assert torch.equal(shard["samples"], drawn)
        with pytest.raises(ManifestMismatchError, match="weights of uncond_model: others in the"):
            generate(net, **{**guided, "uncond_model": LabelNet(seed=8).eval()})
        with pytest.raises(ValueError, match="uncond_model: expected eval mode"):
            generate(net, **{**guided, "uncond_model": weak.train()})
        with pytest.raises(ValueError, match=r"model_id: .* tells this uncond_model from others"):
            generate(net, **{**guided, "uncond_model": lambda x, t, y: x})

    def test_another_null_label_is_refused(self, net):
        guided = {"guidance_scale": 3.0, "uncond_kwargs": {"y": 5}}
        interrupted(net, 1, **guided)
        with pytest.raises(ManifestMismatchError, match="uncond_kwargs: others in the folder"):
            generate(net, guidance_scale=3.0, uncond_kwargs={"y": 4})
        with pytest.raises(
            ManifestMismatchError, match=r"guidance_scale: 3\.0 in the folder, 2\.0"
        ):
            generate(net, **{**guided, "guidance_scale": 2.0})
        generate(net, **guided)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"guidance_scale": 2.0}, "under guidance where uncond_kwargs={'y': ...} gives"),
            ({"uncond_kwargs": {"y": 5}}, "uncond_kwargs: expected None without guidance_scale"),
            (
                {"guidance_scale": 2.0, "uncond_kwargs": {"z": 5}},
                "uncond_kwargs['z']: expected a name in model_kwargs, ['y'], got ['z']",
            ),
            (
                {"guidance_scale": 2.0, "uncond_kwargs": {"y": LABELS[:4]}},
                "uncond_kwargs['y']: expected a tensor [2, ...] or [1, ...], got shape (4,)",
            ),
            (
                {"conditions": None, "model_kwargs": {"y": LABELS[:4]}},
                "model_kwargs['y']: expected a tensor [2, ...] or [1, ...], got shape (4,); "
                "conditions= takes a row for each sample",
            ),
        ],
        ids=["none", "no scale", "name", "rows", "one batch"],
    )
    def test_what_does_not_fit_every_batch_is_refused_before_any_work(self, net, change, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(net, **change)
        assert not Path("run").exists()

    def test_rows_for_full_batches_alone_stay_possible(self, net):
        plain = {"conditions": None, "stop": 8, "format": "safetensors"}
        generate(net, model_kwargs={"y": LABELS[:4]}, **plain)
        shard = safetensors.torch.load_file("run/samples-0000000004-0000000008.safetensors")
        again = LABELS[:4].repeat(2)
        assert torch.equal(shard["samples"], expected(net, 4, 8, again))

    def test_killed_grown_and_on_two_ranks_the_bytes_are_those_of_one_process(
        self, run_python, folder, monkeypatch
    ):
        Path("dying.py").write_text(DYING)
        environment = {
            "PYTHONPATH": str(Path(fastddim.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }

        def here(*arguments):
            monkeypatch.setattr(sys, "argv", ["dying.py", *arguments])
            exec(compile(DYING, "dying.py", "exec"), {"__name__": "dying"})

        here("run", "0", "18")
        result = run_python("dying.py", "run", "1", "50", cwd=folder, env=environment)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert len(list(Path("run").glob("*.sha256"))) in (6, 7)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        result = run_python(
            *(*torchrun, "--max-restarts", "1", "dying.py", "run", "1", "50"),
            cwd=folder,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        here("alone", "0", "50")
        assert contents("run") == contents("alone")
        with np.load("run/all.npz") as archive:
            assert archive["arr_0"].shape == (50, 8, 8, 3)
            assert np.bincount(archive["arr_1"]).tolist() == [5] * 10


class TestGrowth:
    @pytest.mark.parametrize("format", FORMATS)
    def test_ends_with_the_bytes_of_one_run(self, net, format):
        first = {"stop": 14, "conditions": {"y": LABELS[:14]}}
        generate(net, "whole", format=format)
        generate(net, format=format, **first)
        run = generate(net, format=format, merged="all.npz")
        # The batch [12, 14) became [12, 16).
        assert (run.stop, run.drawn) == (COUNT, COUNT - 12)
        assert contents("run") == contents("whole")
        assert runs.digest("run") == run.digest
        with np.load("all.npz") as archive:
            assert len(archive["arr_0"]) == len(archive["arr_1"]) == COUNT

    @pytest.mark.parametrize("format", FORMATS)
    def test_interrupted_on_the_way(self, net, format):
        generate(net, "whole", format=format)
        generate(net, format=format, stop=14, conditions={"y": LABELS[:14]})
        before = contents("run")
        interrupted(net, 0, format=format)
        # Until the larger batch is whole, the smaller one is there.
        assert {**before, "manifest.json": b""} == {**contents("run"), "manifest.json": b""}
        interrupted(net, 2, format=format)
        kept = {path.name for path in Path("run").iterdir()}
        assert "samples-0000000012-0000000014.sha256" in kept
        assert generate(net, format=format).drawn < COUNT - 12
        assert contents("run") == contents("whole")

    def test_twice_and_without_conditions(self):
        net = SmallNet().eval()
        plain = {"conditions": None}
        generate(net, "whole", **plain)
        for stop, drawn in ((3, 3), (5, 5), (20, 16), (COUNT, 2), (COUNT, 0)):
            assert generate(net, stop=stop, **plain).drawn == drawn
        assert contents("run") == contents("whole")

    def test_a_function_is_asked_for_old_rows_as_before(self, net):
        """A function is asked for old rows as before, since rows of an encoder may depend on their
        number, in the last bits.
        """

        def rows(start, stop):
            return {"y": LABELS[start:stop], "noise": torch.full((stop - start,), 1.0 * stop)}

        class Two(LabelNet):
            def forward(self, x, t, y, noise):
                return super().forward(x, t, y)

        net = Two().eval()
        generate(net, stop=14, conditions=rows)
        assert generate(net, conditions=rows).drawn == COUNT - 12

    def test_other_first_labels_are_refused(self, net):
        generate(net, stop=14, conditions={"y": LABELS[:14]})
        before = contents("run")
        other = LABELS.clone()
        other[13] += 1
        with pytest.raises(ManifestMismatchError, match=r"conditions\['y'\]: others in the folder"):
            generate(net, conditions={"y": other})
        with pytest.raises(ManifestMismatchError, match=r"seed: 5 in the folder, 6 here$"):
            generate(net, seed=6)
        assert contents("run") == before
        other[13] -= 1
        other[14] += 1
        assert generate(net, conditions={"y": other}).drawn == COUNT - 12

    def test_a_run_does_not_shrink_or_begin_earlier(self, net):
        generate(net, start=2, conditions={"y": LABELS[2:]})
        with pytest.raises(ManifestMismatchError, match=r"stop: 22 in the folder, 20 here .*fewer"):
            generate(net, start=2, stop=20, conditions={"y": LABELS[2:20]})
        with pytest.raises(ManifestMismatchError, match="start: 2 in the folder, 0 here"):
            generate(net)

    def test_only_files_of_the_run_are_removed(self, net):
        generate(net, stop=14, conditions={"y": LABELS[:14]})
        for name in ("samples-mine.npz", "labels.csv", "samples-0000000012-0000000014.txt"):
            Path("run", name).write_text("mine")
        generate(net)
        assert not list(Path("run").glob("samples-*14.npz"))
        assert len([path for path in Path("run").iterdir() if path.read_bytes() == b"mine"]) == 3


class TestWords:
    def test_other_steps_are_one_line(self, net):
        generate(net, steps=5)
        with pytest.raises(
            ManifestMismatchError, match=r"another:\n  steps: 5 in the folder, 6 here$"
        ):
            generate(net, steps=6)

    def test_other_timesteps_are_one_line(self, net):
        generate(net, steps=[900, 400])
        message = r"another:\n  timesteps: \[900, 400\] in the folder, \[900, 300\] here$"
        with pytest.raises(ManifestMismatchError, match=message):
            generate(net, steps=[900, 300])

    def test_another_schedule_is_told_besides_other_timesteps(self, net):
        generate(net, steps=[900, 400])
        net.schedule = fastddim.Schedule.cosine()
        with pytest.raises(ManifestMismatchError, match="schedule: others in the folder than here"):
            generate(net, steps=[900, 300, 100])


class Constant(nn.Module):
    """Constant latents of ones, for any noise."""

    schedule = SCHEDULE

    def __init__(self, channels=4):
        super().__init__()
        self.sample_shape = (channels, 4, 4)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        return x - self.weight


def doubled(latents):
    """An image of two times the size of its latents."""
    return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


DECODED = {"stop": 6, "batch_size": 4, "shape": (4, 4, 4, 4), "seed": 3, "schedule": SCHEDULE}


class TestDecode:
    @pytest.fixture
    def net(self):
        return SmallNet(4).eval()

    def generate(self, net, out="run", **changes):
        return fastddim.generate(net, 2, out, **{**DECODED, **changes})

    def latents(self, net):
        return torch.cat(
            [
                fastddim.sample(
                    net, 2, seed=3, shape=(n, 4, 4, 4), sample_offset=i, schedule=SCHEDULE
                )
                for i, n in ((0, 4), (4, 2))
            ]
        )

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_function(self, net, format):
        self.generate(net, decode=doubled, format=format, merged="all.npz")
        images = doubled(self.latents(net))
        with np.load("all.npz") as archive:
            assert np.array_equal(archive["arr_0"], to_uint8(images))
        manifest = json.loads(Path("run/manifest.json").read_text())
        assert manifest["sample_shape"] == [3, 8, 8]
        assert manifest["decode"] == {"name": "doubled", "weights": [], "shape": [4, 4, 4]}
        if format == "png-folder":
            assert load_png("run/000005.png", (3, 8, 8)).shape == (8, 8, 3)
        assert self.generate(net, decode=doubled, format=format).drawn == 0
        with pytest.raises(ManifestMismatchError, match='decode: "doubled" in the folder, nothing'):
            self.generate(net, format="safetensors")

    def test_an_autoencoder_of_diffusers_with_its_scale(self, net):
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        config |= {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae = diffusers.AutoencoderKL(**config, scaling_factor=0.5, shift_factor=0.25).eval()
        latents = self.latents(net)
        self.generate(net, decode=vae, merged="all.npz")
        with torch.no_grad():
            images = torch.cat(
                [vae.decode(part / 0.5 + 0.25).sample for part in (latents[:4], latents[4:])]
            )
        with np.load("all.npz") as archive:
            assert np.array_equal(archive["arr_0"], to_uint8(images))
        with torch.no_grad():
            vae.decoder.conv_out.bias += 1
        with pytest.raises(ManifestMismatchError, match="weights of decode: others in the folder"):
            self.generate(net, decode=vae)
        for other, name in (({"shift_factor": 0.5}, "shift_factor"),):
            again = diffusers.AutoencoderKL(**config, scaling_factor=0.5, **other).eval()
            again.load_state_dict(vae.state_dict())
            with pytest.raises(ManifestMismatchError, match=f"decode.{name}: 0.25 in the folder"):
                self.generate(net, decode=again)
        with pytest.raises(ValueError, match=r"expected the autoencoder itself .* method decode"):
            self.generate(net, decode=vae.decode)
        with pytest.raises(
            ValueError, match=r"decode: expected networks in eval mode .* AutoencoderKL"
        ):
            self.generate(net, decode=vae.train())
        half = vae.eval().to(torch.bfloat16)
        assert self.generate(net, "half", decode=half).drawn == 6

    def test_statistics_of_latents(self, net):
        class Config:
            scaling_factor, latents_mean, latents_std = (
                2.0,
                [1.0, 2.0, 3.0, 4.0],
                [1.0, 1.0, 2.0, 1.0],
            )

        class Autoencoder(nn.Module):
            config = Config()

            def decode(self, latents):
                return (latents[:, 1:4].tanh(),)

        self.generate(net, decode=Autoencoder().eval(), merged="all.npz")
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (Config.latents_mean, Config.latents_std)
        )
        images = (self.latents(net) * std / 2 + mean)[:, 1:4].tanh()
        with np.load("all.npz") as archive:
            assert np.array_equal(archive["arr_0"], to_uint8(images))

    def test_memory_counts_what_is_decoded(self, net):
        net.sample_shape = (4, 4, 4)

        def run(out, decode):
            arguments = {"shape": None, "batch_size": "auto", "memory": 40_000, "stop": 64}
            return self.generate(
                net, out, format="safetensors", decode=decode, **arguments
            ).batch_size

        assert run("wide", lambda z: z.repeat(1, 16, 1, 1)) < run("narrow", lambda z: z[:, :1])

    @pytest.mark.parametrize(
        ("decode", "message"),
        [
            (3, "decode: expected a function of samples or an autoencoder of diffusers, got int"),
            (lambda z: None, "decode: expected it to return a floating-point tensor, got NoneType"),
            (lambda z: z.long(), "floating-point tensor, got torch.int64"),
            (lambda z: z[:0], "decode: expected it to return 1 samples, got shape (0, 4, 4, 4)"),
            (lambda z: z, "decode= to make images of them, got 'npz' for shape (4, 4, 4)"),
        ],
        ids=["type", "none", "integers", "rows", "latents"],
    )
    def test_wrong_functions(self, net, decode, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            self.generate(net, decode=decode)
        assert not Path("run").exists()

    def test_an_autoencoder_that_tells_no_scale(self, net):
        class Own(nn.Module):
            def decode(self, latents):
                return latents[:, :3]

            def forward(self, images):
                return images

        own = Own().eval()
        with pytest.raises(ValueError, match=r"such as .*Own\.decode, got a .*Own"):
            self.generate(net, decode=own)
        assert self.generate(net, decode=own.decode).drawn == 6

    def test_weights_that_a_function_reads_are_in_the_manifest(self, net):
        def decoding(network):
            return lambda latents: network(latents).detach()[:, :3]

        networks = [nn.Sequential(nn.Conv2d(4, 3, 1)).eval() for _ in range(2)]
        assert self.generate(net, decode=decoding(networks[0])).drawn == 6
        with pytest.raises(ManifestMismatchError, match="weights of decode"):
            self.generate(net, decode=decoding(networks[1]))
        with pytest.raises(ValueError, match=r"decode: .* got Sequential in training mode"):
            self.generate(net, decode=decoding(networks[0].train()))

    @pytest.mark.parametrize("name", ["model", "decode"])
    def test_nan_before_or_after_is_not_written(self, net, name):
        def decode(latents):
            images = latents[:, :3].nan_to_num()
            return images / 0 if name == "decode" and len(latents) == 2 else images

        if name == "model":
            with torch.no_grad():
                net.bias[0] = torch.nan
        first = 4 if name == "decode" else 0
        with pytest.raises(ValueError, match=f"{name}: expected finite .*in sample {first}"):
            self.generate(net, decode=decode)
        assert len(list(Path("run").glob("*.npz"))) == (name == "decode")

    @pytest.mark.parametrize("format", ["npz", "png-folder"])
    def test_latents_are_no_images(self, net, format):
        with pytest.raises(ValueError, match=re.escape(f"got {format!r} for shape (4, 4, 4)")):
            self.generate(net, format=format)
        with pytest.raises(ValueError, match=re.escape("merged: expected None for samples that")):
            self.generate(net, format="safetensors", merged="all.npz")
        assert self.generate(net, format="safetensors").drawn == 6
        with pytest.raises(ValueError, match=r"folders: expected images \(1 or 3 channels, H, W\)"):
            runs.merge("run", "all.npz")
        assert not Path("all.npz").exists()
