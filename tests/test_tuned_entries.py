"""Tuned steps in streams, runs and on the command line: the samples of `fastddim.sample`."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastddim
from fastddim import models
from fastddim.cli import main
from fastddim.images import to_uint8
from fastddim.runs import ManifestMismatchError
from fastddim.runs.shards import Sharding, read_batch

from .support.environment import CPU_IMPLS
from .support.models import SmallNet, elementwise_model
from .support.tuned import random_steps, steps_of_order

SHAPE = (2, 5)


def halved(x_0, t):
    return x_0.mul_(0.5) + t.reshape(-1, *[1] * (x_0.ndim - 1)) * (1 / 4096)


class TestStream:
    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize(
        "common",
        [{}, {"denoised_fn": halved}, {"dynamic_thresholding_ratio": 0.8}, {"check_finite": True}],
    )
    def test_requests_of_many_kinds_share_a_batch(self, common, impl):
        rng = random.Random(0)
        stream = fastddim.Stream(elementwise_model, shape=(3, *SHAPE), order=2, impl=impl, **common)
        tuned_for = {k: v for k, v in common.items() if k == "dynamic_thresholding_ratio"}
        requests: list[dict[str, Any]] = []
        for seed in range(12):
            S = rng.choice([1, 2, 5, 9])
            clip = None if tuned_for else rng.choice([None, 0.5])
            tuned = random_steps(S, clip=clip, **tuned_for)
            steps = rng.choice([tuned, tuned, S])
            requests.append({"steps": steps, "seed": seed, "clip": clip})
        tickets = []
        for request in requests:
            tickets.append(stream.submit(**request))
            stream.step()
        stream.run()
        for ticket, request in zip(tickets, requests, strict=True):
            order = {} if isinstance(request["steps"], fastddim.TunedSteps) else {"order": 2}
            alone = fastddim.sample(
                elementwise_model, shape=(1, *SHAPE), impl=impl, **request, **order, **common
            )
            assert torch.equal(ticket.result(0), alone), request

    def test_guided(self):
        tuned = random_steps(4, guidance_scale=3.0)

        def model(x, t):
            return elementwise_model(x, t) + torch.linspace(-1, 1, len(x))[:, None, None]

        stream = fastddim.Stream(model, shape=(1, *SHAPE), order=2, guided=True)
        ticket = stream.submit(tuned, guidance_scale=3.0, seed=2)
        stream.run()
        options = {"guidance_scale": 3.0, "seed": 2}
        alone = fastddim.sample(model, tuned, shape=(1, *SHAPE), **options)
        assert torch.equal(ticket.result(0), alone)
        with pytest.raises(ValueError, match=r"guidance_scale 3.0, for which .*got 2.0"):
            stream.submit(tuned, guidance_scale=2.0)

    def test_equal_numbers_of_other_validity_are_told_apart(self):
        tuned = random_steps(3)
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), order=2)
        stream.submit(tuned)
        with pytest.raises(ValueError, match=r"clip 0.5, for which they were tuned, got None"):
            stream.submit(replace(tuned, tuned_for=random_steps(3, clip=0.5).tuned_for))

    def test_refusals(self):
        tuned = random_steps(5)
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE))
        message = r"^steps: expected a number or timesteps in a stream with order=1, .*got Tuned"
        with pytest.raises(ValueError, match=message):
            stream.submit(tuned)
        stream = fastddim.Stream(elementwise_model, shape=(1, *SHAPE), order=2, max_steps=4)
        for arguments, expected in (
            ({}, r"^steps: expected at most max_steps = 4, got 5"),
            ({"eta": 1.0}, r"^eta: expected 0 with tuned steps"),
            ({"spacing": "quadratic"}, r"^spacing: expected "),
            ({"clip": 1.0}, r"^steps: expected clip None, for which they were tuned, got 1.0"),
        ):
            with pytest.raises(ValueError, match=expected):
                stream.submit(tuned, **arguments)


RUN = {"stop": 5, "shape": (2, 3, 4, 4), "format": "safetensors"}


class TestGenerate:
    def test_the_samples_and_the_manifest(self, tmp_path):
        net, tuned, out = SmallNet().eval(), random_steps(4, clip=1.0), tmp_path / "run"
        run = fastddim.generate(net, tuned, out, seed=5, clip=1.0, **RUN)
        manifest = json.loads((out / "manifest.json").read_text())
        sharding = Sharding.of(manifest)
        drawn = torch.cat(
            [torch.from_numpy(read_batch(out, sharding, b).samples) for b in sharding.batches()]
        )
        parts = [
            fastddim.sample(
                net, tuned, seed=5, clip=1.0, sample_offset=first, shape=(count, 3, 4, 4)
            )
            for first, count in ((0, 2), (2, 2), (4, 1))
        ]
        assert torch.equal(drawn, torch.cat(parts))
        plan = manifest["plan"]
        assert plan["timesteps"] == list(tuned.timesteps)
        assert plan["direction"] == list(tuned.direction)
        assert plan["history"] == list(tuned.history)
        assert run.drawn == 5
        again = fastddim.generate(net, tuned, out, seed=5, clip=1.0, **RUN)
        assert (again.drawn, again.digest) == (0, run.digest)

    def test_a_folder_of_other_weights_is_refused(self, tmp_path):
        net, tuned = SmallNet().eval(), random_steps(3)
        fastddim.generate(net, tuned, tmp_path / "run", **RUN)
        other = replace(tuned, direction=(*tuned.direction[:2], 0.25))
        message = "weights of tuned steps: others in the folder than here"
        with pytest.raises(ManifestMismatchError, match=message):
            fastddim.generate(net, other, tmp_path / "run", **RUN)
        with pytest.raises(
            ManifestMismatchError, match="weights of tuned steps: some in the folder, none here"
        ):
            fastddim.generate(net, tuned.timesteps, tmp_path / "run", order=2, **RUN)
        renamed = replace(tuned, errors={}, record={})
        assert fastddim.generate(net, renamed, tmp_path / "run", **RUN).drawn == 0

    def test_a_run_without_them_says_nothing_of_them(self, tmp_path):
        fastddim.generate(SmallNet().eval(), 3, tmp_path / "run", **RUN)
        plan = json.loads((tmp_path / "run" / "manifest.json").read_text())["plan"]
        assert not {"direction", "history"} & plan.keys()

    def test_an_automatic_batch_size(self, tmp_path):
        net, given = SmallNet().eval(), {**RUN, "shape": None, "memory": 2**28}
        net.sample_shape = (3, 4, 4)
        run = fastddim.generate(net, random_steps(3), tmp_path / "run", **given)
        assert run.drawn == 5


class TestCommands:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, result.output
        return result.stderr

    @staticmethod
    def digits_steps(**options: Any) -> fastddim.TunedSteps:
        tuned = steps_of_order(2, [900, 500, 200, 0], **options)
        tuned.save("steps.json")
        return tuned

    def test_sample(self):
        tuned = self.digits_steps()
        given = ("--count", "3", "--seed", "0", "--out", "a.npz")
        self.run("sample", "digits", "--steps-file", "steps.json", *given)
        drawn = fastddim.sample(models.load("digits"), tuned, batch_size=3, seed=0)
        assert np.array_equal(np.load("a.npz")["arr_0"], to_uint8(drawn))

    def test_interpolate(self):
        self.digits_steps()
        out = ("--frames", "2", "--out", "a.npz")
        self.run("interpolate", "digits", "--steps-file", "steps.json", *out)
        given = ("--timesteps", "900,500,200,0")
        self.run("interpolate", "digits", *given, "--frames", "2", "--out", "b.npz")
        assert not np.array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])

    def test_generate(self):
        tuned = self.digits_steps(clip=1.0)
        given = ("--clip", "1", "--stop", "2", "--batch-size", "2")
        self.run("generate", "digits", "--steps-file", "steps.json", *given, "--out", "run")
        plan = json.loads(Path("run/manifest.json").read_text())["plan"]
        assert plan["direction"] == list(tuned.direction)

    @pytest.mark.parametrize("command", ["sample", "generate", "interpolate"])
    def test_refusals(self, command):
        self.digits_steps(clip=1.0)
        given = (command, "digits", *(("--stop", "1", "--out", "x") * (command == "generate")))
        file = ("--steps-file", "steps.json")
        error = self.run(*given, *file, code=2)
        assert "steps: expected clip 1.0, for which they were tuned, got None" in error
        for other, value in (("steps", "4"), ("timesteps", "5,1"), ("spacing", "linspace")):
            error = self.run(*given, *file, f"--{other}", value, code=2)
            assert f"--steps-file: expected no --{other} with it, got one" in error
        assert "nowhere.json" in self.run(*given, "--steps-file", "nowhere.json", code=1)
        Path("wrong.json").write_text("{}")
        error = self.run(*given, "--steps-file", "wrong.json", code=1)
        assert "wrong.json: format: expected 'fastddim tuned steps', got None" in error

    def test_noise_and_order(self):
        self.digits_steps()
        file = ("--steps-file", "steps.json")
        error = self.run("sample", "digits", *file, "--eta", "1", code=2)
        assert "eta: expected 0 with tuned steps" in error
        given = ("generate", "digits", *file, "--stop", "1", "--out", "x")
        assert "order: expected 1, the default" in self.run(*given, "--order", "2", code=2)

    def test_an_inversion_has_no_such_option(self):
        self.digits_steps()
        error = self.run("invert", "digits", "x.png", "--steps-file", "steps.json", code=2)
        assert "--steps-file" in error
