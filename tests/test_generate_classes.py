"""`fastddim generate` with class labels, for networks that take them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastddim
from fastddim.cli import main
from fastddim.cli.classes import Labelling
from fastddim.images import to_uint8

from .support.probes import torch_threads

diffusers = pytest.importorskip("diffusers")

CLASSES = 4
COMMAND = ("generate", "unet", "--steps", 2, "--batch-size", 4, "--out", "run")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in an empty folder, on one thread."""
    monkeypatch.chdir(tmp_path)
    with torch_threads(1):
        yield tmp_path


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=CLASSES + 1,
    ).eval()
    # Labels that can be told apart in the images.
    torch.nn.init.normal_(unet.class_embedding.weight, std=5)
    return unet


@pytest.fixture
def saved(unet):
    unet.save_pretrained("unet")
    diffusers.DDIMScheduler().save_pretrained("unet")
    return unet


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def drawn(unet, labels, first=0, **options):
    """The images, batch by batch as the command draws them."""
    parts = []
    for i in range(0, len(labels), 4):
        given = torch.tensor(labels[i : i + 4])
        parts.append(
            fastddim.sample(
                unet,
                2,
                seed=0,
                sample_offset=first + i,
                shape=(len(given), 1, 8, 8),
                model_kwargs={"class_labels": given},
                schedule=fastddim.Schedule.linear(),
                **options,
            )
        )
    return to_uint8(torch.cat(parts))


def merged(path="all.npz"):
    with np.load(path) as archive:
        return archive["arr_0"][..., :1], archive["arr_1"].tolist()


