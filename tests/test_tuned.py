"""Tuned steps: the object, its file, and the samples it leads to."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import Schedule, TunedSteps, load_steps
from fastddim.options import Update
from fastddim.plan import make_plan
from fastddim.tuned import TunedFor, schedule_digest

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model
from .support.tuned import LINEAR, random_steps, steps_of_order, tuned_for

SHAPE = (2, 3, 5, 7)
TIMESTEPS = [930, 500, 499, 120, 3, 0]
ZERO_SNR = Schedule.cosine().zero_terminal_snr()


def guided_model(x: Tensor, t: Tensor) -> Tensor:
    shift = torch.linspace(-1, 1, len(x)).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return elementwise_model(x, t) + shift


def halved(x_0: Tensor, t: Tensor) -> Tensor:
    return x_0.mul_(0.5) + t.reshape(-1, 1, 1, 1) * (1 / 4096)


def sample(steps: Any, model: Any = elementwise_model, **options: Any) -> Any:
    return fastddim.sample(
        model, steps, **{"shape": SHAPE, "impl": "reference", "seed": 0} | options
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "sample": {"prediction": "sample"},
    "v": {"prediction": "v_prediction", "schedule": ZERO_SNR},
    "clip": {"clip": 0.6},
    "rederived": {"clip": 0.6, "rederive_eps": True},
    "guided": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
    "thresholded": {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
}


def model_of(options: dict[str, Any]) -> Any:
    return guided_model if "guidance_scale" in options else elementwise_model


class TestSamples:
    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("name", OPTIONS)
    def test_the_weights_of_an_order_give_its_bits(self, name, order, split, impl):
        options, hook = OPTIONS[name], {"denoised_fn": halved} if split else {}
        tuned = steps_of_order(order, TIMESTEPS, **options)
        call = {"model": model_of(options), "impl": impl, **options, **hook}
        assert torch.equal(sample(tuned, **call), sample(TIMESTEPS, order=order, **call))

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    @pytest.mark.parametrize("split", [False, True])
    @pytest.mark.parametrize("name", OPTIONS)
    def test_every_backend_agrees_with_the_reference(self, name, split, impl):
        options, hook = OPTIONS[name], {"denoised_fn": halved} if split else {}
        tuned = random_steps(6, **options)
        call = {"model": model_of(options), "dtype": torch.float64, **options, **hook}
        expected = sample(tuned, **call)
        assert expected.isfinite().all()
        close = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(sample(tuned, impl=impl, **call), expected, **close)

    @pytest.mark.parametrize("S", [1, 2, 9])
    def test_the_formula(self, S):
        def predicted(x, m, a):
            return (x - math.sqrt(1 - a) * m) / math.sqrt(a), m

        self.check_by_hand(random_steps(S), predicted)

    def test_the_formula_at_zero_terminal_snr(self):
        def predicted(x, v, a):
            x_0 = math.sqrt(a) * x - math.sqrt(1 - a) * v
            return x_0, math.sqrt(1 - a) * x + math.sqrt(a) * v

        tuned = replace(
            random_steps(3, schedule=ZERO_SNR, prediction="v_prediction"), timesteps=(999, 400, 10)
        )
        options = {"schedule": ZERO_SNR, "prediction": "v_prediction"}
        self.check_by_hand(tuned, predicted, **options)

    def test_clipped_and_rederived(self):
        def predicted(x, m, a):
            x_0 = ((x - math.sqrt(1 - a) * m) / math.sqrt(a)).clamp(-0.6, 0.6)
            return x_0, (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)

        options = {"clip": 0.6, "rederive_eps": True}
        self.check_by_hand(random_steps(4, **options), predicted, **options)

    def check_by_hand(self, tuned, predicted, **options):
        """Compare with the steps written out; `predicted` gives x_0 and ε of x, m and ᾱ."""
        x = x_T = torch.randn(SHAPE, dtype=torch.float64)
        schedule = options.get("schedule", LINEAR)
        alphas = [*schedule.alphas_cumprod[list(tuned.timesteps)].tolist(), 1.0]
        before = torch.zeros_like(x)
        for s, t in enumerate(tuned.timesteps):
            a, p = alphas[s : s + 2]
            x_0, epsilon = predicted(x, elementwise_model(x, torch.full((len(x),), t)), a)
            x = math.sqrt(p) * x_0 + tuned.direction[s] * epsilon + tuned.history[s] * before
            before = epsilon
        torch.testing.assert_close(sample(tuned, x_T=x_T, **options), x, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("impl", CPU_IMPLS)
    def test_a_sampler_gives_the_same(self, impl):
        tuned = random_steps(7, clip=1.0)
        sampler = fastddim.Sampler(elementwise_model, tuned, shape=SHAPE, clip=1.0, impl=impl)
        for seed in (3, 4):
            assert torch.equal(sampler(seed=seed), sample(tuned, seed=seed, clip=1.0, impl=impl))

    def test_masks_trajectory_and_callback(self):
        tuned, known = random_steps(4), torch.randn(SHAPE)
        mask = (torch.rand(SHAPE) > 0.5).float()
        timesteps = []
        states = sample(
            tuned,
            mask=mask,
            known=known,
            return_trajectory=True,
            callback=lambda s, t, x, x_0: timesteps.append(t),
        )
        assert tuple(timesteps) == tuned.timesteps
        assert len(states) == tuned.steps + 1
        torch.testing.assert_close(states[-1][mask == 1], known[mask == 1])

    def test_weights_change_between_calls_of_one_loop(self):
        """Weights may change between calls of one loop: loops are kept by the number of steps and
        their kind.
        """
        first, second = random_steps(5, seed=1), random_steps(5, seed=2)
        apart = [sample(steps, impl="auto") for steps in (first, second, 5)]
        assert len({x.double().sum().item() for x in apart}) == 3
        again = [sample(steps, impl="auto") for steps in (5, second, first)]
        assert all(map(torch.equal, apart, reversed(again)))

    def test_the_plan(self):
        tuned = random_steps(5)
        plan = make_plan(LINEAR, tuned, Update().checked(None))
        assert plan.tuned is tuned
        assert (plan.order, plan.kind.history, plan.kind.noisy) == (2, 1, False)
        assert tuple(plan.timesteps.tolist()) == tuned.timesteps
        assert fastddim.select_timesteps(1000, tuned).tolist() == plan.timesteps.tolist()


class TestRefusals:
    TUNED = random_steps(5, clip=1.0, guidance_scale=2.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"clip": None}, "steps: expected clip 1.0, for which they were tuned, got None"),
            ({"clip": 0.5}, "steps: expected clip 1.0, for which they were tuned, got 0.5"),
            (
                {"prediction": "v_prediction"},
                "steps: expected prediction 'epsilon', for which they were tuned, "
                "got 'v_prediction'",
            ),
            (
                {"rederive_eps": True},
                "steps: expected rederive_eps False, for which they were tuned, got True",
            ),
            (
                {"guidance_scale": None},
                "steps: expected guidance_scale 2.0, for which they were tuned, got None",
            ),
            (
                {"guidance_scale": 3},
                "steps: expected guidance_scale 2.0, for which they were tuned, got 3.0",
            ),
            (
                {"guidance_scale": [2, 2, 2, 2, 3]},
                r"guidance_scale: expected the same number at each step .*got \[2.0, 3.0\]",
            ),
            (
                {"guidance_scale": torch.tensor([1.0, 2.0])},
                r"guidance_scale: expected the same number .*got \[1.0, 2.0\]",
            ),
            (
                {"guidance_rescale": 0.5},
                "steps: expected guidance_rescale 0.0, for which they were tuned, got 0.5",
            ),
            (
                {"clip": None, "dynamic_thresholding_ratio": 0.9},
                "steps: expected clip 1.0, for which they were tuned, got None",
            ),
            (
                {"schedule": Schedule.cosine()},
                "steps: expected the schedule for which they were tuned, T = 1000 and SHA-256 of "
                r"alphas_cumprod \w+…, got Schedule\(.*\), T = 1000 and SHA-256",
            ),
            (
                {"schedule": Schedule.linear(T=1001)},
                "steps: expected the schedule for which .* T = 1000 .* T = 1001 ",
            ),
            ({"eta": 0.5}, "eta: expected 0 with tuned steps, which solve an ODE, got 0.5"),
            ({"eta": [0, 0, 0, 0, 1]}, "eta: expected 0 with tuned steps"),
            ({"order": 2}, "order: expected 1, the default, with tuned steps, .*got 2"),
            (
                {"spacing": "quadratic"},
                "spacing: expected '.*', the default, with tuned steps, .*got 'quadratic'",
            ),
        ],
    )
    @pytest.mark.parametrize("call", [fastddim.sample, fastddim.Sampler])
    def test_what_they_were_not_tuned_for(self, call, options, message):
        arguments = {"shape": SHAPE, "clip": 1.0, "guidance_scale": 2.0, **options}
        with pytest.raises(ValueError, match=f"^{message}"):
            call(guided_model, self.TUNED, **arguments)

    @pytest.mark.parametrize(
        "guidance", [2, [2.0] * 5, torch.tensor([2.0, 2.0]), [torch.full((2,), 2.0)] * 5]
    )
    def test_equal_guidance_is_taken(self, guidance):
        options = {"model": guided_model, "clip": 1.0}
        given = sample(self.TUNED, guidance_scale=guidance, **options)
        assert torch.equal(given, sample(self.TUNED, guidance_scale=2.0, **options))

    def test_thresholding(self):
        tuned = random_steps(5, dynamic_thresholding_ratio=0.9)
        with pytest.raises(ValueError, match=r"sample_max_value None, for which .*got 2"):
            sample(tuned, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)

    def test_an_inversion(self):
        tuned, x_0 = random_steps(5), torch.randn(SHAPE)
        with pytest.raises(ValueError, match=r"^steps: expected a number or timesteps to invert"):
            fastddim.invert(elementwise_model, x_0, tuned)
        assert fastddim.invert(elementwise_model, x_0, tuned.timesteps).isfinite().all()

    def test_a_short_schedule(self):
        with pytest.raises(ValueError, match=r"^steps\[0\]: expected an integer in \[0, 9\]"):
            fastddim.select_timesteps(10, random_steps(5))


def changed(**fields: Any) -> dict[str, Any]:
    content = {
        "timesteps": (9, 5, 1),
        "direction": (0.5, 0.25, -1),
        "history": (0, 0.5, 0.125),
        "tuned_for": tuned_for(),
    }
    return content | fields


class TestObject:
    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"timesteps": ()}, ValueError, "timesteps: expected at least one, got none"),
            ({"timesteps": 3}, TypeError, "timesteps: expected a sequence of numbers, got 3"),
            (
                {"timesteps": (9, 9, 1)},
                ValueError,
                r"timesteps: expected strictly decreasing ones, got timesteps\[1\] = 9 after 9",
            ),
            (
                {"timesteps": (1000, 9, 1)},
                ValueError,
                r"timesteps\[0\]: expected an integer in \[0, 999\], got 1000",
            ),
            ({"timesteps": (9, 5.0, 1)}, TypeError, r"timesteps\[1\]: expected an integer"),
            (
                {"direction": (0.5, 0.5)},
                ValueError,
                "direction: expected one value a step, 3, got 2 of them",
            ),
            (
                {"direction": (0.5, math.nan, 0)},
                ValueError,
                r"direction\[1\]: expected a finite number, got nan",
            ),
            ({"direction": "123"}, TypeError, "direction: expected a sequence of numbers"),
            (
                {"history": (0.0, "1", 0)},
                TypeError,
                r"history\[1\]: expected a number, got '1' \(str\)",
            ),
            ({"history": (0.5, 0, 0)}, ValueError, r"history\[0\]: expected 0, .*got 0.5"),
            ({"tuned_for": None}, TypeError, "tuned_for: expected a TunedFor, got NoneType"),
            (
                {"errors": {"order 3": 1.0}},
                ValueError,
                "errors: expected one of 'tuned', 'order 1', 'order 2', got 'order 3'",
            ),
            (
                {"errors": {"tuned": -1}},
                ValueError,
                r"errors\['tuned'\]: expected a finite number >= 0, got -1",
            ),
            ({"errors": [1]}, TypeError, r"errors: expected a mapping from strings, got \[1\]"),
            ({"chosen": "best"}, ValueError, "chosen: expected one of 'tuned', .*got 'best'"),
            ({"record": {3: 4}}, TypeError, "record: expected a mapping from strings"),
        ],
    )
    def test_fields(self, fields, error, message):
        with pytest.raises(error, match=f"^{message}"):
            TunedSteps(**changed(**fields))

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"schedule": 3}, TypeError, "schedule: expected a string, got 3"),
            ({"schedule": "ab"}, ValueError, "schedule: expected a SHA-256 of 64 hex digits"),
            ({"schedule": "G" * 64}, ValueError, "schedule: expected a SHA-256 of 64 hex digits"),
            ({"T": 0}, ValueError, r"T: expected an integer in \[1, "),
            ({"prediction": None}, TypeError, "prediction: expected a string, got None"),
            ({"clip": "1"}, TypeError, "clip: expected a number"),
            ({"rederive_eps": 1}, TypeError, "rederive_eps: expected True or False"),
            ({"guidance_scale": math.inf}, ValueError, "guidance_scale: expected a finite"),
            ({"guidance_rescale": None}, TypeError, "guidance_rescale: expected a number"),
        ],
    )
    def test_what_they_are_for(self, fields, error, message):
        with pytest.raises(error, match=f"^{message}"):
            replace(tuned_for(), **fields)

    def test_lists_become_tuples_and_integers_numbers(self):
        tuned = TunedSteps(**changed(timesteps=[9, 5, 1], direction=[1, 2, 3]))
        assert tuned.timesteps == (9, 5, 1)
        assert tuned.direction == (1.0, 2.0, 3.0)
        assert all(type(v) is float for v in (*tuned.direction, *tuned.history))
        assert tuned.steps == 3

    def test_they_cannot_be_changed(self):
        with pytest.raises(FrozenInstanceError):
            random_steps().timesteps = (1,)

    def test_copies_are_equal(self):
        tuned = random_steps(4, clip=1.0)
        for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned)), replace(tuned)):
            assert other == tuned
            assert hash(other) == hash(tuned)
        assert tuned != random_steps(4, clip=0.5)
        assert tuned != random_steps(4, seed=1, clip=1.0)

    def test_repr_is_one_line(self):
        tuned = random_steps(4, clip=1.0, guidance_scale=2.0)
        assert repr(tuned) == (
            "TunedSteps(S=4, T=1000, prediction='epsilon', clip=1.0, guidance_scale=2.0; "
            "errors: tuned 0.0123, order 1 0.5, order 2 0.333; chosen: tuned)"
        )
        assert repr(replace(tuned, errors={})).endswith("; errors: unknown; chosen: tuned)")
        assert repr(tuned_for()) == "TunedFor(T=1000, prediction='epsilon')"

    def test_the_digest_is_that_of_the_bytes(self):
        import hashlib

        values = Schedule.from_alphas_cumprod([0.5, 0.25])
        expected = hashlib.sha256(bytes.fromhex("000000000000e03f000000000000d03f")).hexdigest()
        assert schedule_digest(values) == expected
        assert TunedFor.of(values, Update()).schedule == expected


class TestFile:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "steps.json"
        for S in (1, 2, 30):
            tuned = replace(
                random_steps(S, clip=1 / 3, schedule=ZERO_SNR), chosen="order 2", record={"π": [1]}
            )
            tuned.save(path)
            found = load_steps(path)
            assert found == tuned
            assert repr(found.as_dict()) == repr(tuned.as_dict()), "to the last bit, -0.0 as well"
        assert [file.name for file in tmp_path.iterdir()] == ["steps.json"]
        assert TunedSteps.from_dict(json.loads(json.dumps(tuned.as_dict()))) == tuned

    def test_a_record_that_is_no_json_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "steps.json"
        random_steps().save(path)
        for value in (object(), math.nan):
            with pytest.raises(ValueError, match=r"^record: expected what JSON can hold, got "):
                replace(random_steps(), record={"x": value}).save(path)
        assert load_steps(path) == random_steps()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, "format: expected 'fastddim tuned steps', got 'other'"),
            ({"format": None}, "format: expected 'fastddim tuned steps', got None"),
            ({"version": 2}, "version: expected 1, got 2"),
            ({"version": True}, "version: expected 1, got True"),
            ({"extra": 1}, r"tuned steps: expected .*missing \[\] and unknown \['extra'\]"),
            ({"errors": ...}, r"tuned steps: expected .*missing \['errors'\] and unknown \[\]"),
            ({"timesteps": [1, 2]}, "timesteps: expected strictly decreasing"),
            ({"timesteps": [2.5, 1]}, r"timesteps\[0\]: expected an integer, got 2.5"),
            ({"timesteps": None}, "timesteps: expected a sequence of numbers, got None"),
            ({"direction": [10**400] * 5}, r"direction\[0\]: expected a finite number, got inf"),
            ({"history": {}}, "history: expected a sequence of numbers, got {}"),
            ({"tuned_for": []}, r"tuned_for: expected a mapping from strings, got \[\]"),
            ({"tuned_for": {}}, r"tuned_for: expected the fields schedule, T, .*missing \['T'"),
            ({"chosen": 3}, "chosen: expected one of 'tuned', 'order 1', 'order 2', got 3"),
            ({"record": "x"}, "record: expected a mapping from strings, got 'x'"),
        ],
    )
    def test_wrong_fields(self, tmp_path, change, message):
        path = tmp_path / "steps.json"
        random_steps().save(path)
        content = json.loads(path.read_text()) | change
        content = {name: value for name, value in content.items() if value is not ...}
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            load_steps(path)
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("T", 999.5, "tuned_for.T: expected an integer, got 999.5"),
            ("clip", "1", "tuned_for.clip: expected a number, got '1'"),
            ("prediction", None, "tuned_for.prediction: expected a string, got None"),
            ("schedule", "00", "tuned_for.schedule: expected a SHA-256 of 64 hex digits, got '00'"),
        ],
    )
    def test_wrong_fields_of_what_they_are_for(self, tmp_path, field, value, message):
        path = tmp_path / "steps.json"
        random_steps().save(path)
        content = json.loads(path.read_text())
        content["tuned_for"][field] = value
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            load_steps(path)
        assert str(caught.value).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"{",
            b"\xff",
            b"[1]",
            b"3",
            b"null",
            b"[" * 100_000,
            b'{"format": "fastddim tuned steps", "version": 1, "record": {"x": NaN}}',
        ],
    )
    def test_other_files(self, tmp_path, text):
        path = tmp_path / "steps.json"
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"(JSON|format): expected|expected the JSON"):
            load_steps(path)

    def test_a_file_that_is_too_large(self, tmp_path):
        path = tmp_path / "steps.json"
        with path.open("wb") as file:
            file.truncate(2**30)
        with pytest.raises(ValueError, match="expected at most 16777216 bytes, got more"):
            load_steps(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_steps(tmp_path / "steps.json")
