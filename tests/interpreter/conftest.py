"""Corrections of Triton's interpreter, which parity.py shows to be enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from ..support.gpuless import exact


def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Fuses the product, which the interpreter rounds."""
    fma = {np.dtype(np.float32): exact.fma32, np.dtype(np.float64): exact.fma64}[z.data.dtype]
    with np.errstate(all="ignore"):
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)


_convert_float = interpreter._convert_float


def converted(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Rounds float32 to bfloat16, which the interpreter truncates."""
    if source == tl.float32 and target == tl.bfloat16:
        flat = np.ascontiguousarray(values).view(np.float32).reshape(-1)
        return exact.narrowed(flat, "bf16").reshape(values.shape)
    return _convert_float(values, source, target, rounding_mode)


_binary_op = interpreter.InterpreterBuilder.binary_op


def computed(self: Any, x: Any, y: Any, operation: Any) -> Any:
    """Gives a comparison a Boolean type, where the interpreter gives it the type of its
    operands.
    """
    if operation in _COMPARISONS:
        return interpreter.TensorHandle(operation(x.data, y.data), tl.int1)
    return _binary_op(self, x, y, operation)


_patch_lang_tensor = interpreter._patch_lang_tensor


def indexed(tensor: Any, scope: Any) -> None:
    """Takes an integer from an array of one dimension, which Triton 3.6 does in a way that NumPy
    now refuses.
    """
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

interpreter.InterpreterBuilder.binary_op = computed
interpreter.InterpreterBuilder.create_fma = fused
interpreter._convert_float = converted
interpreter._patch_lang_tensor = indexed
