"""The command line: its files, its output and its exit codes."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import click
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image

import fastddim
from fastddim import backends, choices, images
from fastddim.cli import main
from fastddim.plan import SPACINGS
from fastddim.processor import has_bfloat16
from fastddim.tuning.search import EFFORTS

from .support.optional import optional

diffusers = optional("diffusers")

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return fastddim.models.load("digits")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def sample(*arguments):
    return succeed("sample", "--seed", 0, *arguments)


def fail(code, *arguments):
    """The one line of an error."""
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert re.fullmatch(r"fastddim: error: [^\n]+\n", result.stderr), result.stderr
    assert sorted(Path().rglob("*")) == before
    return result.stderr


def drawn(model, steps, *, seed=0, **arguments):
    return images.to_uint8(fastddim.sample(model, steps, seed=seed, **arguments))


def read_npz(path):
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        return archive["arr_0"]


def read_png(path):
    with Image.open(path) as image:
        return np.array(image)


class TestSample:
    def test_grid(self, digits):
        result = sample("digits", "--steps", 3, "--count", 5)
        assert (result.stdout, result.stderr) == ("samples.png\n", "")
        expected = images.grid(drawn(digits, 3, batch_size=5), scale=8)
        assert np.array_equal(read_png("samples.png"), expected[:, :, 0])

    def test_grid_of_chosen_size(self, digits):
        options = ("--steps", 2, "--count", 3, "--columns", 2, "--scale", 1, "--out", "a.PNG")
        assert sample("digits", *options).stdout == "a.PNG\n"
        expected = images.grid(drawn(digits, 2, batch_size=3), 2)
        assert np.array_equal(read_png("a.PNG"), expected[:, :, 0])

    def test_archive(self, digits):
        result = sample("digits", "--steps", 3, "--count", 5, "--out", "a.npz")
        assert result.stdout == "a.npz\n"
        assert np.array_equal(read_npz("a.npz"), drawn(digits, 3, batch_size=5))

    @pytest.mark.parametrize("out", ["new/folder", "v1.0/", "there"])
    def test_folder_of_numbered_files(self, digits, out):
        Path("there").mkdir()
        Path("there/notes.txt").write_text("mine")
        options = ("--steps", 2, "--count", 3, "--sample-offset", 41, "--out", out)
        assert sample("digits", *options).stdout == f"{out}\n"
        files = sorted(Path(out).glob("*.png"))
        assert [file.name for file in files] == ["000041.png", "000042.png", "000043.png"]
        expected = drawn(digits, 2, batch_size=3, sample_offset=41)
        assert np.array_equal(np.stack([read_png(file) for file in files]), expected[..., 0])
        assert Path("there/notes.txt").read_text() == "mine"

    def test_result_replaces_an_older_one(self, digits):
        Path("a.npz").write_text("older")
        sample("digits", "--steps", 2, "--count", 1, "--out", "a.npz")
        assert read_npz("a.npz").shape == (1, 8, 8, 1)
        assert os.listdir() == ["a.npz"]

    @pytest.mark.parametrize(
        ("options", "arguments"),
        [
            (["--steps", 4], {"steps": 4}),
            (["--steps", 4, "--spacing", "quadratic"], {"steps": 4, "spacing": "quadratic"}),
            (
                ["--steps", 4, "--spacing", "leading", "--steps-offset", 1],
                {"steps": 4, "spacing": "leading", "steps_offset": 1},
            ),
            (["--timesteps", "900,400,10"], {"steps": [900, 400, 10]}),
            (["--steps", 4, "--seed", 2**64 - 1], {"steps": 4, "seed": 2**64 - 1}),
            (["--steps", 4, "--eta", 0.5], {"steps": 4, "eta": 0.5}),
            (
                ["--steps", 4, "--eta", 1, "--variance", "large"],
                {"steps": 4, "eta": 1.0, "variance": "large"},
            ),
            (["--steps", 4, "--clip", 0.5], {"steps": 4, "clip": 0.5}),
            (
                ["--steps", 4, "--clip", 0.5, "--rederive-eps"],
                {"steps": 4, "clip": 0.5, "rederive_eps": True},
            ),
            (
                ["--steps", 4, "--prediction", "v_prediction"],
                {"steps": 4, "prediction": "v_prediction"},
            ),
            (["--steps", 4, "--prediction", "score"], {"steps": 4, "prediction": "score"}),
            (["--steps", 4, "--dtype", "bfloat16"], {"steps": 4, "dtype": torch.bfloat16}),
            (
                ["--steps", 4, "--impl", "reference", "--device", "cpu"],
                {"steps": 4, "impl": "reference"},
            ),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_options_are_the_library_s_arguments(self, digits, options, arguments):
        sample("digits", "--count", 2, "--out", "a.npz", *options)
        assert np.array_equal(read_npz("a.npz"), drawn(digits, batch_size=2, **arguments))

    def test_defaults_are_the_library_s(self):
        """The defaults of the command line are the library's. They are written out as numbers and
        text, since help waits for no library.
        """
        functions = {
            "sample": fastddim.sample,
            "invert": fastddim.invert,
            "generate": fastddim.generate,
            "tune": fastddim.tune,
        }
        # A batch is one for pictures, a prediction is the model's, a device is one that is there,
        # and a progress bar is shown where there is a terminal. A fresh seed is named on stderr.
        own = {"device", "dtype", "prediction", "progress"}
        of_sample = {"batch_size", "seed"}
        for command, function in functions.items():
            library = inspect.signature(function).parameters
            # Nothing is parsed that could be missing.
            given = main.commands[command].make_context(command, [], resilient_parsing=True).params
            optional = {
                name
                for name in given.keys() & library.keys()
                if library[name].default is not inspect.Parameter.empty
            }
            compared = optional - own - (of_sample if command == "sample" else set())
            assert len(compared) >= 2, (command, compared)
            assert {name: given[name] for name in compared} == {
                name: library[name].default for name in compared
            }

    def test_choices_are_the_library_s(self):
        assert tuple(SPACINGS) == get_args(choices.Spacing)
        assert tuple(EFFORTS) == get_args(choices.EffortName)

    def test_batch_size_changes_nothing_but_the_model_s_rounding(self, digits):
        options = ("--steps", 3, "--count", 7, "--eta", 1, "--sample-offset", 5, "--out", "a.npz")
        sample("digits", *options, "--batch-size", 3)
        whole = drawn(digits, 3, batch_size=7, eta=1.0, sample_offset=5)
        assert np.abs(read_npz("a.npz").astype(int) - whole).max() <= 1

    @pytest.mark.parametrize("size", [2, 8])
    def test_progress_goes_to_stderr(self, size):
        options = ("--steps", 2, "--count", 4, "--batch-size", size, "--progress")
        result = sample("digits", *options)
        assert result.stdout == "samples.png\n"
        assert "100%" in result.stderr

    def test_help_explains_every_option(self):
        for name, command in main.commands.items():
            assert "Example" in command.epilog, name
            for option in command.params:
                if isinstance(option, click.Option):
                    assert option.help, (name, option.name)
                    told = option.is_flag or option.default is not None or option.show_default
                    assert told, (name, option.name)
        result = succeed("sample", "--help")
        assert "[default: 50]" in result.stdout
        assert "fastddim sample digits --steps 20" in result.stdout


class TestModels:
    def test_file_and_folder_of_weights(self, digits):
        record = {"schedule": {"T": 1000, "beta_start": 1e-4, "beta_end": 0.02}}
        fastddim.models.save(digits, "trained", record)
        expected = drawn(digits, 2, batch_size=2)
        for name in ("trained", "trained/model.safetensors"):
            sample(name, "--steps", 2, "--count", 2, "--out", "a.npz")
            assert np.array_equal(read_npz("a.npz"), expected)

    def test_corrupt_weights(self):
        Path("bad.safetensors").write_text("not weights")
        Path("bad.json").write_text("{}")
        assert "expected a safetensors file" in fail(1, "sample", "bad.safetensors")

    def test_unknown_name(self):
        line = fail(2, "sample", "digitz")
        assert "MODEL: expected digits, fashion," in line
        assert "got 'digitz'" in line

    def test_missing_file(self):
        assert "got 'gone.safetensors'" in fail(2, "sample", "gone.safetensors")

    def test_folder_without_a_model(self):
        Path("empty").mkdir()
        assert "got 'empty'" in fail(2, "sample", "empty")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


class TestDiffusersModels:
    def test_pipeline_folder_tells_schedule_and_prediction(self, unet):
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        diffusers.DDIMPipeline(unet, scheduler).save_pretrained("pipeline")
        sample("pipeline", "--steps", 4, "--count", 2, "--out", "a.npz")
        expected = drawn(
            unet,
            4,
            batch_size=2,
            schedule=fastddim.Schedule.cosine(),
            prediction="v_prediction",
        )
        assert np.array_equal(read_npz("a.npz"), expected)

    def test_pipeline_of_one_folder(self, unet):
        unet.save_pretrained("flat")
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, prediction_type="sample")
        scheduler.save_pretrained("flat")
        sample("flat", "--steps", 4, "--count", 2, "--out", "a.npz")
        schedule = fastddim.Schedule.linear(100)
        expected = drawn(unet, 4, batch_size=2, schedule=schedule, prediction="sample")
        assert np.array_equal(read_npz("a.npz"), expected)

    def test_unet_alone_is_taken_as_ddpm_s_and_says_so(self, unet):
        unet.save_pretrained("unet")
        result = sample("unet", "--steps", 4, "--count", 2, "--out", "a.npz")
        assert result.stdout == "a.npz\n"
        assert "unet has no scheduler_config.json: assuming epsilon prediction" in result.stderr
        assert np.array_equal(read_npz("a.npz"), drawn(unet, 4, batch_size=2))

    def test_without_diffusers(self, unet, monkeypatch):
        unet.save_pretrained("unet")
        diffusers.DDIMScheduler().save_pretrained("unet")
        monkeypatch.setitem(sys.modules, "diffusers", None)
        assert "expected diffusers to be installed" in fail(1, "sample", "unet")

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("config.json", {"_class_name": "UNet2DConditionModel"}, "got UNet2DConditionModel"),
            ("config.json", {"num_class_embeds": 10}, "got a class-conditional UNet2DModel"),
            ("config.json", {"sample_size": None}, "expected a sample_size"),
            ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "latents of .* 'vqvae'"),
            ("scheduler_config.json", {"prediction_type": "flow"}, "got 'flow'"),
            ("scheduler_config.json", {"beta_schedule": "odd"}, "beta_schedule: .*got 'odd'"),
        ],
    )
    def test_refused_configuration(self, unet, file, change, message):
        unet.save_pretrained("model")
        diffusers.DDIMScheduler().save_pretrained("model")
        path = Path("model", file)
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**config, **change}))
        assert re.search(message, fail(1, "sample", "model"))

    def test_model_of_something_else_than_images(self, unet):
        channels = {"in_channels": 4, "out_channels": 4}
        diffusers.UNet2DModel.from_config({**unet.config, **channels}).save_pretrained("model")
        diffusers.DDIMScheduler().save_pretrained("model")
        line = fail(1, "sample", "model")
        assert "expected a model of grey or RGB images (C, H, W), got (4, 8, 8)" in line

    def test_scheduler_without_betas(self, unet):
        unet.save_pretrained("model")
        Path("model/scheduler_config.json").write_text('{"_class_name": "FlowMatch"}')
        assert "with a beta_schedule, got FlowMatch" in fail(1, "sample", "model")

    @pytest.mark.parametrize("content", ["{", "[]", "\xff"])
    def test_corrupt_configuration(self, content):
        Path("model").mkdir()
        Path("model/config.json").write_text(content, encoding="latin-1")
        assert "expected " in fail(1, "sample", "model")

    def test_missing_weights(self, unet):
        unet.save_pretrained("model")
        diffusers.DDIMScheduler().save_pretrained("model")
        Path("model/diffusion_pytorch_model.safetensors").unlink()
        assert "diffusion_pytorch_model.safetensors" in fail(1, "sample", "model")

    def test_nan_is_not_drawn(self, unet):
        unet.save_pretrained("model")
        diffusers.DDIMScheduler().save_pretrained("model")
        weights = Path("model/diffusion_pytorch_model.safetensors")
        state = safetensors.torch.load(weights.read_bytes())
        state["conv_out.bias"][1] = torch.nan
        weights.write_bytes(safetensors.torch.save(state))
        assert "expected no NaN" in fail(
            1, "sample", "model", "--seed", 0, "--steps", 2, "--count", 2
        )


class TestInvert:
    @pytest.fixture
    def pictures(self, digits):
        pictures = drawn(digits, 20, batch_size=3)
        Path("in").mkdir()
        for i, picture in enumerate(pictures):
            images.save_png(f"in/{i}.png", picture)
        np.savez("in.npz", pictures)
        return pictures

    @pytest.mark.parametrize("suffix", ["npz", "safetensors"])
    def test_latents(self, digits, pictures, suffix):
        out = f"z.{suffix}"
        result = succeed("invert", "digits", "in", "--steps", 5, "--out", out)
        assert (result.stdout, result.stderr) == (f"{out}\n", "")
        expected = fastddim.invert(digits, images.from_uint8(pictures), 5)
        if suffix == "npz":
            with np.load(out) as archive:
                latents = torch.from_numpy(archive["latents"])
        else:
            latents = safetensors.torch.load_file(out)["latents"]
        assert torch.equal(latents, expected)
        sample("digits", "--latents", out, "--steps", 5, "--out", "back.npz")
        assert np.array_equal(read_npz("back.npz"), drawn(digits, 5, x_T=expected))

    def test_all_kinds_of_images_in_the_order_given(self, digits, pictures):
        succeed("invert", "digits", "in/2.png", "in.npz", "in", "--timesteps", "500,100")
        x_0 = images.from_uint8(np.concatenate([pictures[2:], pictures, pictures]))
        with np.load("latents.npz") as archive:
            latents = torch.from_numpy(archive["latents"])
        assert torch.equal(latents, fastddim.invert(digits, x_0, [500, 100]))

    def test_dtype_and_batch_size(self, digits, pictures):
        options = ("--dtype", "float64", "--batch-size", 2, "--steps", 5)
        succeed("invert", "digits", "in", *options)
        with np.load("latents.npz") as archive:
            latents = torch.from_numpy(archive["latents"])
        expected = fastddim.invert(digits, images.from_uint8(pictures).double(), 5)
        assert latents.dtype == torch.float64
        assert (latents - expected).abs().max() < 1e-4

    def test_decode_shows_pairs_and_the_error(self, digits, pictures):
        result = succeed("invert", "digits", "in", "--steps", 10, "--decode", "pairs.npz")
        assert result.stdout == "latents.npz\npairs.npz\n"
        x_0 = images.from_uint8(pictures)
        decoded = fastddim.sample(digits, 10, x_T=fastddim.invert(digits, x_0, 10))
        pairs = read_npz("pairs.npz")
        assert np.array_equal(pairs[::2], pictures)
        assert np.array_equal(pairs[1::2], images.to_uint8(decoded))
        error = ((decoded.double() - x_0.double()) / 2).square().mean().item()
        assert result.stderr == f"mean squared error of a pixel in [0, 1]: {error:.3g}\n"

    def test_pairs_stay_side_by_side(self, pictures):
        succeed("invert", "digits", "in", "--steps", 2, "--decode", "a.png", "--scale", 1)
        assert read_png("a.png").shape == (2 * 10 + 2, 4 * 10 + 2)

    @pytest.mark.parametrize(
        ("name", "write", "message"),
        [
            ("a.png", lambda p: Image.new("L", (9, 8)).save(p), "expected an image of 8x8 pixels"),
            ("a.png", lambda p: p.write_text("text"), "a.png: expected a PNG image"),
            ("a.gif", lambda p: p.write_text("text"), "expected a .png file, a folder of them or"),
            ("folder", lambda p: p.mkdir(), "expected .png files in the folder, got none"),
            ("a.npz", lambda p: p.write_text("text"), "expected an .npz archive with arr_0"),
            ("a.npz", lambda p: p.write_bytes(b""), "expected an .npz archive with arr_0"),
            ("a.npz", lambda p: np.savez(p, b=np.zeros(1)), "expected an .npz archive with arr_0"),
            (
                "a.npz",
                lambda p: np.savez(p, np.array([{}], dtype=object)),
                "expected an .npz archive with arr_0",
            ),
            (
                "a.npz",
                lambda p: np.savez(p, np.zeros((2, 8, 8, 3), np.uint8)),
                r"expected uint8 images \[N, 8, 8, 1\] in arr_0, got uint8 \[2, 8, 8, 3\]",
            ),
            (
                "a.npz",
                lambda p: np.savez(p, np.zeros((2, 8, 8, 1))),
                r"expected uint8 images .* got float64",
            ),
            (
                "a.npz",
                lambda p: np.savez(p, np.zeros((0, 8, 8, 1), np.uint8)),
                "expected at least one image, got none",
            ),
            ("a.npz", lambda p: None, "a.npz: No such file or directory"),
        ],
    )
    def test_refused_images(self, name, write, message):
        write(Path(name))
        assert re.search(message, fail(1, "invert", "digits", name, "--steps", 2))

    def test_cut_archive(self, pictures):
        Path("cut.npz").write_bytes(Path("in.npz").read_bytes()[:-30])
        assert "expected an .npz archive" in fail(1, "invert", "digits", "cut.npz", "--steps", 2)

    def test_prediction_that_cannot_be_inverted(self, pictures):
        line = fail(2, "invert", "digits", "in", "--prediction", "sample")
        assert "prediction: expected epsilon, v_prediction or score to invert" in line

    @pytest.mark.parametrize(
        ("latents", "message"),
        [
            (np.zeros((2, 1, 4, 4), np.float32), r"latents \[N, 1, 8, 8\], got \[2, 1, 4, 4\]"),
            (np.zeros((0, 1, 8, 8), np.float32), r"got \[0, 1, 8, 8\]"),
            (np.zeros((2, 1, 8, 8), np.int32), "expected floating-point latents"),
            (np.full((2, 1, 8, 8), np.nan), "expected finite latents"),
        ],
    )
    def test_refused_latents(self, latents, message):
        np.savez("z.npz", latents=latents)
        assert re.search(message, fail(1, "sample", "digits", "--latents", "z.npz"))

    def test_latents_of_another_kind(self):
        safetensors.torch.save_file({"weights": torch.zeros(1)}, "z.safetensors")
        line = fail(1, "sample", "digits", "--latents", "z.safetensors")
        assert "expected a safetensors file with latents" in line


class TestInterpolate:
    def test_strip(self, digits):
        options = ("--seeds", "3,8", "--frames", 5, "--steps", 4, "--out", "a.npz")
        assert succeed("interpolate", "digits", *options).stdout == "a.npz\n"
        ends = [fastddim.philox.initial_latents((1, *SHAPE), seed) for seed in (3, 8)]
        latents = fastddim.slerp(*ends, [0, 0.25, 0.5, 0.75, 1]).flatten(0, 1)
        assert np.array_equal(read_npz("a.npz"), drawn(digits, 4, x_T=latents))

    def test_square_has_its_corners_and_edges(self, digits):
        options = ("--seeds", "0,1,2,3", "--frames", 3, "--steps", 4, "--out", "a.npz")
        succeed("interpolate", "digits", *options)
        square = read_npz("a.npz").reshape(3, 3, 8, 8, 1).astype(int)
        for edge, seeds in (
            (square[0], "0,1"),
            (square[-1], "2,3"),
            (square[:, 0], "0,2"),
            (square[:, -1], "1,3"),
        ):
            options = ("--seeds", seeds, "--frames", 3, "--steps", 4, "--out", "edge.npz")
            succeed("interpolate", "digits", *options)
            # Images computed in batches of other sizes: the model's rounding may differ.
            assert np.abs(edge - read_npz("edge.npz")).max() <= 1
        corner = drawn(digits, 4, seed=2).astype(int)
        assert np.abs(square[-1, 0] - corner[0]).max() <= 1

    def test_grid_is_as_wide_as_the_path_is_long(self):
        options = ("--frames", 3, "--steps", 2, "--scale", 1)
        assert succeed("interpolate", "digits", *options).stdout == "interpolation.png\n"
        assert read_png("interpolation.png").shape == (10 + 2, 3 * 10 + 2)

    @pytest.mark.parametrize("seeds", ["1", "1,2,3", "1,2,3,4,5"])
    def test_two_or_four_seeds(self, seeds):
        line = fail(2, "interpolate", "digits", "--seeds", seeds)
        assert f"expected two or four seeds, got {seeds.count(',') + 1}" in line

    def test_seed_out_of_range(self):
        line = fail(2, "interpolate", "digits", "--seeds", "1,-2")
        assert "seed[1]: expected an integer in [0, 18446744073709551615], got -2" in line


class TestEnv:
    def test_json(self):
        report = json.loads(succeed("env", "--json").stdout)
        assert report["fastddim"] == fastddim.__version__
        assert report["packages"]["torch"] == torch.__version__
        assert report["models"] == list(fastddim.models.available())
        assert report["devices"][0]["device"] == "cpu"
        assert report["devices"][0]["bfloat16"] == has_bfloat16()
        assert len(report["devices"]) == 1 + torch.cuda.device_count()
        told = {(b["backend"], b["device"]): b for b in report["backends"]}
        assert told.keys() == {
            (name, d["device"]) for name in backends.BACKENDS for d in report["devices"]
        }
        assert told["reference", "cpu"]["available"]
        for (name, device), backend in told.items():
            reason = backends.BACKENDS[name].unavailable(torch.device(device))
            assert (backend["available"], backend["reason"]) == (reason is None, reason)

    def test_text_says_why_a_backend_is_not_available(self, monkeypatch):
        broken = type("Broken", (), {"unavailable": lambda self, device: "not built"})()
        monkeypatch.setitem(backends.BACKENDS, "broken", broken)
        text = succeed("env").stdout
        assert re.search(r"^  broken +cpu +not available: not built$", text, re.MULTILINE)
        assert re.search(r"^  reference +cpu +available$", text, re.MULTILINE)
        assert re.search(rf"^torch +{re.escape(torch.__version__)}$", text, re.MULTILINE)


class TestDemo:
    def test_draws_and_times(self, digits, monkeypatch):
        # The package's attribute of that name is the command.
        module = importlib.import_module("fastddim.cli.demo")
        for name, value in (("DDPM_STEPS", 4), ("DDIM_STEPS", 2), ("FASHION", 16)):
            monkeypatch.setattr(module, name, value)
        result = succeed("demo", "--out", "new/demo")
        assert result.stdout == f"{Path('new/demo/demo.png')}\n"
        assert os.listdir("new/demo") == ["demo.png"]
        line = (
            r"16 digits took [\d.]+ s with 2 steps of DDIM and [\d.]+ s with 4 steps of DDPM: "
            r"DDIM was [\d.]+ times faster\n"
        )
        assert re.fullmatch(line, result.stderr)
        picture = read_png("new/demo/demo.png")
        first = images.grid(drawn(digits, 2, batch_size=64), 16, scale=7)[:, :, 0]
        label = picture.shape[0] - first.shape[0]
        found = [
            top
            for top in range(label)
            if np.array_equal(picture[top : top + first.shape[0]], first)
        ]
        assert len(found) == 1
        last = images.grid(drawn(digits, 4, batch_size=16, eta=1.0), 16, scale=7)[:, :, 0]
        assert np.array_equal(picture[-last.shape[0] :], last)


class TestEnd:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["sample"], "Missing argument 'MODEL'"),
            (["draw"], "No such command 'draw'"),
            (["sample", "digits", "--fast"], "No such option '--fast'"),
            (["sample", "digits", "--eta", "-1"], "eta: expected a finite number >= 0, got -1.0"),
            (["sample", "digits", "--eta", "nan"], "eta: expected a finite number >= 0, got nan"),
            (["sample", "digits", "--eta", "9"], "eta: expected 1 - alpha_prev - sigma**2 >= 0"),
            (["sample", "digits", "--eta", "x"], "Invalid value for '--eta'"),
            (["sample", "digits", "--clip", "0"], "clip: expected a finite number > 0, got 0.0"),
            (["sample", "digits", "--steps", "0"], "steps: expected an integer in [1, 1000]"),
            (["sample", "digits", "--steps", "1001"], "steps: expected an integer in [1, 1000]"),
            (["sample", "digits", "--timesteps", "1,2"], "expected strictly decreasing timesteps"),
            (["sample", "digits", "--timesteps", "1000"], "steps[0]: expected an integer in"),
            (["sample", "digits", "--timesteps", "a"], "expected integers separated by commas"),
            (
                ["sample", "digits", "--timesteps", "5,1", "--steps", "2"],
                "--timesteps: expected no --steps beside it",
            ),
            (["sample", "digits", "--spacing", "odd"], "Invalid value for '--spacing'"),
            (["sample", "digits", "--steps-offset", "1"], "steps_offset: expected 0 unless"),
            (["sample", "digits", "--count", "0"], "Invalid value for '--count'"),
            (["sample", "digits", "--batch-size", "0"], "Invalid value for '--batch-size'"),
            (["sample", "digits", "--seed", "-1"], "Invalid value for '--seed'"),
            (
                ["sample", "digits", "--sample-offset", str(2**32 - 1), "--count", "2"],
                "sample_offset: expected sample indices below 2**32",
            ),
            (
                ["sample", "digits", "--out", "a.jpg"],
                "expected a name that ends in .png, .npz or /",
            ),
            (["sample", "digits", "--latents", "a.pt"], "--latents: expected a name that ends in"),
            (["invert", "digits"], "Missing argument 'IMAGES...'"),
            (["invert", "digits", "a.png", "--out", "z.pt"], "--out: expected a name that ends in"),
            (["sample", "digits", "--impl", "fast"], "impl: expected one of 'auto'"),
            (["sample", "digits", "--device", "abacus"], "--device: expected a device that works"),
            (["sample", "digits", "--device", "meta"], "--device: expected a device that works"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_wrong_arguments(self, arguments, message):
        assert message in fail(2, *arguments)

    def test_unavailable_backend_tells_why(self, monkeypatch):
        reference = backends.BACKENDS["reference"]
        monkeypatch.setattr(reference, "unavailable", lambda device: "switched off")
        line = fail(2, "sample", "digits", "--impl", "reference")
        assert "'reference' cannot be used on cpu: switched off" in line

    def test_no_command_shows_the_help(self):
        result = run()
        assert (result.exit_code, result.stdout) == (2, "")
        assert "fastddim sample digits" in result.stderr

    @pytest.mark.parametrize(
        "out", ["gone/a.png", "gone/a.npz", "file/b/", "file/a.png", "pipe.png"]
    )
    def test_place_that_cannot_be_written_is_refused_before_drawing(self, out, monkeypatch):
        Path("file").touch()
        os.mkfifo("pipe.png")
        monkeypatch.setattr(fastddim.Sampler, "__call__", None)
        fail(1, "sample", "digits", "--out", out)
        assert Path("pipe.png").is_fifo()

    def test_traceback_on_request(self):
        Path("bad.safetensors").write_text("not weights")
        Path("bad.json").write_text("{}")
        result = run("--traceback", "sample", "bad.safetensors")
        assert isinstance(result.exception, ValueError)

    @pytest.mark.filterwarnings("default")
    def test_warning_is_one_line(self, monkeypatch):
        def sampler(*arguments, **options):
            warnings.warn("fastddim: slow\nhere", stacklevel=2)
            return Sampler(*arguments, **options)

        Sampler = fastddim.Sampler
        monkeypatch.setattr(fastddim, "Sampler", sampler)
        result = sample("digits", "--steps", 1, "--count", 1)
        assert result.stderr == "fastddim: warning: slow here\n"

    def test_version(self):
        assert succeed("--version").stdout == f"fastddim, version {fastddim.__version__}\n"


class TestProcess:
    """Facts that only a real process shows."""

    def test_result_and_error(self, run_python, folder):
        result = run_python(
            *(
                "-m",
                "fastddim.cli",
                "sample",
                "digits",
                "--seed",
                "1",
                "--steps",
                "2",
                "--count",
                "2",
            ),
            cwd=folder,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "samples.png\n", "")
        result = run_python("-m", "fastddim.cli", "sample", "digits", "--steps", "0", cwd=folder)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            "fastddim: error: steps: expected an integer in [1, 1000], got 0 "
            "(see 'fastddim sample --help')\n"
        )
        assert os.listdir(folder) == ["samples.png"]

    @pytest.mark.parametrize("out", ["a.png", "a.npz"])
    def test_ctrl_c_leaves_nothing_behind(self, folder, out):
        # A shell starts background jobs with SIGINT ignored, and a test run may be one.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from fastddim.cli import main; main(prog_name='fastddim')"
        )
        options = ("--steps", "1000", "--count", "512", "--batch-size", "512", "--progress")
        process = subprocess.Popen(
            [sys.executable, "-c", code, "sample", "digits", *options, "--out", out],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        shown = ""
        while "/1000" not in shown:
            read = process.stderr.read(1)
            assert read, shown
            shown += read
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (130, "")
        assert stderr.endswith("\nfastddim: interrupted\n")
        assert "Traceback" not in stderr
        assert not os.listdir(folder)
