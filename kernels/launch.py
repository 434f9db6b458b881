"""Launches of the kernels.

Tensors are checked and cut into programs once for the same shapes, strides, dtypes and devices.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastddim.ops import Inputs, Outputs, split_operands
from fastddim.philox import Keys

from .checks import Meta, check_integers, check_keys, check_state, check_update, meta_of
from .update import Tensors, advance_kernel, normal_kernel, update_kernel
from .views import SampleLayout, View, cut, lay_out

_tensors_of = operator.itemgetter(*map((*Inputs._fields, *Outputs._fields).index, Tensors._fields))
"""`Tensors` from the operands of an update."""

_ADVANCE_TILE = 128

_THREE_QUARTERS = 40
"""Registers with which a multiprocessor that has 64 K holds three quarters of its threads."""

_MOST_PROGRAMS = 2**16 - 1
"""Along the second axis of a grid."""


class _Launch(NamedTuple):
    grid: tuple[int, int]
    views: tuple[tuple[int, tuple[int, ...]] | None, ...]
    """sample_stride and strides of each tensor's `View`."""
    constants: dict[str, Any]
    """The other arguments of the kernel, except addresses, and options of the compiler."""

    def view(self, tensors: tuple[Tensor | None, ...]) -> list[View | None]:
        return [
            None if tensor is None or strides is None else View(tensor, *strides)
            for tensor, strides in zip(tensors, self.views, strict=True)
        ]


def update_out(*operands: Any) -> None:
    """One update; the operands are those of `fastddim::update_out`, in the order of its schema.

    The values of `row` are not checked.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    inputs, _ = split_operands(operands)
    keys = inputs.keys
    if keys is None and inputs.seed is not None:
        raise ValueError("step, sample: expected both beside seed, got None")
    tensors = _tensors_of(operands)
    launch = _prepare_update(
        Tensors(*map(meta_of, tensors)),
        meta_of(inputs.table),
        meta_of(inputs.row),
        None if keys is None else Keys(*map(meta_of, keys)),
        _aligned(tensors),
    )
    if launch is None:
        return
    with _device_of(inputs.x):
        update_kernel[launch.grid](
            Tensors(*launch.view(tensors)),
            keys=keys,
            table=inputs.table,
            row=inputs.row,
            **launch.constants,
        )


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """Standard normals of one stream into `out` `[B, …]`; the bits are those of `philox.normal`.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    launch = _prepare_normal(Keys(*map(meta_of, keys)), meta_of(out), _aligned((out,)))
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
        check_integers(name, meta_of(tensor), counters.device)
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


def _options(registers: int | None) -> dict[str, Any]:
    """Options of the compiler.

    Args:
        registers: the most of a thread, which NVIDIA's compiler can be told.
    """
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    return options


_HERE = contextlib.nullcontext()


def _aligned(tensors: tuple[Tensor | None, ...]) -> bool:
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


@functools.lru_cache(maxsize=1024)
def _prepare_update(
    tensors: Tensors, table: Meta, row: Meta | None, keys: Keys | None, aligned: bool
) -> _Launch | None:
    """The checked launch of an update, or None where there is nothing to do."""
    check_update(tensors, table, row, keys)
    x, model_output, model_input = tensors.x, tensors.model_output, tensors.model_input
    if 0 in x.shape:
        return None

    batch = x.shape[0]
    per_sample = row is not None and row.shape[0] > 1
    layout = lay_out(
        x.shape,
        [None if tensor is None else tensor.strides for tensor in tensors],
        ordered_by=Tensors._fields.index("out") if keys is None else None,
        one_row=not per_sample,
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
        conditional=_second_half(model_output, batch),
        second_input=_second_half(model_input, batch),
        PER_SAMPLE=per_sample,
        NVIDIA=_takes_instructions(),
    )


def _takes_instructions() -> bool:
    """Whether kernels may hold instructions of NVIDIA's, which Triton's interpreter knows not."""
    return torch.version.hip is None and not triton.knobs.runtime.interpret


def _second_half(tensor: Meta | None, batch: int) -> int | None:
    """Elements from the first to the second of two stacked batches; None where there is one."""
    if tensor is None or tensor.shape[0] == batch:
        return None
    return batch * tensor.strides[0]


@functools.lru_cache(maxsize=1024)
def _prepare_normal(keys: Keys, out: Meta, aligned: bool) -> _Launch | None:
    check_state("out", out)
    check_keys(keys, out)
    if 0 in out.shape:
        return None
    layout = lay_out(out.shape, [out.strides], ordered_by=None, one_row=False)
    return _launch(layout, [out], capped=True, aligned=aligned, NVIDIA=_takes_instructions())


def _launch(
    layout: SampleLayout, tensors: list[Meta], *, capped: bool, aligned: bool, **constants: Any
) -> _Launch:
    halves = ("conditional", "second_input", "second_gradient")
    distances = [distance for distance in map(constants.get, halves) if distance]
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
        "num_warps": tiles.num_warps,
        **_options(_THREE_QUARTERS if capped and itemsize < 8 else None),
    }
    grid = (tiles.per_sample, layout.batch)
    return _Launch(grid[::-1] if samples_first else grid, layout.strides, constants)
