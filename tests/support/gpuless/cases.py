"""Updates that together take every path of a GPU kernel, and the meaning of "the same bits"."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends, philox
from fastddim.plan import PREDICTIONS

from ..updates import (
    ALIGNED,
    DTYPES,
    LAYOUTS,
    Case,
    Result,
    make_case,
    poisoned_like,
    run,
    written_only_inside,
)

Arguments = tuple[tuple[int, ...], dict[str, Any]]

# Many samples a block, several tiles a sample, tails of every length.
SHAPES = (
    (1, 1),
    (1, 3),
    (5, 4),
    (2, 7),
    (300, 8),
    (3, 112),
    (2, 1021),
    (1, 1024),
    (2, 3, 700),
    (1, 2053),
)


LONG = {
    f"{dtype}-{shape}-{layout}": (shape, {"dtype": dtype, "noise": "keyed", "layout": layout})
    for dtype in (torch.bfloat16, torch.float16)
    for shape, layout in (
        ((1, 2**21), "contiguous"),
        ((3, 2**20), "contiguous"),
        ((3, 2**20 + 8), "contiguous"),
        ((3, 2**20 + 1), "contiguous"),
        ((3, 2**20), "offset"),
    )
}
"""Updates that are large enough for long chunks, and fit them or not."""


def update_arguments() -> Iterator[tuple[str, Arguments]]:
    """(name, arguments of `make_case`), in a fixed order."""
    for shape, noise in itertools.product(SHAPES, ("none", "given", "keyed")):
        yield f"{shape}-{noise}", (shape, {"noise": noise})
    for dtype, noise in itertools.product(DTYPES, ("none", "given", "keyed")):
        for shape in ((3, 4, 16), (2, 3, 5, 7)):
            kind = {"dtype": dtype, "noise": noise, "guided": noise == "keyed"}
            yield f"{dtype}-{shape}-{noise}", (shape, {**kind, "per_sample": True})
    for dtype, model_dtype in itertools.product(DTYPES, DTYPES):
        kind = {"dtype": dtype, "model_dtype": model_dtype, "model_input": model_dtype}
        for noise, guided in itertools.product(("none", "keyed"), (False, True)):
            name = f"{dtype}-{model_dtype}-{noise}-{guided}"
            yield name, ((2, 3, 8), {**kind, "noise": noise, "guided": guided})
    for layout, noise in itertools.product(
        ("channels_last", "permuted", "sliced", "offset", "expanded"), ("none", "given", "keyed")
    ):
        kind = {"layout": layout, "noise": noise, "guided": True, "model_input": torch.float16}
        yield f"{layout}-{noise}", ((2, 3, 5, 8), kind)
    for prediction, clip, rederive_eps in itertools.product(
        PREDICTIONS, (None, 0.7), (False, True)
    ):
        kind = {"prediction": prediction, "clip": clip, "rederive_eps": rederive_eps}
        for learned in (False, True):
            yield (
                f"{prediction}-{clip}-{rederive_eps}-{learned}",
                ((3, 3, 20), {**kind, "learned_variance": learned, "per_sample": True}),
            )
    for dtype in DTYPES:
        extras = {"history": True, "mask": True, "guided": True, "learned_variance": True}
        for noise in ("given", "keyed"):
            kind = {"dtype": dtype, "noise": noise, "model_input": dtype, "clip": 1.0, **extras}
            yield f"everything-{dtype}-{noise}", ((3, 2, 24), {**kind, "per_sample": True})
        kind = {"dtype": dtype, "epsilon": True, "rederive_eps": True, "clip": 0.5}
        yield f"epsilon-{dtype}", ((2, 3, 8), {**kind, "prediction": "v_prediction"})
    for channels, dtype in itertools.product(
        (3, 4), (torch.float32, torch.float16, torch.bfloat16)
    ):
        for i, noise in enumerate(("none", "given", "keyed")):
            kind = {"dtype": dtype, "layout": "channels_last", "per_sample": True, "clip": 0.9}
            kind |= {
                "frame": ALIGNED,
                "noise": noise,
                "guided": i == channels - 2,
                "history": i > 0,
                "mask": i < 2,
            }
            kind |= {"learned_variance": i == 1, "model_input": (dtype, torch.float16)[i % 2]}
            yield f"pixels-{channels}-{dtype}-{noise}", ((3, channels, 4, 6), kind)
            # One of the state and the model output in planes; runs of pixels that threads share.
            layouts = ("contiguous", "channels_last")[:: 1 if channels == 3 else -1]
            kind |= {
                "layout": layouts[0],
                "model_layout": layouts[1],
                "model_dtype": torch.bfloat16,
            }
            yield f"turned-{channels}-{dtype}-{noise}", ((1, channels, 36, 32), kind)
    yield "no-samples", ((0, 3, 4), {"noise": "keyed"})
    yield "no-elements", ((2, 0, 4), {"noise": "none"})
    yield "six-dimensions", ((2, 3, 1, 4, 3, 2), {"layout": "sliced", "noise": "keyed"})


UPDATES = dict(update_arguments())

# Every update once, half of them in place; with `--deep` both ways.
EACH_WAY = [
    pytest.param(name, in_place, marks=[] if in_place == bool(i % 2) else pytest.mark.deep)
    for i, name in enumerate(UPDATES)
    for in_place in (False, True)
]


def update_case(name: str) -> Case:
    shape, arguments = UPDATES[name] if name in UPDATES else LONG[name]
    return make_case(torch.Generator().manual_seed(20), shape, **arguments)


def assert_bare_bits_of_cpu(update_out: Any, case: Case, *, alone: bool = False) -> None:
    """Asserts the bits of an update that writes only x_prev."""
    cpu = backends.BACKENDS["cpu"].update_out
    for a, b in zip(run_bare(update_out, case, alone=alone), run_bare(cpu, case), strict=True):
        assert same_bits(a, b), f"differs in {int((a != b).sum())} of {a.numel()}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True for values that are equal bit for bit, except for the payload of a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    words, others = (v.nan_to_num(nan=0.0).contiguous().view(integer) for v in (a, b))
    return torch.equal(words, others)


def run_bare(update_out: Any, case: Case, *, alone: bool = False) -> list[Tensor]:
    """out and the model input, in poisoned memory and without x_0, which kernels then leave out.

    Args:
        alone: whether a row that all samples share is given without an index.
    """
    out = torch.full_like(case.x, float("nan"))
    model_input = None
    if case.model_input is not None:
        copies = 2 if case.model_output.shape[0] != case.x.shape[0] else 1
        shape = (copies * case.x.shape[0], *case.x.shape[1:])
        model_input = torch.full(shape, float("nan"), dtype=case.model_input)
    update_out(
        case.x,
        case.model_output,
        *(case.alone if alone else (case.table, case.row)),
        noise=case.noise,
        keys=case.keys,
        history=case.history,
        mask=case.mask,
        known=case.known,
        out=out,
        x_0=None,
        model_input=model_input,
    )
    return [out] if model_input is None else [out, model_input]


def assert_bits_of_cpu(update_out: Any, case: Case, *, in_place: bool = False) -> Result:
    """Asserts that `update_out` gives the bits of the C++ kernel on the CPU in every output, with
    x_0 and without it; the latter without indices of rows if the samples share one.
    """
    cpu = backends.BACKENDS["cpu"].update_out
    got = run(update_out, case, in_place=in_place)
    pairs = list(zip(got.tensors(), run(cpu, case).tensors(), strict=True))
    pairs += zip(run_bare(update_out, case, alone=True), run_bare(cpu, case), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert same_bits(a, b), f"output {i} differs in {int((a != b).sum())} of {a.numel()}"
    return got


def assert_normals(normal_out: Any, dtype: torch.dtype) -> None:
    """Asserts the specified normals in every layout, and nothing outside of the view."""
    for layout in LAYOUTS[:-1]:
        generator = torch.Generator().manual_seed(1)
        case = make_case(generator, (3, 5, 7, 3), dtype=dtype, layout=layout, noise="keyed")
        assert case.keys is not None
        out, buffer = poisoned_like(case.x)
        normal_out(case.keys, philox.LATENTS, out)
        expected = philox.normal(case.keys, case.x.shape[1:], philox.LATENTS).to(dtype)
        assert torch.equal(out, expected)
        assert written_only_inside(out, buffer)


def assert_advance(advance: Any, count: int) -> None:
    """Asserts that counters go up by one, and the timesteps that the first `count` of them then
    point to.
    """
    timesteps = torch.randint(0, 1000, (9,))
    counters = torch.randint(0, 8, (count + 3,))
    before, t = counters.clone(), torch.zeros(count, dtype=torch.int64)
    advance(counters, timesteps, t)
    assert torch.equal(counters, before + 1)
    assert torch.equal(t, timesteps[counters[:count]])


def recorded_digits() -> tuple[list[Tensor], Tensor]:
    """(outputs of the model of digits in each step on the CPU, the resulting images)."""
    digits = fastddim.models.load("digits")
    outputs: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(digits(x, t))
        return outputs[-1]

    images = fastddim.sample(model, 50, **DIGITS, schedule=digits.schedule)
    assert isinstance(images, Tensor)
    return outputs, images


DIGITS: dict[str, Any] = {"shape": (3, 1, 8, 8), "eta": 1.0, "seed": 7}
