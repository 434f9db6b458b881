"""The update in extended precision, and the body of tests that every backend runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastddim import backends, philox, reference
from fastddim.plan import Row

from .updates import Case, Result, run


def spacing(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of `dtype` at `values`."""
    info = torch.finfo(dtype)
    return np.maximum(abs(values), info.tiny) * info.eps


def extended(values: Tensor) -> np.ndarray:
    """The values in NumPy's widest float: 64 bits of mantissa on x86, 11 more than float64."""
    return values.double().numpy().astype(np.longdouble)


def assert_accurate(case: Case, got: Result) -> None:
    """Asserts an error of at most twice that of the eager formula, plus one rounding of
    the output.

    A handful of elements may hit no rounding error at all, so the eager error counts as at least
    one rounding of the largest term.
    """
    if case.x.numel() == 0:
        return
    eager = run(backends.BACKENDS["reference"].update_out, case)
    unit = torch.finfo(reference.compute_dtype(case.x.dtype)).eps / 2
    z = drawn(case)
    for name, mine, theirs, truth, terms in zip(
        ("x_prev", "x_0", "epsilon"),
        (got.out, got.x_0, got.epsilon),
        (eager.out, eager.x_0, eager.epsilon),
        exact(case, z),
        exact(case, z, absolute=True),
        strict=True,
    ):
        if mine is None or theirs is None:
            continue
        error, eager_error = (abs(extended(t) - truth) for t in (mine, theirs))
        expected = max(eager_error.max(), unit * terms.max())
        budget = 2 * expected + spacing(truth, mine.dtype)
        assert (error <= budget).all(), f"{name}: error {error.max()}, eager {expected}"


def check(backend: backends.Backend, case: Case) -> None:
    """Runs the checks of every backend: accuracy against float64, in place, and the next model
    input.
    """
    got = run(backend.update_out, case)
    in_place = run(backend.update_out, case, in_place=True)
    for a, b in zip(got.tensors(), in_place.tensors(), strict=True):
        assert torch.equal(a, b), "in place differs"
    # Without x_0 a kernel may take another path, for the same result.
    assert torch.equal(run(backend.update_out, case, with_x_0=False).out, got.out)
    assert_accurate(case, got)
    if got.model_input is not None:
        copies = len(got.model_input) // max(len(got.out), 1)
        expected = torch.cat([got.out] * max(copies, 1)).to(got.model_input.dtype)
        assert torch.equal(got.model_input, expected), "model_input is not the new state"


def drawn(case: Case) -> Tensor | None:
    """The noise of the step, given or drawn; None without noise."""
    if case.keys is None:
        return case.noise
    return philox.normal(case.keys, case.x.shape[1:], philox.STEP_NOISE)


def exact(
    case: Case, z: Tensor | None, *, absolute: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x_prev, x_0, epsilon) in extended precision, on the coefficients that the kernel reads.

    Args:
        z: the noise, by `drawn`, which takes longer than the sums.
        absolute: the same sums over the absolute values of their terms.
    """

    def wide(values: Tensor) -> np.ndarray:
        return abs(extended(values)) if absolute else extended(values)

    columns = wide(case.table.index_select(0, case.row)).T
    shape = (-1,) + (1,) * (case.x.ndim - 1)
    row = Row(*(column.reshape(shape) for column in columns))
    x = wide(case.x)
    m = wide(case.model_output)
    if x.ndim > 1:
        m = m[:, : x.shape[1]]
    if len(m) != len(x):
        u, c = m[: len(x)], m[len(x) :]
        m = u + row.g * (c + u if absolute else c - u)
    x_0 = row.cx * x + row.cm * m
    if not absolute:
        x_0 = np.clip(x_0, -row.r, row.r)
    x_prev = row.k0 * x_0 + row.kx * x + row.km * m
    if case.history is not None:
        x_prev = x_prev + row.ph * wide(case.history)
    if z is not None:
        x_prev = x_prev + row.pn * wide(z)
    if case.mask is not None and case.known is not None:
        weight = wide(case.mask)
        x_prev = weight * wide(case.known) + (1 - weight) * x_prev
    return x_prev, x_0, row.e0 * x_0 + row.ex * x + row.em * m
