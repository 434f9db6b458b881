"""Steps on the CPU past PyTorch's dispatcher, which takes longer than the update of a small state.

`step` and steppers take a step where the dispatcher has nothing else to do: the tensors are plain
ones on the CPU, nothing differentiates, traces, records or changes computations in this thread, and
all arguments fit. In all other cases they return None and change nothing; the caller's own way
through checks and operators then gives the result or the error.

The kernel reads a tensor's memory by `torch.Tensor.__dlpack_c_exchange_api__`, a table of C
functions, and calls no operator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddim import ops
from fastddim.choices import PREDICTION_SYNONYMS, PREDICTIONS, VARIANCE_SYNONYMS, VARIANCES
from fastddim.philox import fresh_seed
from fastddim.tracing import WATCHERS
from fastddim.transforms import functorch_active

Result: TypeAlias = Tensor | tuple[Tensor, Tensor] | None

IMPLEMENTATIONS = ("auto", "cpu")
"""The values of `impl` for which the kernel here takes a step on the CPU."""


def declines(*arguments: Any) -> Result:
    """Take no step, in place of the functions of a missing extension."""
    return None


def _numbered(words: tuple[str, ...], synonyms: dict[Any, Any]) -> dict[str, int]:
    """The index of each word among `words`, and of each synonym of one."""
    return {word: words.index(synonyms.get(word, word)) for word in (*words, *synonyms)}


def _connected() -> Any:
    """The extension, connected to the functions of PyTorch and this package that it calls."""
    extension = importlib.import_module("fastddim._C")
    extension.connect(
        Tensor,
        Tensor.is_neg,
        torch.empty_like,
        (functorch_active, *WATCHERS),
        vars(forward_ad),
        torch.autograd.graph.increment_version,
        partial(fresh_seed, torch.device("cpu")),
        _numbered(PREDICTIONS, PREDICTION_SYNONYMS),
        _numbered(VARIANCES, VARIANCE_SYNONYMS),
        dict.fromkeys(IMPLEMENTATIONS, 0),
        Tensor.__dlpack_c_exchange_api__,
    )
    return extension


_extension = _connected() if ops.EXTENSION_ERROR is None else None

step: Callable[..., Result] = declines if _extension is None else _extension.step
"""`step(x_t, model_output, alpha_t, alpha_prev, eta, variance, prediction, clip, rederive_eps,
guidance_scale, temperature, guidance_rescale, dynamic_thresholding_ratio, sample_max_value, seed,
sample_offset, step_index, noise, out, return_x0, impl)`: the step with these arguments of
`fastddim.step`, or None.
"""


def make_stepper(rows: Tensor, *, noisy: bool, guided: bool) -> Callable[..., Result]:
    """Make the function of the steps of a table.

    Args:
        rows: float64 `[R, K]`, which is copied.
        noisy: whether noise is read.
        guided: whether model outputs have 2B samples.

    Returns:
        `stepper(x, model_output, row, noise, seed, sample_offset, step_index, out, return_x0)`: the
        step by a row in [0, R), or None.
    """
    if _extension is None or not len(rows):
        return declines
    stepper: Callable[..., Result] = _extension.make_stepper(rows.contiguous(), noisy, guided)
    return stepper
