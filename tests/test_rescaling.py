"""Rows fitted to their data, guidance rescale and dynamic thresholding, against NumPy."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import backends, ops, reference
from fastddim.plan import Rescaling, Row, Update, coefficient_row, stack_row

from .support.gpuless.cases import same_bits
from .support.gpuless.fits import FIT_CASES, FITS, fit_case
from .support.specified_rows import specified_rows
from .support.updates import DTYPES, INSTRUCTION_SETS, LAYOUTS, Case, backend, make_case

__all__ = ["backend"]


def rescaled(backend: Any, case: Case, rescaling: Rescaling) -> Tensor:
    batch, fields = case.x.shape[0], len(Row._fields)
    frame = torch.full((batch + 2, fields), 7.0, dtype=case.table.dtype)
    out = frame[1:-1].fill_(math.nan)
    backend.rescale_rows(case.x, case.model_output, case.table, case.row, rescaling, out)
    assert (frame[[0, -1]] == 7.0).all(), "written outside of the rows"
    return out


def expected(case: Case, rescaling: Rescaling) -> np.ndarray:
    """The rescaling of the papers, sample by sample: factors in, rows out."""
    rows = []
    table, index = case.table.double().numpy(), case.row.numpy()
    channels = case.x.shape[1] if case.x.ndim > 1 else None
    m_all = case.model_output.double().numpy()
    for b in range(len(case.x)):
        row = Row(*table[index[b if len(index) > 1 else 0]])
        halves = [part[b][:channels] for part in np.split(m_all, len(m_all) // len(case.x))]
        m = halves[0] if len(halves) == 1 else halves[0] + row.g * (halves[1] - halves[0])
        if rescaling.rescale > 0:
            factor = (
                rescaling.rescale * halves[1].std(ddof=1) / m.std(ddof=1) + 1 - rescaling.rescale
            )
            m = m * factor
            row = row._replace(cm=row.cm * factor, km=row.km * factor, em=row.em * factor)
        if rescaling.ratio > 0:
            x_0 = (
                row.cx * case.x[b].double().numpy()
                + row.cm / (factor if rescaling.rescale else 1) * m
            )
            s = min(max(np.quantile(abs(x_0), rescaling.ratio), 1.0), rescaling.limit)
            row = row._replace(cx=row.cx / s, cm=row.cm / s, r=1.0)
        rows.append(row)
    return np.array(rows)


def check(backend: Any, case: Case, rescaling: Rescaling) -> None:
    got, truth = rescaled(backend, case, rescaling), expected(case, rescaling)
    tolerance = 1e-13 if case.x.dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(got.double().numpy(), truth, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts(backend: backends.Backend, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    for layout, learned in itertools.product(LAYOUTS, (False, True)):
        case = make_case(
            generator,
            (3, 4, 5, 7),
            dtype=dtype,
            layout=layout,
            guided=True,
            learned_variance=learned,
            per_sample=layout != "contiguous",
        )
        check(backend, case, FITS[kind])


@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 1023, 1024, 1025, 5003])
def test_sizes(backend: backends.Backend, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for kind in FITS.values():
        check(backend, make_case(generator, (2, size), guided=True), kind)


def test_quantiles_of_ties_and_of_every_rank(backend: backends.Backend) -> None:
    """Quantiles are right for ties and every rank: few distinct values make neighbouring order
    statistics equal or far apart.
    """
    generator = torch.Generator().manual_seed(0)
    case = make_case(generator, (1, 101), dtype=torch.float64)
    case.model_output.copy_(torch.randint(-3, 4, (1, 101), generator=generator) * 1.5)
    case.x.zero_()
    for ratio in (*np.linspace(0.01, 1.0, 100), 1e-9):
        check(backend, case, Rescaling(0.0, float(ratio), math.inf))


def test_a_single_element_and_none(backend: backends.Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 1), (3, 0), (0, 4)):
        case = make_case(generator, shape, guided=True)
        rows = rescaled(backend, case, Rescaling(0.7, 0.9, math.inf))
        # No deviation to rescale by, and the quantile of one value is that value.
        assert rows.shape[0] == shape[0]
        if shape == (3, 1):
            m = case.model_output.double()
            u, c = m.chunk(2)
            row = Row(*case.table.double()[case.row].unbind(1))
            x_0 = row.cx * case.x[:, 0].double() + row.cm * (u + row.g * (c - u))[:, 0]
            s = x_0.abs().clamp(min=1.0)
            assert torch.allclose(rows[:, 0].double(), row.cx / s, rtol=1e-6)


def test_nan_anywhere_makes_the_sample_nan_and_no_other(backend: backends.Backend) -> None:
    case = make_case(torch.Generator().manual_seed(0), (3, 500), per_sample=True)
    case.model_output[1, 17] = math.nan
    rows = rescaled(backend, case, Rescaling(0.0, 0.5, math.inf))
    cx = rows[:, Row._fields.index("cx")]
    assert cx.isnan().tolist() == [False, True, False]


def test_infinity_beyond_the_quantile_is_one_value_among_others(backend: backends.Backend) -> None:
    case = make_case(torch.Generator().manual_seed(0), (1, 500))
    before = rescaled(backend, case, Rescaling(0.0, 0.5, math.inf))
    largest = case.model_output.abs().argmax()
    case.model_output.view(-1)[largest] = math.inf
    after = rescaled(backend, case, Rescaling(0.0, 0.5, math.inf))
    assert torch.allclose(before[:, :2], after[:, :2], rtol=0.02)


def test_rescale_without_guidance_is_refused() -> None:
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    case = make_case(torch.Generator().manual_seed(0), (2, 5))
    with pytest.raises(RuntimeError, match="rescale: expected 0 where the model output is not"):
        rescaled(backends.BACKENDS["cpu"], case, Rescaling(0.5, 0.0, math.inf))


@pytest.mark.parametrize("name", FIT_CASES)
def test_bits_are_those_of_the_specified_order(name: str) -> None:
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    case, rescaling = fit_case(name)
    got = rescaled(backends.BACKENDS["cpu"], case, rescaling)
    assert same_bits(got, specified_rows(case, rescaling))


def test_bits_do_not_depend_on_instruction_set_threads_or_batch() -> None:
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(ops.EXTENSION_ERROR)
    library = ctypes.CDLL(fastddim._C.__file__)
    case = make_case(torch.Generator().manual_seed(0), (5, 3, 40, 50), guided=True, per_sample=True)
    rescaling, cpu = FITS["both"], backends.BACKENDS["cpu"]
    before, results = torch.get_num_threads(), []
    try:
        for name, threads in itertools.product(INSTRUCTION_SETS, (1, 2, 5)):
            torch.set_num_threads(threads)
            if library.fastddim_use_instruction_set(name.encode()):
                results.append(rescaled(cpu, case, rescaling))
    finally:
        library.fastddim_use_instruction_set(None)
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = torch.zeros_like(results[0][:1])
    outputs = torch.cat([case.model_output[3:4], case.model_output[8:9]])
    cpu.rescale_rows(case.x[3:4], outputs, case.table, case.row[3:4], rescaling, alone)
    assert torch.equal(alone, results[0][3:4])


def test_a_sample_beyond_what_torch_quantile_takes() -> None:
    """A sample may have more than 2²⁴ elements, which torch.quantile refuses."""
    count = 2**24 + 5
    x = torch.rand(1, count) * 4
    table = stack_row(coefficient_row(0.5, 0.8, Update(prediction="sample")))[None].float()
    out, row = torch.zeros_like(table), torch.zeros(1, dtype=torch.int64)
    ops.rescale_rows(x, x, table, row, Rescaling(0.0, 0.995, math.inf), out)
    cm = out[0, Row._fields.index("cm")].item()
    assert 1 / cm == pytest.approx(np.quantile(x.numpy(), 0.995), rel=1e-6)


@pytest.mark.parametrize("kind", FITS)
def test_step_applies_them(kind: str) -> None:
    """A step clamps x_0 to [−s, s] and divides it by s, and scales the model output, as the papers
    say.
    """
    generator = torch.Generator().manual_seed(1)
    x, m = (torch.randn(n, 3, 9, 7, generator=generator, dtype=torch.float64) for n in (2, 4))
    rescaling, a, p = FITS[kind], 0.2, 0.6
    x_prev, x_0 = fastddim.step(
        x,
        m,
        a,
        p,
        guidance_scale=3.0,
        guidance_rescale=rescaling.rescale,
        dynamic_thresholding_ratio=rescaling.ratio or None,
        sample_max_value=rescaling.limit
        if rescaling.ratio and math.isfinite(rescaling.limit)
        else None,
        return_x0=True,
    )
    u, c = m.numpy()[:2], m.numpy()[2:]
    eps = u + 3.0 * (c - u)
    axes = (1, 2, 3)
    if rescaling.rescale:
        ratio = c.std(axes, ddof=1, keepdims=True) / eps.std(axes, ddof=1, keepdims=True)
        eps = rescaling.rescale * eps * ratio + (1 - rescaling.rescale) * eps
    clean = (x.numpy() - math.sqrt(1 - a) * eps) / math.sqrt(a)
    if rescaling.ratio:
        s = np.quantile(abs(clean), rescaling.ratio, axis=axes, keepdims=True).clip(
            1.0, rescaling.limit
        )
        clean = clean.clip(-s, s) / s
    np.testing.assert_allclose(x_0.numpy(), clean, atol=1e-12)
    direction = math.sqrt(p) * clean + math.sqrt(1 - p) * eps
    np.testing.assert_allclose(x_prev.numpy(), direction, atol=1e-12)


@pytest.mark.parametrize("kind", FITS)
def test_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, m = (
        torch.randn(n, 9, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (2, 4)
    )
    rescaling = FITS[kind]

    def step(x: Tensor, m: Tensor) -> Any:
        return fastddim.step(
            x,
            m,
            0.3,
            0.7,
            guidance_scale=2.0,
            guidance_rescale=rescaling.rescale,
            dynamic_thresholding_ratio=rescaling.ratio or None,
            return_x0=True,
        )

    assert torch.autograd.gradcheck(step, (x, m))


def test_reference_is_what_float64_gives() -> None:
    case = make_case(torch.Generator().manual_seed(3), (4, 3, 11), guided=True)
    rows = case.rows.index_select(0, case.row)
    truth = reference.rescaled_rows(case.x.double(), case.model_output.double(), rows, FITS["both"])
    single = reference.rescaled_rows(case.x, case.model_output, rows, FITS["both"])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-5, atol=0)
