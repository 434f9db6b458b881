"""Wrong input: an error that names the argument, what was expected and what was given.

Every message is matched whole: `name: expected … got …`. Entry points share their options and the
checks of these, so every wrong value goes through one of them, and one of each argument through the
others.
"""

from __future__ import annotations

import math
import re
import types

import numpy as np
import pytest
import torch

import fastddim
from fastddim import Sampler, Schedule, philox, select_timesteps

from .support.environment import CPU_IMPLS
from .support.models import elementwise_model

B, SHAPE = 2, (2, 3, 4)
X = torch.zeros(SHAPE)
META = torch.zeros(SHAPE, device="meta")
NAN, INF = math.nan, math.inf


def untouched(x, t, **kwargs):
    raise AssertionError("the model was called before the input was checked")


def sample(steps=5, model=untouched, **kwargs):
    if "x_T" not in kwargs:
        kwargs.setdefault("shape", SHAPE)
    return fastddim.sample(model, steps, **kwargs)


def prepare(steps=5, model=untouched, **kwargs):
    return Sampler(model, steps, **{"shape": SHAPE, **kwargs})


def call_sampler(eta=0.0, **kwargs):
    return prepare(eta=eta)(**kwargs)


def invert(steps=5, x_0=X, model=untouched, **kwargs):
    return fastddim.invert(model, x_0, steps, **kwargs)


def step(x_t=X, model_output=X, alpha_t=0.5, alpha_prev=0.8, **kwargs):
    return fastddim.step(x_t, model_output, alpha_t, alpha_prev, **kwargs)


def slerp(z_0=X, z_1=X, weight=0.5):
    return fastddim.slerp(z_0, z_1, weight)


def add_noise(x_0=X, t=3, noise=X, **kwargs):
    return Schedule.linear().add_noise(x_0, t, noise, **kwargs)