class TestClasses:
    def test_balanced(self, saved):
        result = run(*COMMAND, "--count", 10, "--classes", "balanced", "--merged", "all.npz")
        assert (result.exit_code, result.stdout) == (0, "run\nall.npz\n"), result.output
        images, labels = merged()
        assert labels == [i % (CLASSES + 1) for i in range(10)]
        assert np.array_equal(images, drawn(saved, labels))
        assert not np.array_equal(images, drawn(saved, [0] * 10))

    def test_a_list_in_turn_and_a_range_of_its_own(self, saved):
        given = ("--classes", "3,1,0", "--start", 4, "--count", 3, "--merged", "all.npz")
        assert run(*COMMAND, *given).exit_code == 0
        images, labels = merged()
        assert labels == [1, 0, 3]
        assert np.array_equal(images, drawn(saved, labels, first=4))

    def test_guidance(self, saved):
        given = ("--classes", "balanced", "--guidance", 3, "--null-class", CLASSES)
        result = run(*COMMAND, "--count", 6, *given, "--merged", "all.npz")
        assert result.exit_code == 0, result.output
        images, labels = merged()
        assert labels == [0, 1, 2, 3, 0, 1]
        guided = {"guidance_scale": 3.0, "uncond_kwargs": {"class_labels": CLASSES}}
        assert np.array_equal(images, drawn(saved, labels, **guided))
        assert not np.array_equal(images, drawn(saved, labels))

    @pytest.mark.parametrize("name", ["labels.txt", "labels.npy", "labels.npz", "all.npz"])
    def test_a_file(self, saved, name):
        labels = np.array([2, 0, 1, 3, 2, 0, 1])
        if name == "labels.txt":
            Path(name).write_text("\n".join(map(str, labels)) + "\n")
        elif name == "labels.npy":
            np.save(name, labels)
        elif name == "labels.npz":
            np.savez(name, classes=labels)
        else:
            np.savez(name, np.zeros((7, 8, 8, 3), np.uint8), labels)
        given = ("--classes", name, "--start", 2, "--stop", 6, "--merged", "out.npz")
        result = run(*COMMAND, *given)
        assert result.exit_code == 0, result.output
        assert merged("out.npz")[1] == [1, 3, 2, 0]
        assert run(*COMMAND, *given[:-4], "--stop", 7).exit_code == 0
        result = run(*COMMAND, *given[:-4], "--stop", 8)
        assert result.exit_code == 1
        assert f"{name}: expected a label for each image up to number 7, got 7" in result.stderr

    def test_grows(self, saved):
        for count in (3, 10):
            assert run(*COMMAND, "--count", count, "--classes", "balanced").exit_code == 0
        result = run(*COMMAND, "--count", 10, "--classes", "1,2")
        assert result.exit_code == 2
        assert "conditions['class_labels']: others in the folder than here" in result.stderr

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--classes", "0,9"], 2, "--classes: expected labels in [0, 4], got 9"),
            (["--classes", "-1"], 2, "--classes: expected labels in [0, 4], got -1"),
            (["--classes", "gone.txt"], 1, "gone.txt: No such file"),
            (["--classes", "unet/config.json"], 1, "config.json: expected one integer a line"),
            (["--classes", "odd.npy"], 1, "odd.npy: expected integers [N], got float64 [2]"),
            (["--classes", "odd.npz"], 1, "odd.npz: expected an array of labels, got"),
            (["--guidance", "2"], 2, "--guidance: expected --classes beside it"),
            (["--null-class", "2"], 2, "--null-class: expected --classes beside it"),
            (["--classes", "1", "--null-class", "2"], 2, "--null-class: expected --guidance"),
            (["--classes", "1", "--guidance", "2"], 2, "label that stands for no class, since"),
            (
                ["--classes", "1", "--guidance", "2", "--null-class", "5"],
                2,
                "--null-class: expected labels in [0, 4], got 5",
            ),
            ([], 1, "got a class-conditional UNet2DModel; give it --classes"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_error_is_one_line(self, saved, options, code, message):
        np.save("odd.npy", np.zeros(2))
        Path("odd.npz").write_text("")
        result = run(*COMMAND, "--count", 2, *options)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert re.fullmatch(r"fastddim: error: [^\n]+\n", result.stderr), result.stderr
        assert message in result.stderr
        assert not Path("run").exists()

    def test_a_bundled_model_takes_none(self):
        result = run("generate", "digits", "--count", 2, "--out", "run", "--classes", "1")
        assert result.exit_code == 2
        assert "--classes: expected a model that takes class labels, got an unconditional UNet" in (
            result.stderr
        )


class TestSample:
    """`sample` gives the same images for the same labels as `generate`."""

    COMMAND = ("sample", "unet", "--steps", 2, "--seed", 0, "--batch-size", 4)

    def test_labels_are_numbered_as_the_images(self, saved):
        given = ("--count", 6, "--sample-offset", 4, "--classes", "balanced")
        result = run(*self.COMMAND, *given, "--out", "a.npz")
        assert result.exit_code == 0, result.output
        with np.load("a.npz") as archive:
            assert np.array_equal(archive["arr_0"], drawn(saved, [4, 0, 1, 2, 3, 4], first=4))

    def test_guidance(self, saved):
        given = ("--count", 3, "--classes", "2,1", "--guidance", 3, "--null-class", CLASSES)
        assert run(*self.COMMAND, *given, "--out", "a.npz").exit_code == 0
        guided = {"guidance_scale": 3.0, "uncond_kwargs": {"class_labels": CLASSES}}
        with np.load("a.npz") as archive:
            assert np.array_equal(archive["arr_0"], drawn(saved, [2, 1, 2], **guided))

    def test_an_image_is_drawn_again_with_its_labels(self, saved):
        Path("labels.txt").write_text("1 2 3 4 0 1")
        given = ("--count", 6, "--classes", "labels.txt")
        assert run(*self.COMMAND, *given, "--out", "many/").exit_code == 0
        image = Path("many/000005.png").read_bytes()
        result = run("sample", "--like", "many/000005.png", "--out", "again/")
        assert result.exit_code == 0, result.output
        assert Path("again/000005.png").read_bytes() == image
        Path("labels.txt").write_text("1 2 3 4 0 2")
        result = run("sample", "--like", "many/000005.png", "--out", "again/")
        assert "expected classes labels.txt with SHA-256" in result.stderr

    def test_other_models_are_told(self, saved):
        assert "give it --classes" in run(*self.COMMAND).stderr
        assert "got an unconditional UNet" in run("sample", "digits", "--classes", "1").stderr


class TestCount:
    def test_is_from_the_start(self):
        given = ("generate", "digits", "--steps", 1, "--out", "run", "--start", 3, "--count", 4)
        assert run(*given).exit_code == 0
        manifest = json.loads(Path("run/manifest.json").read_text())
        assert (manifest["start"], manifest["stop"]) == (3, 7)

    @pytest.mark.parametrize(
        ("options", "got"), [([], "neither"), (["--count", 1, "--stop", 1], "both")]
    )
    def test_or_stop(self, options, got):
        result = run("generate", "digits", "--out", "run", *options)
        assert result.exit_code == 2
        assert f"--count: expected either --count or --stop, got {got}" in result.stderr


class Own:
    """A network of another library."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, x, t, y=None):
        return x


class TestModelsThatTell:
    def test_number_and_null_label_of_own_networks(self):
        labels = Labelling("balanced", 3.0, None).of(Own(num_classes=3), 2, 8)
        assert labels.values == [2, 0, 1, 2, 0, 1]
        assert labels.guided() == {"guidance_scale": 3.0, "uncond_kwargs": {"y": 3}}
        (condition,) = labels.condition().values()
        assert condition.dtype == torch.int64
        labels = Labelling("balanced", 3.0, 1).of(Own(num_classes=3), 0, 4)
        assert (labels.values, labels.null) == ([0, 2, 0, 2], 1)

    def test_the_null_label_of_diffusers_is_no_class(self, unet):
        labels = Labelling("balanced", 3.0, CLASSES).of(unet, 0, 5)
        assert labels.values == [0, 1, 2, 3, 0]
        assert labels.guided()["uncond_kwargs"] == {"class_labels": CLASSES}

    def test_a_model_that_tells_no_number(self):
        assert Labelling("7,9", None, None).of(Own(), 0, 2).values == [7, 9]
        with pytest.raises(Exception, match="does not tell how many classes it has"):
            Labelling("balanced", None, None).of(Own(), 0, 2)

    def test_without_classes(self):
        assert Labelling(None, None, None).of(Own(), 0, 2) is None
