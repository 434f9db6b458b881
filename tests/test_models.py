"""The U-Net, the model files and the bundled weights."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fastddim
from fastddim import models
from fastddim.models import UNet, UNetConfig
from fastddim.schedule import Schedule
from fastddim.tuned import schedule_digest

from .support.tuned import random_steps

LINEAR = {"T": 1000, "beta_start": 1e-4, "beta_end": 0.02}
TINY = UNetConfig(sample_shape=(3, 8, 12), channels=(8, 16, 24), blocks=2, heads=2)
PATCHED = UNetConfig(sample_shape=(1, 8, 8), channels=(8, 16), patch=2)


def scrambled(config: UNetConfig) -> UNet:
    """A network without the zero weights that hide most of a fresh one."""
    model = UNet(config, Schedule.linear(**LINEAR))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.save(scrambled(PATCHED), tmp_path, {"schedule": LINEAR})
    return tmp_path


def edit_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


class TestUNet:
    @pytest.mark.parametrize("config", [TINY, PATCHED])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_output_is_like_the_input(self, config: UNetConfig, dtype: torch.dtype) -> None:
        x = torch.randn(5, *config.sample_shape, dtype=dtype)
        t = torch.tensor([0, 1, 500, 998, 999])
        epsilon = scrambled(config).to(dtype)(x, t)
        assert epsilon.shape == x.shape
        assert epsilon.dtype == dtype
        assert epsilon.is_contiguous()

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)]
    )
    def test_half_precision_follows_float64(self, dtype: torch.dtype, tolerance: float) -> None:
        x, t = torch.randn(4, *PATCHED.sample_shape).to(dtype), torch.tensor([3, 300, 700, 999])
        model = scrambled(PATCHED).to(dtype)
        exact = scrambled(PATCHED).double()
        exact.load_state_dict(model.state_dict())
        error = (model(x, t).double() - exact(x.double(), t)).square().mean().sqrt()
        assert error < tolerance * exact(x.double(), t).square().mean().sqrt()

    def test_narrow_weights_do_not_narrow_the_coefficients(self) -> None:
        x, t = torch.randn(2, *PATCHED.sample_shape), torch.tensor([400, 600])
        model = UNet(PATCHED, Schedule.linear()).bfloat16().requires_grad_(False)
        sigma = (1 - model.schedule.alphas_cumprod[t]).sqrt().float().view(-1, 1, 1, 1)
        assert torch.equal(model(x, t), sigma * x)

    def test_velocity_and_noise_agree(self) -> None:
        model = scrambled(PATCHED).double()
        x, t = torch.randn(3, *PATCHED.sample_shape).double(), torch.tensor([5, 400, 950])
        a = model.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        epsilon, velocity = model(x, t), model.predict_velocity(x, t)
        x_0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        expected = a.sqrt() * epsilon - (1 - a).sqrt() * x_0
        # The model's own √ᾱ and √(1 − ᾱ) are float32 numbers.
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)

    def test_every_parameter_and_the_timestep_matter(self) -> None:
        model = scrambled(TINY).requires_grad_(True)
        x = torch.randn(2, *TINY.sample_shape)
        early, late = model(x, torch.tensor([100, 100])), model(x, torch.tensor([700, 700]))
        assert not torch.allclose(early, late, rtol=0.1)
        early.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_samples_of_a_batch_do_not_mix(self) -> None:
        model = scrambled(TINY).double()
        x, t = torch.randn(7, *TINY.sample_shape).double(), torch.arange(7) * 140
        batch = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(batch, alone, rtol=1e-12, atol=1e-12)

    def test_wrong_shapes(self) -> None:
        model = scrambled(PATCHED)
        with pytest.raises(ValueError, match=r"x: expected \[B, 1, 8, 8\], got \[2, 3, 8, 8\]"):
            model(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"t: expected \[2\], got \[3\]"):
            model(torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"channels": (8, 12)}, "channels: expected multiples of groups = 8"),
            ({"channels": ()}, "channels: expected a tuple of positive integers"),
            ({"channels": (8, True)}, "channels: expected a tuple of positive integers"),
            ({"sample_shape": (8, 8)}, r"sample_shape: expected \(C, H, W\)"),
            ({"sample_shape": (1, 8, 10)}, "divisible by 4"),
            ({"blocks": 0}, "blocks: expected a positive integer, got 0"),
            ({"patch": 1.0}, "patch: expected a positive integer, got 1.0"),
            ({"heads": 3}, "heads: expected a divisor of 16 channels, got 3"),
        ],
    )
    def test_wrong_configuration(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(PATCHED, **change)


class TestFiles:
    def test_round_trip(self, folder: Path) -> None:
        saved = scrambled(PATCHED).half().float()
        loaded = models.load(folder)
        assert loaded.config == PATCHED
        assert loaded.schedule == Schedule.linear()
        assert loaded.sample_shape == (1, 8, 8)
        assert loaded.prediction == "epsilon"
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
        assert torch.equal(loaded(x, t), saved(x, t))

    def test_file_and_folder_are_the_same_model(self, folder: Path) -> None:
        by_folder, by_file = models.load(str(folder)), models.load(folder / "model.safetensors")
        for name, value in by_folder.state_dict().items():
            assert torch.equal(value, by_file.state_dict()[name]), name

    def test_loading_draws_no_random_numbers(self, folder: Path) -> None:
        before = torch.get_rng_state()
        models.load(folder)
        assert torch.equal(torch.get_rng_state(), before)

    def test_dtype(self, folder: Path) -> None:
        model = models.load(folder, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        with pytest.raises(
            TypeError, match=r"dtype: expected a floating-point dtype, got torch\.int8"
        ):
            models.load(folder, dtype=torch.int8)

    def test_refuses_a_device_that_is_not_there(self) -> None:
        """A missing device is refused in one sentence, instead of the fifty lines that torch has
        for some devices.
        """
        for device in ("vulkan", "abacus"):
            with pytest.raises(ValueError, match="device: expected a device that works here") as it:
                models.load("digits", device=device)
            assert "\n" not in str(it.value)
            assert "This could be because" not in str(it.value)
        wrong: Any = 0.5
        with pytest.raises(TypeError, match=r"device: expected a torch\.device .*, got 0\.5"):
            models.load("digits", device=wrong)

    def test_saving_leaves_no_part_and_readable_files(self, folder: Path) -> None:
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == ["model.json", "model.safetensors"]
        umask_file = folder / "new"
        umask_file.touch()
        assert {file.stat().st_mode for file in files} == {umask_file.stat().st_mode}

    def test_saving_refuses_another_schedule(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="record: expected record\\['schedule'\\]"):
            models.save(scrambled(PATCHED), tmp_path, {"schedule": {**LINEAR, "T": 999}})
        with pytest.raises(ValueError, match="record: expected record\\['schedule'\\]"):
            models.save(scrambled(PATCHED), tmp_path, {})
        assert not list(tmp_path.iterdir())

    def test_saving_refuses_what_float16_cannot_hold(self, tmp_path: Path) -> None:
        model = scrambled(PATCHED)
        model.conv_in.bias[0] = 1e6
        with pytest.raises(ValueError, match=r"finite in float16, got conv_in\.bias"):
            models.save(model, tmp_path, {"schedule": LINEAR})
        assert not list(tmp_path.iterdir())

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"name_or_path: .* digits, fashion, .*'cats'"):
            models.load("cats")

    @pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
    def test_missing_file(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            models.load(folder)

    @pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 100])
    @pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
    def test_corrupt_file(self, folder: Path, name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            models.load(folder)

    def test_truncated_weights(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
            models.load(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("architecture"), "architecture"),
            (lambda r: r.pop("schedule"), "schedule"),
            (lambda r: r.update(prediction="v_prediction"), "expected prediction 'epsilon'"),
            (lambda r: r["architecture"].pop("patch"), "architecture: expected"),
            (lambda r: r["architecture"].update(depth=3), "architecture: expected"),
            (lambda r: r["architecture"].update(channels="8"), "channels: expected a tuple"),
            (lambda r: r.update(architecture=[]), "architecture: expected"),
            (lambda r: r["schedule"].update(T=10**15), "schedule: expected T <= 1000000"),
            (lambda r: r["schedule"].update(beta_start=float("nan")), "got nan"),
            (lambda r: r["architecture"].update(blocks=10**9), "expected blocks <= "),
            (lambda r: r["architecture"].update(blocks=2), "got missing"),
            (lambda r: r["architecture"].update(channels=[8, 24], heads=2), r"of shape \(24,"),
        ],
    )
    def test_wrong_record(
        self, folder: Path, change: Callable[[dict[str, Any]], None], message: str
    ) -> None:
        edit_record(folder, change)
        with pytest.raises(ValueError, match=rf"(?s)model\.(json|safetensors).*{message}"):
            models.load(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("conv_in.bias"), r"missing \['conv_in.bias'\]"),
            (lambda s: s.update(extra=torch.zeros(1)), r"unknown \['extra'\]"),
            (lambda s: s.update({"conv_in.bias": torch.zeros(9)}), r"conv_in.bias of shape \(8,\)"),
            (lambda s: s["conv_in.bias"].fill_(torch.nan), "NaN or infinity in conv_in.bias"),
        ],
    )
    def test_wrong_weights(
        self, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
    ) -> None:
        path = folder / "model.safetensors"
        state = safetensors.torch.load(path.read_bytes())
        change(state)
        path.write_bytes(safetensors.torch.save(state))
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
            models.load(folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.json", "model-tuned.json"])
    def test_links_out_of_the_folder_are_refused(self, folder: Path, name: str) -> None:
        models.write_tuned(folder / "model-tuned.json", {})
        outside = folder / "elsewhere" / name
        outside.parent.mkdir()
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        with pytest.raises(ValueError, match=f"got a link: .*{name}"):
            models.load(folder)


class TestTuned:
    TUNED = MappingProxyType({S: random_steps(S) for S in (10, 3)})

    @pytest.fixture
    def path(self, folder: Path) -> Path:
        path = models.tuned_path(folder / "model.safetensors")
        models.write_tuned(path, self.TUNED)
        return path

    def test_none_without_a_file(self, folder: Path) -> None:
        tuned = models.load(folder).tuned
        assert len(tuned) == 0
        assert list(tuned) == []
        assert 10 not in tuned
        assert dict(UNet(PATCHED, Schedule.linear()).tuned) == {}

    def test_those_of_the_file(self, folder: Path, path: Path) -> None:
        assert path.name == "model-tuned.json"
        assert models.read_tuned(path) == self.TUNED
        model = models.load(folder)
        assert dict(model.tuned) == self.TUNED
        assert list(model.tuned) == [3, 10]
        assert fastddim.sample(model, model.tuned[3]).isfinite().all()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert dict(other.tuned) == self.TUNED
        assert repr(model.tuned) == f"TunedFile({str(path)!r}, [3, 10])"

    def test_beside_other_names_and_not_among_them(self, folder: Path, path: Path) -> None:
        for file in list(folder.iterdir()):
            file.rename(folder / file.name.replace("model", "mine"))
        assert dict(models.load(folder / "mine.safetensors").tuned) == self.TUNED

    def test_they_are_read_late(self, folder: Path, path: Path) -> None:
        path.write_text("{")
        tuned = models.load(folder).tuned
        with pytest.raises(ValueError, match=r"model-tuned.json: expected the JSON of tuned steps"):
            len(tuned)
        models.write_tuned(path, self.TUNED)
        assert len(tuned) == 2

    def test_another_model_has_others(self, folder: Path, path: Path) -> None:
        models.save(scrambled(PATCHED), folder, {"schedule": LINEAR})
        assert not path.exists()

    def test_the_wrong_key(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"^tuned\[4\]: expected 4 steps, got TunedSteps\(S=3"):
            models.write_tuned(folder / "x.json", {4: random_steps(3)})
        assert not (folder / "x.json").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.update(version=2), "version: expected 1, got 2"),
            (
                lambda c: c.pop("steps"),
                r"steps: expected a list of tuned .*, got NoneType and \[\]",
            ),
            (
                lambda c: c.update(more=1),
                r"steps: expected a list .*got list and \['more', 'steps'",
            ),
            (lambda c: c.update(steps={}), r"steps: expected a list of tuned steps .*, got dict"),
            (lambda c: c["steps"].append(3), r"steps\[2\]: tuned steps: expected a mapping"),
            (lambda c: c["steps"].append(c["steps"][0]), r"steps\[2\]: expected another .*got 3"),
            (lambda c: c["steps"][1].update(history=[]), r"steps\[1\]: history: expected one"),
        ],
    )
    def test_other_files(
        self, path: Path, change: Callable[[dict[str, Any]], None], message: str
    ) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"model-tuned\.json: {message}"):
            models.read_tuned(path)

    def test_files_of_one_and_of_many_are_told_apart(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"model-tuned\.json: tuned steps: expected the fields"
        ):
            fastddim.load_steps(path)
        random_steps(3).save(path)
        with pytest.raises(ValueError, match=r"model-tuned\.json: steps: expected a list of tuned"):
            models.read_tuned(path)


class TestBundled:
    @pytest.fixture(params=["digits", "fashion"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def record(self, name: str) -> dict[str, Any]:
        weights = Path(models.__file__).parent / "weights"
        loaded: dict[str, Any] = json.loads((weights / f"{name}.json").read_text())
        return loaded

    @staticmethod
    def held_out(name: str) -> torch.Tensor:
        """The first 64 images that training never saw, as the records count them."""
        if name == "fashion":
            with np.load(Path(__file__).parent / "data" / "fashion_test.npz") as data:
                return torch.from_numpy(data["images"])[:, None].float() / 127.5 - 1
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images)[:, None].float() / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order[:64]]

    def test_both_are_available_and_small(self) -> None:
        assert models.available() == ("digits", "fashion")
        weights = Path(models.__file__).parent / "weights"
        assert sum(file.stat().st_size for file in weights.glob("*.safetensors")) <= 4_000_000

    def test_its_tuned_steps_can_be_used(self, name: str) -> None:
        model = models.load(name)
        for S, tuned in model.tuned.items():
            assert tuned.steps == S
            assert tuned.tuned_for.schedule == schedule_digest(model.schedule)
            assert tuned.tuned_for.prediction == model.prediction

    def test_carries_what_sampling_needs(self, name: str, record: dict[str, Any]) -> None:
        model = models.load(name)
        assert model.sample_shape == {"digits": (1, 8, 8), "fashion": (1, 28, 28)}[name]
        assert model.schedule == Schedule.linear()
        assert model.prediction == "epsilon"
        assert sum(p.numel() for p in model.parameters()) == record["parameters"]

    def test_record_says_how_it_was_made(self, name: str, record: dict[str, Any]) -> None:
        training = record["training"]
        assert record["name"] == name
        assert {"name", "licence", "held_out"} <= record["data"].keys()
        assert {"seed", "batch", "learning_rate", "ema", "minutes", "torch"} <= training.keys()
        assert training["steps_done"] == training["steps"]
        first = training
        while first.get("start"):
            first = first["start"]
        losses = [*first["loss_at_step"].values(), *training["loss_at_step"].values()]
        assert losses[-1] < 0.8 * losses[0]

    def test_held_out_loss_is_the_recorded_one(self, name: str, record: dict[str, Any]) -> None:
        recorded = record["quality"]["held_out_epsilon_loss"][0]
        images = self.held_out(name)
        assert recorded["images"] == len(images)
        model = models.load(name)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        for timestep, loss in recorded["at_timestep"].items():
            a = model.schedule.alphas_cumprod[int(timestep)]
            x_t = (a.sqrt() * images + (1 - a).sqrt() * noise).float()
            predicted = model(x_t, torch.full((64,), int(timestep)))
            assert (predicted - noise).square().mean().item() == pytest.approx(loss, rel=1e-3)

    def test_denoises_real_images(self, name: str) -> None:
        images, model = self.held_out(name), models.load(name)
        a = model.schedule.alphas_cumprod[300].float()
        noise = torch.randn(images.shape) * ((1 - a) / a).sqrt()
        x_t = a.sqrt() * (images + noise)
        x_0 = (x_t - (1 - a).sqrt() * model(x_t, torch.full((64,), 300))) / a.sqrt()
        assert (x_0 - images).square().mean() < 0.1 * noise.square().mean()

    def test_batch_size_changes_rounding_only(self, name: str) -> None:
        model, x = models.load(name), self.held_out(name)[:6]
        t = torch.tensor([1, 200, 400, 600, 800, 999])
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(6)])
        # Processors differ in the order of some thousand float32 terms an output.
        torch.testing.assert_close(model(x, t), alone, rtol=0, atol=1e-4)

    def test_a_folder_of_the_same_name_does_not_hide_it(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        models.save(scrambled(PATCHED), name, {"schedule": LINEAR})
        assert models.load(name).config != PATCHED
        assert models.load(f"./{name}").config == PATCHED


def test_the_range_of_samples_is_the_one_documented() -> None:
    model = models.load("digits")
    x = fastddim.sample(model, 20, batch_size=256, seed=0)
    beyond = x.abs() > 1
    assert beyond.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert 1.05 < x.abs().max() < 1.15
    clipped = fastddim.sample(model, 20, batch_size=256, seed=0, clip=1.0)
    assert clipped.abs().max() == 1


def test_importing_the_package_reads_no_model(run_python: Any, tmp_path: Path) -> None:
    code = "import sys, fastddim.models; print('safetensors' in sys.modules)"
    result = run_python("-c", code, cwd=tmp_path)
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize("name", models.available())
class TestBundledTunedSteps:
    def test_are_there(self, name: str) -> None:
        tuned = models.load(name).tuned
        assert list(tuned) == [4, 5, 6, 8, 10, 12, 15, 20]
        for S, steps in tuned.items():
            assert steps.chosen == "tuned"
            assert steps.errors["tuned"] < 0.75 * steps.errors["order 2"]
            command = f"fastddim tune {name} --steps (\\d+,)*{S} --effort thorough"
            assert re.fullmatch(command, steps.record["command"])

    def test_come_closer_to_the_solution_than_order_2(self, name: str) -> None:
        """Tuned steps come closer to the solution than order 2, on latents that the tuner did not
        use.
        """
        model = models.load(name)
        x_T = fastddim.philox.initial_latents((24, *model.sample_shape), seed=77)
        solution = fastddim.sample(model, 60, order=2, x_T=x_T)
        tuned, plain = (
            (fastddim.sample(model, steps, order=order, x_T=x_T) - solution)
            .square()
            .flatten(1)
            .mean(1)
            .sqrt()
            .median()
            for steps, order in ((model.tuned[8], 1), (8, 2))
        )
        assert tuned < 0.6 * plain
