"""Rows fitted to their data, and gradients: calls that together take every path of the kernels for
GPUs, compared with the C++ kernels bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim import backends
from fastddim.plan import Rescaling

from ..updates import DTYPES, LAYOUTS, Case, make_case, poisoned_like, written_only_inside
from .cases import same_bits

FITS = {
    "rescale": Rescaling(0.7, 0.0, math.inf),
    "threshold": Rescaling(0.0, 0.9, math.inf),
    "limited": Rescaling(0.0, 0.995, 1.5),
    "largest": Rescaling(0.0, 1.0, math.inf),
    "both": Rescaling(0.35, 0.75, 8.0),
}


class Fit(NamedTuple):
    shape: tuple[int, ...]
    arguments: dict[str, Any]
    kind: str
    edit: Callable[[Case], None] | None = None


def fit_arguments() -> Iterator[tuple[str, Fit]]:
    guided = {"guided": True}
    for size, kind in zip(
        (1, 2, 3, 7, 8, 255, 256, 257, 511, 513, 1023, 1025, 2049, 3333),
        itertools.cycle(("both", "rescale", "threshold", "largest")),
        strict=False,
    ):
        yield f"{size}-{kind}", Fit((2, size), guided, kind)
    for size in (1800, 5001):
        yield f"{size}-both", Fit((3, size), {"per_sample": True, **guided}, "both")
    for (dtype, layout), kind in zip(
        itertools.product(DTYPES, LAYOUTS), itertools.cycle(FITS), strict=False
    ):
        arguments = {"dtype": dtype, "layout": layout, "per_sample": layout != "contiguous"}
        learned = {"learned_variance": kind == "both"}
        yield f"{dtype}-{layout}-{kind}", Fit((3, 4, 5, 7), arguments | guided | learned, kind)
    for dtype, model_dtype in itertools.product(DTYPES, DTYPES):
        if dtype != model_dtype:
            arguments = {"dtype": dtype, "model_dtype": model_dtype, **guided}
            yield f"{dtype}-{model_dtype}", Fit((2, 3, 111), arguments, "both")
    yield "not-guided", Fit((2, 3, 300), {"learned_variance": True}, "threshold")
    yield "not-guided-sliced", Fit((2, 3, 5, 9), {"layout": "sliced"}, "limited")
    for dtype in (torch.float32, torch.float64):
        sliced = {"dtype": dtype, "layout": "sliced", "per_sample": True}
        yield f"{dtype}-sliced-dimensions", Fit((3, 3, 1, 4, 3, 2), sliced | guided, "both")
        yield f"{dtype}-sliced-not-guided", Fit((3, 2, 31, 5), sliced, "threshold")
    sliced = {"dtype": torch.float64, "layout": "sliced"}
    yield "torch.float64-sliced-infinite", Fit((3, 700), sliced | guided, "threshold", _infinite)
    yield "no-samples", Fit((0, 4), guided, "both")
    yield "no-elements", Fit((3, 0), guided, "both")
    for name, edit in EDITS.items():
        for dtype, kind in ((torch.float32, "both"), (torch.float64, "threshold")):
            yield f"{name}-{dtype}", Fit((3, 700), {"dtype": dtype, **guided}, kind, edit)


def _nan(case: Case) -> None:
    case.model_output[1, 500] = math.nan


def _infinite(case: Case) -> None:
    case.x[0, ::200] = math.inf
    case.model_output[1, 9] = -math.inf


def _mostly_infinite(case: Case) -> None:
    case.x[:, 100:] = math.inf


def _few_values(case: Case) -> None:
    case.x.copy_(case.x.round())
    case.model_output.copy_(case.model_output.sign() * 1.5)


def _constant(case: Case) -> None:
    case.x.zero_()
    case.model_output.fill_(0.1)
    case.model_output[3] = torch.arange(700.0)


def _tiny(case: Case) -> None:
    case.x.mul_(1e-41)
    case.model_output.mul_(1e-41)


def _far_from_zero(case: Case) -> None:
    case.model_output.add_(1e4)


EDITS = {
    "nan": _nan,
    "infinite": _infinite,
    "mostly-infinite": _mostly_infinite,
    "few-values": _few_values,
    "constant": _constant,
    "tiny": _tiny,
    "far-from-zero": _far_from_zero,
}

FIT_CASES = dict(fit_arguments())


def fit_case(name: str) -> tuple[Case, Rescaling]:
    shape, arguments, kind, edit = FIT_CASES[name]
    case = make_case(torch.Generator().manual_seed(40), shape, **arguments)
    if edit is not None:
        edit(case)
    return case, FITS[kind]


def fitted(
    rescale_rows: Any, case: Case, rescaling: Rescaling, table: Tensor, row: Tensor | None
) -> Tensor:
    """The rows, written into poisoned memory and nowhere else."""
    frame = torch.full((len(case.x) + 2, table.shape[1]), 7.0, dtype=table.dtype)
    out = frame[1:-1].fill_(math.nan)
    rescale_rows(case.x, case.model_output, table, row, rescaling, out)
    assert (frame[[0, -1]] == 7.0).all(), "written outside of the rows"
    return out


def assert_fit_of_cpu(rescale_rows: Any, case: Case, rescaling: Rescaling) -> None:
    """Asserts that `rescale_rows` gives the bits of the CPU; it gets no index if the samples share
    a row.
    """
    cpu = backends.BACKENDS["cpu"].rescale_rows
    expected = fitted(cpu, case, rescaling, case.table, case.row)
    got = fitted(rescale_rows, case, rescaling, *case.alone)
    assert same_bits(got, expected), f"{got}\n{expected}"


class Backward(NamedTuple):
    shape: tuple[int, ...]
    arguments: dict[str, Any]
    grads: str
    """The gradients that are given: of x_prev, of x_0, or both."""


def backward_arguments() -> Iterator[tuple[str, Backward]]:
    grads = itertools.cycle(("x_prev", "both", "x_0"))
    for shape in ((1, 1), (2, 7), (300, 8), (3, 112), (2, 1021), (1, 2053)):
        yield f"{shape}", Backward(shape, {"clip": 0.8, "per_sample": True}, next(grads))
    for dtype, guided in itertools.product(DTYPES, (False, True)):
        kind = {"dtype": dtype, "guided": guided, "clip": 0.9, "per_sample": True}
        for mask in (False, True):
            for learned in (False, True):
                name = f"{dtype}-{guided}-{mask}-{learned}"
                arguments = kind | {"mask": mask, "learned_variance": learned}
                yield name, Backward((3, 4, 27), arguments, next(grads))
    for dtype, model_dtype in itertools.product(DTYPES, DTYPES):
        kind = {"dtype": dtype, "model_dtype": model_dtype, "guided": True, "mask": True}
        yield f"{dtype}-{model_dtype}", Backward((2, 3, 8), kind, next(grads))
        sliced = kind | {"layout": "sliced", "per_sample": True, "clip": 0.7}
        yield f"sliced-{dtype}-{model_dtype}", Backward((3, 2, 3, 5), sliced, "both")
    # A tail of every length.
    for dtype, sizes in ((torch.float32, range(5, 8)), (torch.bfloat16, range(9, 16))):
        kind = {"dtype": dtype, "guided": True, "mask": True, "per_sample": True, "clip": 0.7}
        for size in sizes:
            yield f"tail-{dtype}-{size}", Backward((3, size), kind, "both")
    for layout, guided in itertools.product(LAYOUTS[1:], (False, True)):
        kind = {"layout": layout, "guided": guided, "mask": True, "clip": 0.5}
        yield f"{layout}-{guided}", Backward((2, 3, 5, 8), kind, "both")
    yield "mixed-layouts", Backward((2, 3, 5, 8), {"model_layout": "permuted"}, "both")
    yield "no-samples", Backward((0, 3, 4), {}, "both")
    yield "no-elements", Backward((2, 0, 4), {}, "both")
    yield "six-dimensions", Backward((2, 3, 1, 4, 3, 2), {"layout": "sliced"}, "both")


BACKWARD_CASES = dict(backward_arguments())


def backward_case(name: str) -> tuple[Case, Tensor | None, Tensor | None]:
    """An update, and the gradients of x_prev and x_0, with a few values that are not numbers."""
    shape, arguments, grads = BACKWARD_CASES[name]
    generator = torch.Generator().manual_seed(41)
    case = make_case(generator, shape, **arguments)
    given: list[Tensor | None] = []
    for of in ("x_prev", "x_0"):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.x.dtype)
        if values.numel() > 60:
            values.view(-1)[[3, 11, 17]] = torch.tensor(
                [math.nan, math.inf, -0.0], dtype=values.dtype
            )
        given.append(values if grads in (of, "both") else None)
    if case.x.numel() > 60:
        case.x[-1].reshape(-1)[0] = math.nan
    return case, given[0], given[1]


def gradients(
    backward_out: Any,
    case: Case,
    rows: tuple[Tensor, Tensor | None],
    grad_out: Tensor | None,
    grad_x_0: Tensor | None,
) -> list[Tensor]:
    """The gradients, written into poisoned memory and nowhere else: into views that are not aligned
    to words, and into tensors that are.
    """
    outputs = (case.x, case.model_output)
    framed = [poisoned_like(torch.empty_like(of)) for of in outputs]
    grads = [view for view, _ in framed]
    aligned = [torch.full_like(of, math.nan) for of in outputs]
    given = (grad_out, grad_x_0, case.x, case.model_output, *rows, case.mask)
    backward_out(*given, *grads)
    backward_out(*given, *aligned)
    assert all(written_only_inside(*pair) for pair in framed), "written outside of the gradients"
    return [*grads, *aligned]


def assert_backward_of_cpu(
    backward_out: Any, case: Case, grad_out: Tensor | None, grad_x_0: Tensor | None
) -> None:
    """Asserts that `backward_out` gives the bits of the CPU; it gets no index if the samples share
    a row.
    """
    cpu, indexed = torch.ops.fastddim.backward_out, (case.table, case.row)
    expected = gradients(cpu, case, indexed, grad_out, grad_x_0)
    got = gradients(backward_out, case, case.alone, grad_out, grad_x_0)
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, b), f"differs in {int((a != b).sum())} of {a.numel()}"