def fails(call, error, name, expected, given, **kwargs):
    """`call(**kwargs)` raises `name: expected <expected>… got <given>…`, and nothing looser."""
    with pytest.raises(error) as caught:
        call(**kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.match(rf"{re.escape(name)}: expected .*got ", message, re.DOTALL), message
    assert expected in message, message
    assert given in message.rpartition("got ")[2], message


def through(cases, **calls):
    """Parameters: every case with the first call, and the first case of each argument with the
    others.

    Args:
        cases: by name, (what is given, error, name in the message, expected, given).
        **calls: by name.
    """
    (first, call), *others = calls.items()
    parameters, arguments = [], set()
    for case, (given, error, name, *rest) in cases.items():
        parameters.append(pytest.param(call, given, error, name, *rest, id=f"{first}-{case}"))
        argument = name.partition("[")[0]
        if argument in arguments:
            continue
        arguments.add(argument)
        parameters += [
            pytest.param(its_call, given, error, name, *rest, id=f"{other}-{case}")
            for other, its_call in others
        ]
    return parameters


def numbered(*cases):
    return {
        f"{name}-{i}": (given, error, name, *rest)
        for i, (given, error, name, *rest) in enumerate(cases)
    }


STEPS = {
    "zero": (0, ValueError, "steps", "[1, 1000]", "0"),
    "negative": (-3, ValueError, "steps", "[1, 1000]", "-3"),
    "more than T": (1001, ValueError, "steps", "[1, 1000]", "1001"),
    "float": (50.0, TypeError, "steps", "integer", "50.0"),
    "bool": (True, TypeError, "steps", "integer", "True"),
    "none": (None, TypeError, "steps", "integer", "None"),
    "string": ("50", TypeError, "steps", "integer", "'50'"),
    "empty": ([], ValueError, "steps", "at least one timestep", "none"),
    "repeated": ([9, 5, 5, 1], ValueError, "steps", "strictly decreasing", "steps[2] = 5 after 5"),
    "increasing": ([1, 5, 9], ValueError, "steps", "strictly decreasing", "steps[1] = 5 after 1"),
    "T": ([1000, 5], ValueError, "steps[0]", "[0, 999]", "1000"),
    "below 0": ([5, -1], ValueError, "steps[1]", "[0, 999]", "-1"),
    "float in list": ([9.0, 5.0], TypeError, "steps[0]", "integer", "9.0"),
    "bool in list": ([True, False], TypeError, "steps[0]", "integer", "True"),
    "nan in list": ([NAN], TypeError, "steps[0]", "integer", "nan"),
    "float tensor": (torch.tensor([9.0, 5.0]), TypeError, "steps[0]", "integer", "9.0"),
    "matrix": (torch.tensor([[9, 5]]), TypeError, "steps", "integer", "[9, 5]"),
}


@pytest.mark.parametrize(
    ("call", "steps", "error", "name", "expected", "given"),
    through(
        STEPS,
        sample=sample,
        Sampler=prepare,
        invert=invert,
        select_timesteps=lambda steps: select_timesteps(1000, steps),
    ),
)
def test_steps(call, steps, error, name, expected, given):
    fails(call, error, name, expected, given, steps=steps)


def test_steps_of_a_short_schedule():
    short = Schedule.linear(10)
    fails(sample, ValueError, "steps", "[1, 10]", "11", steps=11, schedule=short)
    fails(sample, ValueError, "steps[0]", "[0, 9]", "10", steps=[10], schedule=short)


SHARED = {
    "spacing": (
        {"spacing": "cosine"},
        ValueError,
        "spacing",
        "'uniform', 'quadratic', 'leading'",
        "'cosine'",
    ),
    "spacing type": ({"spacing": 3}, ValueError, "spacing", "'trailing', 'linspace'", "3"),
    "offset elsewhere": ({"steps_offset": 1}, ValueError, "steps_offset", "0 unless", "1"),
    "offset negative": (
        {"spacing": "leading", "steps_offset": -1},
        ValueError,
        "steps_offset",
        "[0, 999]",
        "-1",
    ),
    "offset float": (
        {"spacing": "leading", "steps_offset": 1.0},
        TypeError,
        "steps_offset",
        "integer",
        "1.0",
    ),
    "offset too large": (
        {"spacing": "leading", "steps_offset": 200},
        ValueError,
        "steps_offset",
        "below T = 1000",
        "1000",
    ),
    "prediction": (
        {"prediction": "flow"},
        ValueError,
        "prediction",
        "'epsilon', 'sample', 'v_prediction', 'score'",
        "'flow'",
    ),
    "schedule": ({"schedule": "linear"}, TypeError, "schedule", "fastddim.Schedule", "str"),
    "betas as schedule": (
        {"schedule": torch.rand(5)},
        TypeError,
        "schedule",
        "fastddim.Schedule",
        "Tensor",
    ),
    "guidance string": ({"guidance_scale": "3"}, TypeError, "guidance_scale", "number", "'3'"),
    "guidance bool": ({"guidance_scale": True}, TypeError, "guidance_scale", "number", "True"),
    "guidance nan": ({"guidance_scale": NAN}, ValueError, "guidance_scale", "finite", "nan"),
    "guidance shape": (
        {"guidance_scale": torch.ones(3)},
        ValueError,
        "guidance_scale",
        "[2]",
        "(3,)",
    ),
    "guidance matrix": (
        {"guidance_scale": torch.ones(2, 1)},
        ValueError,
        "guidance_scale",
        "[2]",
        "(2, 1)",
    ),
    "guidance tensor nan": (
        {"guidance_scale": torch.tensor([1, NAN])},
        ValueError,
        "guidance_scale[1]",
        "finite",
        "nan",
    ),
    "guidance complex": (
        {"guidance_scale": torch.ones(2, dtype=torch.complex64)},
        TypeError,
        "guidance_scale",
        "real",
        "complex64",
    ),
    "impl": ({"impl": "cuda9"}, ValueError, "impl", "'auto', ", "'cuda9'"),
    "impl type": ({"impl": None}, ValueError, "impl", "'reference'", "None"),
    "graph": ({"graph": "always"}, ValueError, "graph", "'auto', True, False, 'loop'", "'always'"),
    "device name": ({"device": "gpu"}, ValueError, "device", "device", "'gpu'"),
    "device type": ({"device": 1.5}, TypeError, "device", "torch.device", "1.5"),
    "dtype name": ({"dtype": "float32"}, TypeError, "dtype", "torch.dtype", "'float32'"),
    "dtype integer": ({"dtype": torch.int64}, ValueError, "dtype", "torch.float32", "torch.int64"),
    "dtype complex": (
        {"dtype": torch.complex64},
        ValueError,
        "dtype",
        "torch.float32",
        "complex64",
    ),
    "check_finite": ({"check_finite": 1}, TypeError, "check_finite", "True or False", "1"),
    "model_kwargs": ({"model_kwargs": [1]}, TypeError, "model_kwargs", "mapping", "[1]"),
    "model": ({"model": 3}, TypeError, "model", "callable", "int"),
}


@pytest.mark.parametrize(
    ("call", "kwargs", "error", "name", "expected", "given"),
    through(SHARED, sample=sample, Sampler=prepare, invert=invert),
)
def test_shared_arguments(call, kwargs, error, name, expected, given):
    fails(call, error, name, expected, given, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without CUDA")
def test_cuda_where_there_is_none():
    for call in (sample, prepare, invert):
        fails(call, ValueError, "device", "works here", "'cuda'", device="cuda")
        for mode in (True, "loop"):
            with pytest.raises(ValueError, match=r"^graph: ") as caught:
                call(graph=mode)
            assert str(caught.value) == (
                f"graph: expected 'auto' or False on cpu, which captures no graphs, got {mode!r}"
            )


UPDATE = {
    "eta negative": ({"eta": -1.0}, ValueError, "eta", ">= 0", "-1.0"),
    "eta nan": ({"eta": NAN}, ValueError, "eta", "finite", "nan"),
    "eta inf": ({"eta": INF}, ValueError, "eta", "finite", "inf"),
    "eta string": ({"eta": "1"}, TypeError, "eta", "number", "'1'"),
    "eta none": ({"eta": None}, TypeError, "eta", "number", "None"),
    "eta bool": ({"eta": True}, TypeError, "eta", "number", "True"),
    "eta shape": ({"eta": torch.ones(3)}, ValueError, "eta", "[2]", "(3,)"),
    "eta tensor negative": (
        {"eta": torch.tensor([0.5, -0.5])},
        ValueError,
        "eta[1]",
        ">= 0",
        "-0.5",
    ),
    "eta tensor nan": ({"eta": torch.tensor([0.5, NAN])}, ValueError, "eta[1]", "finite", "nan"),
    "eta tensor bool": ({"eta": torch.ones(2, dtype=torch.bool)}, TypeError, "eta", "real", "bool"),
    "eta too large": ({"eta": 5.0}, ValueError, "eta", "1 - alpha_prev - sigma**2 >= 0", "eta = 5"),
    "eta tensor too large": (
        {"eta": torch.tensor([0.0, 5.0])},
        ValueError,
        "eta",
        "1 - alpha_prev - sigma**2 >= 0",
        "5.0",
    ),
    "variance": ({"variance": "medium"}, ValueError, "variance", "'small', 'large'", "'medium'"),
    "clip zero": ({"clip": 0.0}, ValueError, "clip", "> 0", "0.0"),
    "clip negative": ({"clip": -1.0}, ValueError, "clip", "> 0", "-1.0"),
    "clip nan": ({"clip": NAN}, ValueError, "clip", "finite", "nan"),
    "clip bool": ({"clip": True}, TypeError, "clip", "number", "True"),
    "clip pair": ({"clip": (-1, 1)}, TypeError, "clip", "number", "(-1, 1)"),
    "rederive_eps": ({"rederive_eps": 1}, TypeError, "rederive_eps", "True or False", "1"),
    "prediction": ({"prediction": "mean"}, ValueError, "prediction", "'epsilon'", "'mean'"),
    "impl": ({"impl": "tpu"}, ValueError, "impl", "'auto', ", "'tpu'"),
    "guidance": ({"guidance_scale": INF}, ValueError, "guidance_scale", "finite", "inf"),
}


@pytest.mark.parametrize(
    ("call", "kwargs", "error", "name", "expected", "given"),
    through(UPDATE, sample=sample, Sampler=prepare, step=step),
)
def test_update_arguments(call, kwargs, error, name, expected, given):
    if call is step and "guidance_scale" in kwargs:
        kwargs = {**kwargs, "model_output": torch.zeros(4, 3, 4)}
    fails(call, error, name, expected, given, **kwargs)


def test_too_large_eta_names_the_step():
    for call in (sample, prepare):
        with pytest.raises(ValueError, match=r"^eta: .* got .*eta = 5 at step 0 \(timestep 999\)"):
            call(eta=5.0)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
@pytest.mark.parametrize("call", [sample, prepare, invert], ids=["sample", "Sampler", "invert"])
def test_no_x_0_at_zero_terminal_snr(call, prediction):
    zero = Schedule.linear().zero_terminal_snr()
    with pytest.raises(
        ValueError,
        match=r"^prediction: expected sample or v_prediction .*"
        rf"got '{prediction}' at step \d \(timestep 999\)",
    ):
        call(schedule=zero, spacing="trailing", prediction=prediction)
    wrong = {"alpha_t": 0.0, "prediction": prediction}
    fails(step, ValueError, "prediction", "sample or v_prediction", f"'{prediction}'", **wrong)


CALL = {
    "seed negative": ({"seed": -1}, ValueError, "seed", "[0, 18446744073709551615]", "-1"),
    "seed too large": ({"seed": 2**64}, ValueError, "seed", "18446744073709551615", str(2**64)),
    "seed float": ({"seed": 1.0}, TypeError, "seed", "integer", "1.0"),
    "seed bool": ({"seed": True}, TypeError, "seed", "integer", "True"),
    "seeds too few": ({"seed": [1]}, ValueError, "seed", "one seed per sample, 2", "1"),
    "seeds too many": ({"seed": [1, 2, 3]}, ValueError, "seed", "one seed per sample, 2", "3"),
    "seeds negative": ({"seed": [1, -2]}, ValueError, "seed[1]", "[0, ", "-2"),
    "seeds float": ({"seed": [1, 2.0]}, TypeError, "seed[1]", "integer", "2.0"),
    "seeds int32": (
        {"seed": torch.tensor([1, 2], dtype=torch.int32)},
        TypeError,
        "seed",
        "int64",
        "int32",
    ),
    "seeds matrix": (
        {"seed": torch.ones(2, 1, dtype=torch.int64)},
        ValueError,
        "seed",
        "[B]",
        "(2, 1)",
    ),
    "offset negative": ({"sample_offset": -1}, ValueError, "sample_offset", "[0, ", "-1"),
    "offset float": ({"sample_offset": 1.0}, TypeError, "sample_offset", "integer", "1.0"),
    "offset too large": (
        {"sample_offset": 2**32 - 1},
        ValueError,
        "sample_offset",
        "below 2**32",
        "4294967295 + 2",
    ),
    "offset with seeds": (
        {"seed": [1, 2], "sample_offset": 1},
        ValueError,
        "sample_offset",
        "0 where each",
        "1",
    ),
    "noise type": ({"noise": "randn"}, TypeError, "noise", "torch.Generator", "str"),
    "noise list": ({"noise": [1, 2]}, TypeError, "noise", "torch.Generator", "list"),
    "noise integer": (
        {"noise": torch.zeros(SHAPE, dtype=torch.int64)},
        TypeError,
        "noise",
        "floating",
        "int64",
    ),
    "generators": (
        {"noise": [torch.Generator()]},
        ValueError,
        "noise",
        "one generator per sample, 2",
        "1",
    ),
}


@pytest.mark.parametrize(
    ("call", "kwargs", "error", "name", "expected", "given"),
    through(
        CALL,
        sample=lambda **kwargs: sample(eta=1.0, **kwargs),
        Sampler=lambda **kwargs: call_sampler(eta=1.0, **kwargs),
        step=lambda **kwargs: step(eta=1.0, **kwargs),
    ),
)
def test_noise_arguments(call, kwargs, error, name, expected, given):
    fails(call, error, name, expected, given, **kwargs)


class TestSample:
    @pytest.mark.parametrize(
        ("call", "kwargs", "error", "name", "expected", "given"),
        through(
            numbered(
                (
                    {"noise": torch.zeros(4, *SHAPE)},
                    ValueError,
                    "noise",
                    "(5, 2, 3, 4)",
                    "(4, 2, 3, 4)",
                ),
                ({"noise": torch.zeros(SHAPE)}, ValueError, "noise", "(5, 2, 3, 4)", "(2, 3, 4)"),
                ({"noise": META.expand(5, *SHAPE)}, ValueError, "noise", "cpu", "meta"),
                ({"progress": 1}, TypeError, "progress", "True or False", "1"),
                (
                    {"return_trajectory": None},
                    TypeError,
                    "return_trajectory",
                    "True or False",
                    "None",
                ),
                ({"callback": "print"}, TypeError, "callback", "callable", "str"),
                ({"x_T": [0.0]}, TypeError, "x_T", "tensor", "[0.0]"),
                ({"x_T": X.long()}, TypeError, "x_T", "floating-point", "int64"),
                ({"x_T": X.to(torch.complex64)}, TypeError, "x_T", "floating-point", "complex64"),
                ({"x_T": torch.tensor(0.0)}, ValueError, "x_T", "batch", "without dimensions"),
            ),
            sample=sample,
            Sampler=call_sampler,
        ),
    )
    def test_call(self, call, kwargs, error, name, expected, given):
        fails(call, error, name, expected, given, **kwargs)

    def test_x_T_that_differs_from_what_was_asked_for(self):
        fails(
            sample, ValueError, "x_T", "torch.float16", "torch.float32", x_T=X, dtype=torch.float16
        )
        fails(
            sample,
            ValueError,
            "x_T",
            "torch.float32",
            "torch.float64",
            x_T=X.double(),
            dtype=torch.float32,
        )
        fails(sample, ValueError, "x_T", "meta", "cpu", x_T=X, device="meta")
        fails(sample, ValueError, "x_T", "cpu", "meta", x_T=META, device="cpu")
        fails(sample, ValueError, "x_T", "(2, 3, 5)", "(2, 3, 4)", x_T=X, shape=(2, 3, 5))
        fails(sample, ValueError, "batch_size", "2", "7", x_T=X, batch_size=7)
        sampler = prepare()
        fails(sampler, ValueError, "x_T", "(2, 3, 4)", "(3, 3, 4)", x_T=torch.zeros(3, 3, 4))
        fails(sampler, ValueError, "x_T", "torch.float32", "torch.float64", x_T=X.double())
        fails(sampler, ValueError, "x_T", "cpu", "meta", x_T=META)

    @pytest.mark.parametrize(
        ("call", "kwargs", "error", "name", "expected", "given"),
        through(
            numbered(
                ({"shape": None}, ValueError, "shape", "(B, ...)", "None"),
                ({"shape": 3}, TypeError, "shape", "sequence of integers", "3"),
                ({"shape": ()}, TypeError, "shape", "sequence of integers", "()"),
                ({"shape": (2, -1)}, ValueError, "shape[1]", "[0, ", "-1"),
                ({"shape": (2, 3.0)}, TypeError, "shape[1]", "integer", "3.0"),
                ({"shape": SHAPE, "batch_size": 3}, ValueError, "batch_size", "2", "3"),
                ({"batch_size": 0}, ValueError, "batch_size", "[1, ", "0"),
                ({"batch_size": 2.0}, TypeError, "batch_size", "integer", "2.0"),
            ),
            sample=sample,
            Sampler=prepare,
        ),
    )
    def test_shape(self, call, kwargs, error, name, expected, given):
        fails(call, error, name, expected, given, **kwargs)


class TestInvert:
    @pytest.mark.parametrize(
        ("kwargs", "error", "name", "expected", "given"),
        [
            ({"eta": 0.5}, ValueError, "eta", "0.0 for an invertible", "0.5"),
            ({"eta": torch.ones(2)}, ValueError, "eta", "0.0 for an invertible", "tensor"),
            ({"eta": NAN}, ValueError, "eta", "0.0 for an invertible", "nan"),
            ({"clip": 1.0}, ValueError, "clip", "None for an invertible", "1.0"),
            ({"rederive_eps": True}, ValueError, "rederive_eps", "False for an invertible", "True"),
            (
                {"prediction": "sample"},
                ValueError,
                "prediction",
                "epsilon, v_prediction or score",
                "'sample'",
            ),
            ({"x_0": [0.0]}, TypeError, "x_0", "tensor", "[0.0]"),
            ({"x_0": X.long()}, TypeError, "x_0", "floating-point", "int64"),
            ({"x_0": torch.tensor(0.0)}, ValueError, "x_0", "batch", "without dimensions"),
            ({"dtype": torch.float16}, ValueError, "x_0", "torch.float16", "torch.float32"),
            ({"device": "meta"}, ValueError, "x_0", "meta", "cpu"),
            ({"progress": 1}, TypeError, "progress", "True or False", "1"),
            ({"return_trajectory": None}, TypeError, "return_trajectory", "True or False", "None"),
            ({"callback": "print"}, TypeError, "callback", "callable", "str"),
        ],
    )
    def test_arguments(self, kwargs, error, name, expected, given):
        fails(invert, error, name, expected, given, **kwargs)


class TestStep:
    @pytest.mark.parametrize(
        ("kwargs", "error", "name", "expected", "given"),
        [
            ({"x_t": 0.0}, TypeError, "x_t", "tensor", "0.0"),
            ({"x_t": X.long()}, TypeError, "x_t", "floating-point", "int64"),
            ({"x_t": torch.tensor(0.0)}, ValueError, "x_t", "batch", "without dimensions"),
            ({"model_output": None}, TypeError, "model_output", "tensor", "None"),
            ({"model_output": X.int()}, TypeError, "model_output", "floating-point", "int32"),
            (
                {"model_output": X[:1]},
                ValueError,
                "model_output",
                "(2, 3, 4) or (2, 6, 4)",
                "(1, 3, 4)",
            ),
            (
                {"model_output": X.repeat(2, 1, 1)},
                ValueError,
                "model_output",
                "(2, 3, 4)",
                "(4, 3, 4)",
            ),
            (
                {"model_output": X.repeat(1, 1, 2)},
                ValueError,
                "model_output",
                "(2, 3, 4)",
                "(2, 3, 8)",
            ),
            (
                {"guidance_scale": 2.0},
                ValueError,
                "model_output",
                "(4, 3, 4) or (4, 6, 4)",
                "(2, 3, 4)",
            ),
            ({"model_output": META}, ValueError, "model_output", "cpu", "meta"),
            ({"alpha_t": 1.1}, ValueError, "alpha_t", "[0, 1]", "1.1"),
            ({"alpha_t": -0.1}, ValueError, "alpha_t", "[0, 1]", "-0.1"),
            ({"alpha_t": NAN}, ValueError, "alpha_t", "[0, 1]", "nan"),
            ({"alpha_t": "0.5"}, TypeError, "alpha_t", "number", "'0.5'"),
            ({"alpha_t": True}, TypeError, "alpha_t", "number", "True"),
            ({"alpha_t": torch.full((3,), 0.5)}, ValueError, "alpha_t", "[2]", "(3,)"),
            ({"alpha_t": torch.tensor([0.5, NAN])}, ValueError, "alpha_t[1]", "[0, 1]", "nan"),
            ({"alpha_t": torch.tensor([0.5, 1.5])}, ValueError, "alpha_t[1]", "[0, 1]", "1.5"),
            ({"alpha_prev": 1.1}, ValueError, "alpha_prev", "[0, 1]", "1.1"),
            ({"alpha_prev": NAN}, ValueError, "alpha_prev", "[0, 1]", "nan"),
            (
                {"alpha_prev": torch.tensor([NAN, 0.5])},
                ValueError,
                "alpha_prev[0]",
                "[0, 1]",
                "nan",
            ),
            ({"alpha_t": 1.0, "prediction": "sample"}, ValueError, "alpha_t", "below 1", "1"),
            ({"alpha_t": 1.0, "prediction": "score"}, ValueError, "alpha_t", "below 1", "1"),
            ({"alpha_t": 1.0, "eta": 0.5}, ValueError, "alpha_t", "below 1", "1"),
            ({"alpha_t": 1.0, "rederive_eps": True}, ValueError, "alpha_t", "below 1", "1"),
            (
                {"alpha_prev": 0.4, "eta": 0.5},
                ValueError,
                "eta",
                "0 where alpha_prev < alpha_t",
                "0.5",
            ),
            ({"noise": X[:1], "eta": 0.5}, ValueError, "noise", "(2, 3, 4)", "(1, 3, 4)"),
            ({"noise": META, "eta": 0.5}, ValueError, "noise", "cpu", "meta"),
            ({"out": X[:1]}, ValueError, "out", "(2, 3, 4)", "(1, 3, 4)"),
            ({"out": X.double()}, ValueError, "out", "torch.float32", "torch.float64"),
            ({"out": META}, ValueError, "out", "cpu", "meta"),
            ({"out": []}, TypeError, "out", "tensor", "[]"),
            ({"return_x0": 1}, TypeError, "return_x0", "True or False", "1"),
            ({"eta": 1.0, "step_index": -1}, ValueError, "step_index", "[0, 4294967295]", "-1"),
            (
                {"eta": 1.0, "step_index": 2**32},
                ValueError,
                "step_index",
                "4294967295]",
                "4294967296",
            ),
            ({"eta": 1.0, "step_index": 1.0}, TypeError, "step_index", "integer", "1.0"),
            (
                {"eta": 1.0, "step_index": torch.zeros(3, dtype=torch.int64)},
                ValueError,
                "step_index",
                "[2]",
                "(3,)",
            ),
            (
                {"eta": 1.0, "step_index": torch.tensor([0, -1])},
                ValueError,
                "step_index[1]",
                "[0, ",
                "-1",
            ),
            (
                {"eta": 1.0, "step_index": torch.tensor([2**32, 0])},
                ValueError,
                "step_index[0]",
                "[0, ",
                "4294967296",
            ),
            (
                {"eta": 1.0, "step_index": torch.zeros(2)},
                TypeError,
                "step_index",
                "int64",
                "float32",
            ),
        ],
    )
    def test_arguments(self, kwargs, error, name, expected, given):
        fails(step, error, name, expected, given, **kwargs)

    def test_out_is_left_alone(self):
        out = torch.ones(SHAPE)
        with pytest.raises(ValueError, match=r"^alpha_t: "):
            step(out=out, alpha_t=2.0)
        with pytest.raises(ValueError, match=r"^eta: "):
            step(out=out, eta=9.0)
        assert (out == 1).all()


class TestSlerp:
    @pytest.mark.parametrize(
        ("kwargs", "error", "name", "expected", "given"),
        [
            ({"z_0": 1.0}, TypeError, "z_0", "tensor", "1.0"),
            ({"z_0": X.long(), "z_1": X.long()}, TypeError, "z_0", "floating-point", "int64"),
            ({"z_1": None}, TypeError, "z_1", "tensor", "None"),
            ({"z_1": X[:1]}, ValueError, "z_1", "(2, 3, 4)", "(1, 3, 4)"),
            ({"z_1": X.double()}, ValueError, "z_1", "torch.float32", "torch.float64"),
            ({"z_1": META}, ValueError, "z_1", "cpu", "meta"),
            ({"weight": NAN}, ValueError, "weight", "finite", "nan"),
            ({"weight": [0.5, INF]}, ValueError, "weight", "finite", "inf"),
            ({"weight": [[0.5]]}, ValueError, "weight", "[n]", "(1, 1)"),
            ({"weight": "half"}, TypeError, "weight", "number", "'half'"),
            ({"weight": None}, TypeError, "weight", "number", "None"),
            ({"weight": True}, TypeError, "weight", "real numbers", "bool"),
            ({"weight": 1j}, TypeError, "weight", "real numbers", "complex"),
        ],
    )
    def test_arguments(self, kwargs, error, name, expected, given):
        fails(slerp, error, name, expected, given, **kwargs)


class TestSchedule:
    good = (0.9, 0.5, 0.1)

    @pytest.mark.parametrize(
        ("values", "error", "expected", "given"),
        [
            ([0.9, NAN, 0.1], ValueError, "[0, 1)", "alphas_cumprod[1] = nan"),
            ([NAN], ValueError, "[0, 1)", "alphas_cumprod[0] = nan"),
            ([1.0, 0.5], ValueError, "[0, 1)", "alphas_cumprod[0] = 1.0"),
            ([1.5, 0.5], ValueError, "[0, 1)", "alphas_cumprod[0] = 1.5"),
            ([0.5, -0.1], ValueError, "[0, 1)", "alphas_cumprod[1] = -0.1"),
            ([INF, 0.5], ValueError, "[0, 1)", "alphas_cumprod[0] = inf"),
            ([0.5, 0.9], ValueError, "strictly decreasing", "alphas_cumprod[1] = 0.9 after 0.5"),
            (
                [0.9, 0.5, 0.5],
                ValueError,
                "strictly decreasing",
                "alphas_cumprod[2] = 0.5 after 0.5",
            ),
            (
                [0.5, 0.0, 0.0],
                ValueError,
                "strictly decreasing",
                "alphas_cumprod[2] = 0.0 after 0.0",
            ),
            ([], ValueError, "[T]", "(0,)"),
            (0.5, ValueError, "[T]", "()"),
            ([[0.5, 0.4]], ValueError, "[T]", "(1, 2)"),
            ("half", TypeError, "numbers", "'half'"),
            ([0.9, [0.5]], TypeError, "numbers", "[0.9, [0.5]]"),
        ],
    )
    def test_alphas_cumprod(self, values, error, expected, given):
        fails(
            Schedule.from_alphas_cumprod,
            error,
            "alphas_cumprod",
            expected,
            given,
            alphas_cumprod=values,
        )

    @pytest.mark.parametrize(
        ("values", "error", "expected", "given"),
        [
            ([0.1, NAN], ValueError, "(0, 1]", "betas[1] = nan"),
            ([0.0, 0.1], ValueError, "(0, 1]", "betas[0] = 0.0"),
            ([0.1, -0.1], ValueError, "(0, 1]", "betas[1] = -0.1"),
            ([0.1, 1.1], ValueError, "(0, 1]", "betas[1] = 1.1"),
            ([], ValueError, "[T]", "(0,)"),
            (torch.ones(2, 2), ValueError, "[T]", "(2, 2)"),
            (["a"], TypeError, "numbers", "['a']"),
        ],
    )
    def test_betas(self, values, error, expected, given):
        fails(Schedule.from_betas, error, "betas", expected, given, betas=values)

    def test_a_beta_of_1_that_is_not_the_last(self):
        fails(
            Schedule.from_betas,
            ValueError,
            "alphas_cumprod",
            "strictly decreasing",
            "alphas_cumprod[2] = 0.0 after 0.0",
            betas=[0.5, 1.0, 0.5],
        )

    @pytest.mark.parametrize(
        "build", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine, Schedule.sigmoid]
    )
    def test_length(self, build):
        fails(build, ValueError, "T", "[1, ", "0", T=0)
        fails(build, ValueError, "T", "[1, ", "-5", T=-5)
        fails(build, TypeError, "T", "integer", "10.0", T=10.0)
        fails(build, TypeError, "T", "integer", "True", T=True)

    @pytest.mark.parametrize("build", [Schedule.linear, Schedule.scaled_linear])
    @pytest.mark.parametrize("name", ["beta_start", "beta_end"])
    @pytest.mark.parametrize("value", [0.0, -1e-4, 1.5, NAN])
    def test_beta_range(self, build, name, value):
        fails(build, ValueError, name, "(0, 1]", str(value), **{name: value})
        fails(build, TypeError, name, "number", "'a'", **{name: "a"})

    @pytest.mark.parametrize("value", [0.0, -1.0, 1.5, NAN])
    def test_max_beta(self, value):
        for build in (Schedule.cosine, Schedule.sigmoid):
            fails(build, ValueError, "max_beta", "(0, 1]", str(value), max_beta=value)

    def test_curve_parameters(self):
        fails(Schedule.cosine, ValueError, "s", ">= 0", "-0.1", s=-0.1)
        fails(Schedule.cosine, ValueError, "s", "finite", "nan", s=NAN)
        fails(Schedule.sigmoid, ValueError, "tau", "> 0", "0.0", tau=0.0)
        fails(Schedule.sigmoid, ValueError, "start", "finite", "nan", start=NAN)
        fails(Schedule.sigmoid, ValueError, "end", "> 3", "-3.0", start=3.0, end=-3.0)

    def test_zero_terminal_snr_of_one_step(self):
        fails(
            Schedule.linear(1).zero_terminal_snr, ValueError, "zero_terminal_snr", "T >= 2", "T = 1"
        )

    def test_from_diffusers(self):
        fails(
            Schedule.from_diffusers,
            TypeError,
            "scheduler",
            "diffusers scheduler",
            "str",
            scheduler="ddim",
        )
        no_tensor = types.SimpleNamespace(alphas_cumprod=[0.5])
        fails(
            Schedule.from_diffusers,
            TypeError,
            "scheduler",
            "alphas_cumprod",
            "SimpleNamespace",
            scheduler=no_tensor,
        )
        fails(
            Schedule.from_diffusers,
            ValueError,
            "beta_schedule",
            "linear, scaled_linear, squaredcos_cap_v2 or sigmoid",
            "'laplace'",
            scheduler={"beta_schedule": "laplace"},
        )
        broken = types.SimpleNamespace(alphas_cumprod=torch.tensor([0.9, NAN]))
        fails(
            Schedule.from_diffusers, ValueError, "alphas_cumprod", "[0, 1)", "nan", scheduler=broken
        )

    @pytest.mark.parametrize(
        ("kwargs", "error", "name", "expected", "given"),
        [
            ({"x_0": 0.5}, TypeError, "x_0", "tensor", "0.5"),
            ({"x_0": X.long()}, TypeError, "x_0", "floating-point", "int64"),
            ({"t": 1000}, ValueError, "t", "[0, 999]", "1000"),
            ({"t": -1}, ValueError, "t", "[0, 999]", "-1"),
            ({"t": 3.0}, TypeError, "t", "integer", "3.0"),
            ({"t": torch.tensor([3.0, 4.0])}, TypeError, "t", "integers", "float32"),
            ({"t": torch.tensor([3, 1000])}, ValueError, "t", "[0, 999]", "1000"),
            ({"t": torch.tensor([3, 4, 5])}, ValueError, "t", "[2]", "(3,)"),
            ({"t": torch.tensor([[3, 4]])}, ValueError, "t", "[2]", "(1, 2)"),
            ({"noise": X[:1]}, ValueError, "noise", "(2, 3, 4)", "(1, 3, 4)"),
            ({"noise": META}, ValueError, "noise", "cpu", "meta"),
            ({"noise": "randn"}, TypeError, "noise", "tensor", "'randn'"),
            ({"noise": None, "seed": -1}, ValueError, "seed", "[0, ", "-1"),
        ],
    )
    def test_add_noise(self, kwargs, error, name, expected, given):
        fails(add_noise, error, name, expected, given, **kwargs)

    def test_select_timesteps(self):
        for T, error in ((0, ValueError), (-1, ValueError), (10.0, TypeError)):
            with pytest.raises(error, match=r"^T: expected an integer.*got"):
                select_timesteps(T, 1)


@pytest.mark.parametrize("impl", CPU_IMPLS)
class TestModel:
    def run(self, model, call, **kwargs):
        if call == "sample":
            return fastddim.sample(model, 3, shape=SHAPE, **kwargs)
        return fastddim.invert(model, X, 3, **kwargs)

    @pytest.mark.parametrize("call", ["sample", "invert"])
    @pytest.mark.parametrize(
        ("result", "error", "expected", "given"),
        [
            (lambda x: x[:1], ValueError, "(2, 3, 4) or (2, 6, 4)", "(1, 3, 4)"),
            (lambda x: x[..., :1], ValueError, "(2, 3, 4) or (2, 6, 4)", "(2, 3, 1)"),
            (lambda x: x.repeat(1, 3, 1), ValueError, "(2, 3, 4) or (2, 6, 4)", "(2, 9, 4)"),
            (lambda x: x.repeat(2, 1, 1), ValueError, "(2, 3, 4) or (2, 6, 4)", "(4, 3, 4)"),
            (lambda x: x.unsqueeze(0), ValueError, "(2, 3, 4) or (2, 6, 4)", "(1, 2, 3, 4)"),
            (lambda x: x.flatten(), ValueError, "(2, 3, 4) or (2, 6, 4)", "(24,)"),
            (lambda x: x.long(), TypeError, "floating-point", "int64"),
            (lambda x: x.to(torch.complex64), TypeError, "floating-point", "complex64"),
            (lambda x: x.to("meta"), ValueError, "cpu", "meta"),
            (lambda x: (x[:1], x), ValueError, "(2, 3, 4) or (2, 6, 4)", "(1, 3, 4)"),
        ],
    )
    def test_output(self, impl, call, result, error, expected, given):
        with pytest.raises(error) as caught:
            self.run(lambda x, t: result(x), call, impl=impl)
        message = str(caught.value)
        assert message.startswith("model output: expected ")
        assert expected in message
        assert given in message.rpartition("got ")[2]

    @pytest.mark.parametrize("call", ["sample", "invert"])
    @pytest.mark.parametrize(
        "result", [None, 3, "x", (), (None,), [], types.SimpleNamespace(sample=3), np.zeros(SHAPE)]
    )
    def test_no_tensor(self, impl, call, result):
        with pytest.raises(TypeError, match=r"^model( output)?: expected .*tensor.* got"):
            self.run(lambda x, t: result, call, impl=impl)

    def test_guided_output(self, impl):
        with pytest.raises(
            ValueError,
            match=r"^model output: expected shape \(4, 3, 4\) or .* guidance, got \(2, 3, 4\)",
        ):
            self.run(lambda x, t: x[:2], "sample", guidance_scale=2.0, impl=impl)

    @pytest.mark.parametrize("call", ["sample", "invert"])
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_check_finite(self, impl, call, value):
        def model(x, t):
            result = elementwise_model(x, t)
            result[1, 2, 3] = torch.where(t[0] == 666, value, result[1, 2, 3])
            return result

        assert not self.run(model, call, impl=impl).isfinite().all()
        with pytest.raises(
            ValueError,
            match=r"^model output: expected finite values, got NaN or infinity "
            r"at step 1 \(timestep 666\)$",
        ):
            self.run(model, call, check_finite=True, impl=impl)
        assert self.run(elementwise_model, call, check_finite=True, impl=impl).isfinite().all()

    def test_a_sampler_survives(self, impl):
        bad = []

        def model(x, t):
            return x[:1] if bad and t[0] == 666 else elementwise_model(x, t)

        sampler = Sampler(model, 3, shape=SHAPE, eta=1.0, impl=impl)
        expected = sampler(seed=3)
        bad.append(True)
        with pytest.raises(ValueError, match=r"^model output: "):
            sampler(seed=1)
        bad.clear()
        assert torch.equal(sampler(seed=3), expected)


class TestPhilox:
    def test_arguments(self):
        for call in (
            philox.initial_latents,
            lambda *a, **k: philox.step_noise(a[0], 0, *a[1:], **k),
        ):
            fails(lambda c=call: c((2, 3), -1), ValueError, "seed", "[0, ", "-1")
            fails(lambda c=call: c((2, 3), [1]), ValueError, "seed", "one seed per sample, 2", "1")
            fails(
                lambda c=call: c((2, 3), [1, 2], sample_offset=1),
                ValueError,
                "sample_offset",
                "0 where",
                "1",
            )
            fails(
                lambda c=call: c((2, 3), sample_offset=2**32 - 1),
                ValueError,
                "sample_offset",
                "below 2**32",
                "4294967295 + 2",
            )
        fails(
            lambda: philox.step_noise((2, 3), 2**32), ValueError, "step_index", "[0, ", "4294967296"
        )


def test_overlapping_out_is_refused():
    """Overlapping `out` is refused: written memory is exactly the state's (or the model output's),
    or apart from it.
    """
    buffer = torch.randn(3, 8)
    x, m = buffer[0:2], torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"^out: expected x_t itself .* overlaps it in part"):
        fastddim.step(x, m, 0.5, 0.7, out=buffer[1:3])
    with pytest.raises(ValueError, match=r"^out: expected model_output itself"):
        fastddim.step(m.clone(), x, 0.5, 0.7, out=buffer[1:3])
    square = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"^out: .*overlaps"):
        fastddim.step(square, torch.randn(4, 4), 0.5, 0.7, out=square.T)
    expected = fastddim.step(x, m, 0.5, 0.7)
    assert torch.equal(fastddim.step(x, m.clone(), 0.5, 0.7, out=x[:]), expected)


def test_coefficients_beyond_the_dtype_are_refused():
    schedule = fastddim.Schedule.linear(20000)
    with pytest.raises(ValueError, match=r"^alphas_cumprod: .*float32, got cx = .*float64"):
        fastddim.sample(lambda x, t: x, 5, shape=(1, 2), schedule=schedule, spacing="trailing")
    x = fastddim.sample(
        lambda x, t: x * 0,
        5,
        shape=(1, 2),
        schedule=schedule,
        spacing="trailing",
        dtype=torch.float64,
    )
    assert x.isfinite().all()


def test_a_sampler_serves_one_call_at_a_time():
    sampler = fastddim.Sampler(lambda x, t: x, 3, shape=(1, 2))
    expected = sampler(seed=1)
    with pytest.raises(RuntimeError, match=r"^Sampler: expected one call at a time"):
        sampler(callback=lambda *_: sampler())
    assert torch.equal(sampler(seed=1), expected)
