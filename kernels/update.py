"""The fused update, the noise alone, and the counters of a loop: kernels and what launches them.

The update is csrc/formula.h in Triton, in one pass over memory. Every fused multiply-add is written
out and contraction is off, so the bits are those of the C++ kernel. What changes from step to step
(coefficients, seed, step and sample index) is read from device memory, so that a captured graph
serves any of it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddim.philox import STEP_NOISE, Keys
from fastddim.plan import Row

from .noise import normals, normals_of_quads, quads
from .views import (
    QUAD,
    Layout,
    View,
    cut,
    further,
    lay_out,
    locate,
    narrowed,
    part,
    pointers,
    read,
    write,
)

_ROW_FIELDS = tl.constexpr(len(Row._fields))
_PN = tl.constexpr(Row._fields.index("pn"))
_STEP_NOISE = tl.constexpr(STEP_NOISE)
_QUAD = tl.constexpr(QUAD)


class Tensors(NamedTuple):
    """The tensors of an update, `[B or 2B, C or 2C, …]`, as views inside a kernel."""

    x: Any
    model_output: Any
    noise: Any
    history: Any
    mask: Any
    known: Any
    out: Any
    x_0: Any
    model_input: Any
    epsilon: Any


@triton.jit
def row_at(table, row, sample, PER_SAMPLE: tl.constexpr):
    if PER_SAMPLE:
        row += sample
    return table + tl.load(row) * _ROW_FIELDS


@triton.jit
def coefficients_at(fields):
    return Row(
        tl.load(fields),
        tl.load(fields + 1),
        tl.load(fields + 2),
        tl.load(fields + 3),
        tl.load(fields + 4),
        tl.load(fields + 5),
        tl.load(fields + 6),
        tl.load(fields + 7),
        tl.load(fields + 8),
        tl.load(fields + 9),
        tl.load(fields + 10),
        tl.load(fields + 11),
    )


@triton.jit
def read_step(tensors, conditional, span, WIDE: tl.constexpr):
    """State, model output and conditional model output if there is one, as they lie in memory."""
    x = read(tensors.x, span, WIDE)
    m = read(tensors.model_output, span, WIDE)
    if conditional is None:
        return x, m
    else:
        return x, m, read(further(tensors.model_output, conditional), span, WIDE)


@triton.jit
def write_step(inputs, z, tensors, second_input, row, span, WIDE: tl.constexpr):
    """The update of csrc/formula.h; `z` is the noise that was drawn, or None."""
    compute: tl.constexpr = row.cx.dtype
    x = inputs[0].to(compute)
    m = inputs[1].to(compute)
    if len(inputs) == 3:
        m = tl.fma(row.g, inputs[2].to(compute) - m, m)
    x_0 = tl.fma(row.cx, x, row.cm * m)
    # NaN stays, and a limit that is NaN limits nothing. Triton's unary minus would be 0 - limit.
    limit = tl.where(row.r == row.r, row.r, float("inf"))
    x_0 = tl.maximum(x_0, limit * -1.0, propagate_nan=tl.PropagateNan.ALL)
    x_0 = tl.minimum(x_0, limit, propagate_nan=tl.PropagateNan.ALL)
    x_prev = tl.fma(row.k0, x_0, tl.fma(row.kx, x, row.km * m))
    if tensors.history is not None:
        x_prev = tl.fma(row.ph, read(tensors.history, span, WIDE).to(compute), x_prev)
    if tensors.epsilon is not None:
        epsilon = tl.fma(row.e0, x_0, tl.fma(row.ex, x, row.em * m))
        write(tensors.epsilon, epsilon, span, WIDE)
    if tensors.noise is not None:
        # Where its coefficient is 0 the noise is not read: it may be NaN.
        noisy = span.inside & (row.pn != 0)
        z = tl.load(pointers(tensors.noise, span, WIDE), mask=noisy, other=0.0)
    if z is not None:
        x_prev = tl.where(row.pn != 0, tl.fma(row.pn, z.to(compute), x_prev), x_prev)
    if tensors.mask is not None:
        weight = read(tensors.mask, span, WIDE).to(compute)
        known = read(tensors.known, span, WIDE).to(compute)
        x_prev = tl.fma(weight, known - x_prev, x_prev)

    write(tensors.out, x_prev, span, WIDE)
    if tensors.x_0 is not None:
        write(tensors.x_0, x_0, span, WIDE)
    if tensors.model_input is not None:
        state = narrowed(x_prev, tensors.out)
        write(tensors.model_input, state, span, WIDE)
        if second_input is not None:
            write(further(tensors.model_input, second_input), state, span, WIDE)


@triton.jit
def update_kernel(
    tensors,
    # Elements from the first to the second of two stacked batches; None where there is one.
    conditional,
    second_input,
    keys,
    table,
    row,
    sizes,
    count,
    PER_SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    sample, first = locate(SAMPLES, TILE)
    fields = row_at(table, row, sample, PER_SAMPLE)
    noisy = tl.load(fields + _PN) != 0
    if VECTOR > 1:
        span = part(sizes, sample, first, count, 0, False, TILE, VECTOR)
        # Read first: memory answers while noise is drawn.
        inputs = read_step(tensors, conditional, span, WIDE)
        coefficients = coefficients_at(fields)
        z = None
        if keys is not None:
            z = tl.zeros([TILE], tl.float32)
            if noisy:
                z = normals(keys, sample, first, _STEP_NOISE, TILE, VECTOR, NVIDIA)
        write_step(inputs, z, tensors, second_input, coefficients, span, WIDE)
    else:
        quad: tl.constexpr = TILE // _QUAD
        z = (None, None, None, None)
        if keys is not None:
            none = tl.zeros([quad], tl.float32)
            z = (none, none, none, none)
            if noisy:
                z = normals_of_quads(keys, sample, quads(first, TILE), _STEP_NOISE, NVIDIA)
        coefficients = coefficients_at(fields)
        for i in tl.static_range(_QUAD):
            span = part(sizes, sample, first, count, i, keys is not None, TILE, VECTOR)
            inputs = read_step(tensors, conditional, span, WIDE)
            write_step(inputs, z[i], tensors, second_input, coefficients, span, WIDE)


@triton.jit
def normal_kernel(
    out,
    keys,
    sizes,
    count,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    sample, first = locate(SAMPLES, TILE)
    if VECTOR > 1:
        z = normals(keys, sample, first, STREAM, TILE, VECTOR, NVIDIA)
        write(out, z, part(sizes, sample, first, count, 0, True, TILE, VECTOR), WIDE)
    else:
        z = normals_of_quads(keys, sample, quads(first, TILE), STREAM, NVIDIA)
        for i in tl.static_range(_QUAD):
            write(out, z[i], part(sizes, sample, first, count, i, True, TILE, VECTOR), WIDE)


@triton.jit(do_not_specialize=["count", "t_count"])
def advance_kernel(counters, timesteps, t, count, t_count, TILE: tl.constexpr):
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        counter = tl.load(counters + index, mask=index < count) + 1
        tl.store(counters + index, counter, mask=index < count)
        filled = index < t_count
        tl.store(t + index, tl.load(timesteps + counter, mask=filled), mask=filled)


_ADVANCE_TILE = 128

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class _Meta(NamedTuple):
    """What a launch depends on in a tensor, apart from its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _meta(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return _Meta(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


_MOST_PROGRAMS = 2**16 - 1
"""Along the second axis of a grid."""


class _Launch(NamedTuple):
    grid: tuple[int, int]
    views: tuple[tuple[int, tuple[int, ...]] | None, ...]
    """sample_stride and strides of each tensor's `View`."""
    constants: dict[str, Any]
    """The kernel's other arguments but addresses, and options of the compiler."""

    def view(self, tensors: tuple[Tensor | None, ...]) -> list[View | None]:
        return [
            None if tensor is None or strides is None else View(tensor, *strides)
            for tensor, strides in zip(tensors, self.views, strict=True)
        ]


def update_out(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: Tensor,
    *,
    noise: Tensor | None,
    keys: Keys | None,
    history: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    out: Tensor,
    x_0: Tensor | None,
    model_input: Tensor | None,
    epsilon: Tensor | None = None,
) -> None:
    """See `fastddim.backends.Backend.update_out`; the values of `row` are not checked.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    tensors = (x, model_output, noise, history, mask, known, out, x_0, model_input, epsilon)
    launch = _prepare_update(
        Tensors(*map(_meta, tensors)),
        _meta(table),
        _meta(row),
        None if keys is None else Keys(*map(_meta, keys)),
        _aligned(tensors),
    )
    if launch is None:
        return
    with _device_of(x):
        update_kernel[launch.grid](
            Tensors(*launch.view(tensors)), keys=keys, table=table, row=row, **launch.constants
        )


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """Standard normals of one stream into `out` `[B, …]`; the bits are those of `philox.normal`.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    launch = _prepare_normal(Keys(*map(_meta, keys)), _meta(out), _aligned((out,)))
    if launch is None:
        return
    with _device_of(out):
        normal_kernel[launch.grid](
            *launch.view((out,)), keys=keys, STREAM=stream, **launch.constants
        )


def advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> None:
    """One step on: `counters += 1`, then `t[i] = timesteps[counters[i]]`, in one program.

    Args:
        counters: int64 `[N]`, whose first values index `timesteps`; they are not checked.
        timesteps: int64 `[T]`.
        t: int64 `[M]`, M ≤ N.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    for name, tensor in (("counters", counters), ("timesteps", timesteps), ("t", t)):
        _check_integers(name, _meta(tensor), counters.device)
    if t.shape[0] > counters.shape[0]:
        raise ValueError(
            f"t: expected at most one value a counter, {counters.shape[0]}, got {t.shape[0]}"
        )
    with _device_of(counters):
        advance_kernel[(1,)](
            counters,
            timesteps,
            t,
            counters.shape[0],
            t.shape[0],
            TILE=_ADVANCE_TILE,
            num_warps=_ADVANCE_TILE // 32,
        )


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def _warp_size(device: torch.device) -> int:
    if torch.version.hip is None:
        return 32
    return int(torch.cuda.get_device_properties(device).warp_size)


def _options(*, capped: bool) -> dict[str, Any]:
    """Options of the compiler."""
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if capped and torch.version.hip is None:
        # Three quarters of the threads that a multiprocessor with 64 K registers holds.
        options["maxnreg"] = 40
    return options


_HERE = contextlib.nullcontext()


def _aligned(tensors: tuple[Tensor | None, ...]) -> bool:
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


@functools.lru_cache(maxsize=1024)
def _prepare_update(
    tensors: Tensors, table: _Meta, row: _Meta, keys: Keys | None, aligned: bool
) -> _Launch | None:
    """The checked launch of an update, or None where there is nothing to do."""
    x, model_output, model_input = tensors.x, tensors.model_output, tensors.model_input
    _check_state("x", x)
    guided = _check_stacked("model_output", model_output, x, learned_variance=True)
    for name in ("noise", "history", "mask", "known", "out", "x_0", "epsilon"):
        _check_like(name, getattr(tensors, name), x)
    if (tensors.mask is None) != (tensors.known is None):
        raise ValueError("mask, known: expected both or neither")
    if tensors.noise is not None and keys is not None:
        raise ValueError("noise, keys: expected at most one of them")
    if tensors.out.dtype != x.dtype:
        raise TypeError(f"out: expected the dtype of x, {x.dtype}, got {tensors.out.dtype}")
    twice = model_input is not None and _check_stacked("model_input", model_input, x)
    _check_rows(table, row, x)
    if keys is not None:
        _check_keys(keys, x)
    if 0 in x.shape:
        return None

    batch = x.shape[0]
    layout = lay_out(
        x.shape,
        [None if tensor is None else tensor.strides for tensor in tensors],
        ordered_by=Tensors._fields.index("out") if keys is None else None,
        one_row=row.shape[0] == 1,
    )
    return _launch(
        layout,
        [tensor for tensor in tensors if tensor is not None],
        # Without noise there is no need; a history, epsilon, a mask or float64 would not fit.
        capped=keys is not None
        and tensors.history is None
        and tensors.mask is None
        and tensors.epsilon is None,
        aligned=aligned,
        conditional=batch * model_output.strides[0] if guided else None,
        second_input=batch * model_input.strides[0] if twice else None,
        PER_SAMPLE=row.shape[0] > 1,
    )


@functools.lru_cache(maxsize=1024)
def _prepare_normal(keys: Keys, out: _Meta, aligned: bool) -> _Launch | None:
    _check_state("out", out)
    _check_keys(keys, out)
    if 0 in out.shape:
        return None
    layout = lay_out(out.shape, [out.strides], ordered_by=None, one_row=False)
    return _launch(layout, [out], capped=True, aligned=aligned)


def _launch(
    layout: Layout, tensors: list[_Meta], *, capped: bool, aligned: bool, **constants: Any
) -> _Launch:
    distances = [v for v in (constants.get("conditional"), constants.get("second_input")) if v]
    itemsize = max(tensor.dtype.itemsize for tensor in tensors)
    tiles = cut(
        layout,
        itemsize,
        _warp_size(tensors[0].device),
        aligned=aligned and not any(distance % 16 for distance in distances),
    )
    programs = layout.batch * tiles.per_sample
    if programs >= 2**31:
        raise ValueError(f"x: expected a batch for fewer than 2**31 programs, got {programs}")
    # The first axis of a grid is long, the others are not.
    samples_first = layout.batch > _MOST_PROGRAMS
    constants |= {
        "sizes": layout.sizes,
        "count": layout.elements,
        "TILE": tiles.size,
        "VECTOR": tiles.vector,
        "WIDE": layout.wide,
        "SAMPLES": None if layout.batch == 1 else 0 if samples_first else 1,
        # Triton's interpreter knows no instructions.
        "NVIDIA": torch.version.hip is None and not triton.knobs.runtime.interpret,
        "num_warps": tiles.num_warps,
        **_options(capped=capped and itemsize < 8),
    }
    grid = (tiles.per_sample, layout.batch)
    return _Launch(grid[::-1] if samples_first else grid, layout.strides, constants)


def _check_state(name: str, meta: _Meta) -> None:
    _check_dtype(name, meta)
    if not meta.shape:
        raise ValueError(f"{name}: expected at least one dimension, [B, ...], got a 0-d tensor")


def _check_dtype(name: str, meta: _Meta) -> None:
    if meta.dtype not in _DTYPES:
        expected = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{name}: expected a dtype of {expected}, got {meta.dtype}")


def _check_device(name: str, meta: _Meta, device: torch.device) -> None:
    if meta.device != device:
        raise ValueError(f"{name}: expected device {device}, got {meta.device}")


def _check_like(name: str, meta: _Meta | None, x: _Meta) -> None:
    if meta is None:
        return
    _check_dtype(name, meta)
    _check_device(name, meta, x.device)
    if meta.shape != x.shape:
        raise ValueError(f"{name}: expected shape {tuple(x.shape)}, got {tuple(meta.shape)}")


def _check_stacked(name: str, meta: _Meta, x: _Meta, *, learned_variance: bool = False) -> bool:
    """Whether there are 2B samples instead of B."""
    _check_dtype(name, meta)
    _check_device(name, meta, x.device)
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
    return meta.shape[0] != batch


def _check_rows(table: _Meta, row: _Meta, x: _Meta) -> None:
    _check_device("table", table, x.device)
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
    _check_integers("row", row, x.device)
    if row.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"row: expected [1] or [B] = [{x.shape[0]}], got {list(row.shape)}")


def _check_keys(keys: Keys, state: _Meta) -> None:
    for name, key in zip(Keys._fields, keys, strict=True):
        _check_integers(name, key, state.device)
        if key.shape[0] != state.shape[0]:
            raise ValueError(f"{name}: expected [B] = [{state.shape[0]}], got {list(key.shape)}")
    count = math.prod(state.shape[1:])
    if count > 4 << 32:
        raise ValueError(f"x: expected at most 2**34 elements a sample, got {count}")


def _check_integers(name: str, meta: Any, device: torch.device) -> None:
    _check_device(name, meta, device)
    if meta.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {meta.dtype}")
    if len(meta.shape) != 1 or (meta.shape[0] > 1 and meta.strides != (1,)):
        raise ValueError(
            f"{name}: expected a contiguous tensor of one dimension, "
            f"got shape {tuple(meta.shape)} with strides {meta.strides}"
        )
