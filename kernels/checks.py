"""Checks of the tensors of a launch; each message names the tensor that does not fit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.philox import Keys
from fastddim.plan import Row

from . import backward
from .rescaling import Data
from .update import Tensors

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Meta(NamedTuple):
    """Everything in a tensor that a launch depends on, except its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def meta_of(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return Meta(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def check_update(tensors: Tensors, table: Meta, row: Meta | None, keys: Keys | None) -> None:
    """Check the tensors of an update.

    Args:
        tensors: a `Meta` for each tensor, None where it is absent.
        table: coefficient rows.
        row: the row of each sample, or None where all have the first.
        keys: a `Meta` for each.

    Raises:
        TypeError, ValueError: a tensor does not fit.
    """
    x = tensors.x
    check_state("x", x)
    check_stacked("model_output", tensors.model_output, x, learned_variance=True)
    for name in ("noise", "history", "mask", "known", "out", "x_0", "epsilon"):
        check_like(name, getattr(tensors, name), x)
    if (tensors.mask is None) != (tensors.known is None):
        raise ValueError("mask, known: expected both or neither")
    if tensors.noise is not None and keys is not None:
        raise ValueError("noise, keys: expected at most one of them")
    if tensors.out.dtype != x.dtype:
        raise TypeError(f"out: expected the dtype of x, {x.dtype}, got {tensors.out.dtype}")
    if tensors.model_input is not None:
        check_stacked("model_input", tensors.model_input, x)
    check_rows(table, row, x)
    if keys is not None:
        check_keys(keys, x)


def check_gradients(tensors: backward.Tensors, table: Meta, row: Meta | None) -> None:
    """Check the tensors of a backward pass.

    Args:
        tensors: a `Meta` for each tensor, None where it is absent.
        table: coefficient rows.
        row: the row of each sample, or None where all have the first.

    Raises:
        TypeError, ValueError: a tensor does not fit.
    """
    x = tensors.x
    check_state("x", x)
    for name in ("grad_x_prev", "grad_x_0", "mask", "grad_x"):
        check_like(name, getattr(tensors, name), x)
    for name in ("model_output", "grad_model_output"):
        check_stacked(name, getattr(tensors, name), x, learned_variance=True)
    batch, expected = tensors.grad_model_output.shape[0], tensors.model_output.shape[0]
    if batch != expected:
        raise ValueError(
            f"grad_model_output: expected the batch of model_output, {expected}, got {batch}"
        )
    check_rows(table, row, x)


def check_rescaling(
    data: Data, table: Meta, row: Meta | None, out: Meta, *, rescales: bool
) -> None:
    """Check the tensors that rows are made from, and the tensor that they are written into.

    Args:
        data: a `Meta` for each tensor.
        table: coefficient rows.
        row: the row of each sample, or None where all have the first.
        out: new rows.
        rescales: whether the model output is rescaled, which has to be guided.

    Raises:
        TypeError, ValueError: a tensor does not fit.
    """
    x, model_output = data
    check_state("x", x)
    check_stacked("model_output", model_output, x, learned_variance=True)
    check_rows(table, row, x)
    check_device("out", out, x.device)
    batch, fields = x.shape[0], len(Row._fields)
    if out.dtype != table.dtype:
        raise TypeError(f"out: expected the dtype of table, {table.dtype}, got {out.dtype}")
    if out.shape != (batch, fields) or out.strides != (fields if batch > 1 else out.strides[0], 1):
        raise ValueError(
            f"out: expected a contiguous tensor [B, {fields}] = [{batch}, {fields}], got shape "
            f"{tuple(out.shape)} with strides {out.strides}"
        )
    if rescales and model_output.shape[0] == batch and batch > 0:
        raise ValueError("rescale: expected 0 where the model output is not guided")


def check_state(name: str, meta: Meta) -> None:
    check_dtype(name, meta)
    if not meta.shape:
        raise ValueError(f"{name}: expected at least one dimension, [B, ...], got a 0-d tensor")


def check_dtype(name: str, meta: Meta) -> None:
    if meta.dtype not in _DTYPES:
        expected = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{name}: expected a dtype of {expected}, got {meta.dtype}")


def check_device(name: str, meta: Meta, device: torch.device) -> None:
    if meta.device != device:
        raise ValueError(f"{name}: expected device {device}, got {meta.device}")


def check_like(name: str, meta: Meta | None, x: Meta) -> None:
    if meta is None:
        return
    check_dtype(name, meta)
    check_device(name, meta, x.device)
    if meta.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(meta.shape)}")


def check_stacked(name: str, meta: Meta, x: Meta, *, learned_variance: bool = False) -> None:
    """Check a tensor of B or 2B samples; with learned variance, it may have twice the channels."""
    check_dtype(name, meta)
    check_device(name, meta, x.device)
    batch, *inner = x.shape
    allowed = [tuple(inner)]
    if learned_variance and inner:
        allowed.append((2 * inner[0], *inner[1:]))
    if (
        len(meta.shape) != len(x.shape)
        or meta.shape[0] not in (batch, 2 * batch)
        or tuple(meta.shape[1:]) not in allowed
    ):
        expected = " or ".join(
            str((stacked, *rest)) for rest in allowed for stacked in (batch, 2 * batch)
        )
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(meta.shape)}")


def check_rows(table: Meta, row: Meta | None, x: Meta) -> None:
    check_device("table", table, x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if table.dtype != dtype:
        raise TypeError(f"table: expected dtype {dtype}, got {table.dtype}")
    fields = len(Row._fields)
    if (
        len(table.shape) != 2
        or table.shape[1] != fields
        or (table.shape[0] > 1 and table.strides != (fields, 1))
    ):
        raise ValueError(
            f"table: expected a contiguous tensor [R, {fields}], got shape {tuple(table.shape)} "
            f"with strides {table.strides}"
        )
    if row is None:
        if not table.shape[0]:
            raise ValueError("table: expected at least one row, got none")
        return
    check_integers("row", row, x.device)
    if row.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"row: expected [1] or [B] = [{x.shape[0]}], got {list(row.shape)}")


def check_keys(keys: Keys, state: Meta) -> None:
    for name, key in zip(Keys._fields, keys, strict=True):
        check_integers(name, key, state.device)
        if key.shape[0] != state.shape[0]:
            raise ValueError(f"{name}: expected [B] = [{state.shape[0]}], got {list(key.shape)}")
    count = math.prod(state.shape[1:])
    if count > 4 << 32:
        raise ValueError(f"x: expected at most 2**34 elements a sample, got {count}")


def check_integers(name: str, meta: Any, device: torch.device) -> None:
    check_device(name, meta, device)
    if meta.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {meta.dtype}")
    if len(meta.shape) != 1 or (meta.shape[0] > 1 and meta.strides != (1,)):
        raise ValueError(
            f"{name}: expected a contiguous tensor of one dimension, "
            f"got shape {tuple(meta.shape)} with strides {meta.strides}"
        )
