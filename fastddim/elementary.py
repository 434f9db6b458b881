"""Elementary functions with correct rounding, which gives coefficients the same bits on every CPU.

IEEE 754 requires correct rounding of +, −, ·, / and √ only. torch takes √, powers, exp, log and cos
of a CPU tensor from a vector library whose last bit depends on the processor, NumPy does so for exp
and cos, and `x ** 0.5` of a number is the C library's pow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from fastddim.transforms import bare
from fastddim.validation import readable

# The bits in which exp and cos are worked out before they are rounded to 53. The rounding is wrong
# only for a result within 2⁻¹²⁸ of the middle between two float64 numbers: one in 2⁷⁴ by chance.
_PRECISION = 128


@overload
def sqrt(value: float) -> float: ...


@overload
def sqrt(value: Tensor) -> Tensor: ...


def sqrt(value: float | Tensor) -> float | Tensor:
    """√ of a number, or of each element of a tensor; NaN for elements below 0.

    The root of a tensor that cannot be read, as on an accelerator or under tracing, or that has
    derivatives, is torch's: CUDA's square root of float64 is correctly rounded. The derivative at 0
    is 0. Otherwise the root of a constant 0, as of 1 − ᾱ_prev after the last step, would give NaN.
    """
    if not isinstance(value, Tensor):
        return math.sqrt(value)
    if not readable(value):
        return value.sqrt() if bare(value) else _differentiable_sqrt(value)
    root = torch.empty_like(value)
    with np.errstate(invalid="ignore"):
        np.sqrt(value.numpy(), out=root.numpy())
    return root


def _differentiable_sqrt(value: Tensor) -> Tensor:
    zero = value == 0
    return torch.where(zero, value.detach(), torch.where(zero, 1.0, value).sqrt())


def exp(values: np.ndarray) -> np.ndarray:
    """e to the power of each element, float64."""
    import mpmath

    return _each(mpmath.exp, values)


def cos(values: np.ndarray) -> np.ndarray:
    """Cosine of each element, float64."""
    import mpmath

    return _each(mpmath.cos, values)


def _each(function: Callable[..., Any], values: np.ndarray) -> np.ndarray:
    results = [float(function(value, prec=_PRECISION)) for value in values.ravel().tolist()]
    return np.array(results, dtype=np.float64).reshape(values.shape)
