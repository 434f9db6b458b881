"""Zeros, infinities and NaN in every backend."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastddim import backends, philox
from fastddim.plan import Row

from .updates import DTYPES, LAYOUTS, make_case, run


def noise_has_the_specified_bits(backend: backends.Backend, generator: torch.Generator) -> None:
    """Asserts that x = m = 0 and a noise coefficient of 1 leave z itself, in any layout."""
    for layout in LAYOUTS[:-1]:
        case = make_case(generator, (3, 5, 7, 9), layout=layout, noise="keyed")
        rows = torch.zeros_like(case.rows)
        rows[:, Row._fields.index("pn")] = 1
        zero = torch.zeros_like(case.x)
        silent = replace(case, x=zero, model_output=zero, rows=rows)
        expected = philox.normal(case.keys, case.x.shape[1:], philox.STEP_NOISE)
        assert torch.equal(run(backend.update_out, silent).out, expected)


def no_noise_is_read_where_its_coefficient_is_zero(
    backend: backends.Backend, generator: torch.Generator
) -> None:
    case = make_case(generator, (2, 50), noise="given")
    quiet = case.rows.clone()
    quiet[:, Row._fields.index("pn")] = 0
    nan = torch.full_like(case.x, float("nan"))
    assert run(backend.update_out, replace(case, rows=quiet, noise=nan)).out.isfinite().all()
    assert run(backend.update_out, replace(case, noise=nan)).out.isnan().all()


def nan_passes_through_the_clip(backend: backends.Backend, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        case = make_case(generator, (1, 70), dtype=dtype, clip=1.0, rederive_eps=True)
        case.model_output[0, ::3] = float("nan")
        got = run(backend.update_out, case)
        for result in (got.out, got.x_0):
            assert result[0, ::3].isnan().all()
            assert result[0, 1::3].isfinite().all()


def clip_holds_infinity(backend: backends.Backend, generator: torch.Generator) -> None:
    case = make_case(generator, (1, 40), clip=0.5)
    case.model_output[0, 0], case.model_output[0, 1] = float("inf"), float("-inf")
    assert run(backend.update_out, case).x_0[0, :2].tolist() == [-0.5, 0.5]


FACTS = (
    noise_has_the_specified_bits,
    no_noise_is_read_where_its_coefficient_is_zero,
    nan_passes_through_the_clip,
    clip_holds_infinity,
)
"""Each fails where `backend` does not do what the name says."""
