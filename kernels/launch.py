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

from fastddim.ops import Inputs, Outputs
from fastddim.philox import Keys

from .checks import Meta, check_integers, check_keys, check_state, check_update, meta_of
from .repeated import Repeated
from .update import Tensors, advance_kernel, normal_kernel, update_kernel
from .views import SampleLayout, View, cut, lay_out

_tensors_of = operator.itemgetter(*map((*Inputs._fields, *Outputs._fields).index, Tensors._fields))
"""`Tensors` from the operands of an update."""

_ADVANCE_TILE = 128

_THREE_QUARTERS = 40
"""Registers per thread with which a multiprocessor with 64 K registers holds three quarters of its
threads."""

_MOST_PROGRAMS = 2**16 - 1
"""The most programs along the second axis of a grid."""


class _Launch(NamedTuple):
    grid: tuple[int, int]
    views: tuple[tuple[int, tuple[int, ...]] | None, ...]
    """The sample_stride and the strides of each tensor's `View`."""
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
    _, _, table, row, _, seed, step, sample, *_ = operands
    if seed is not None and (step is None or sample is None):
        raise ValueError("step, sample: expected both with seed, got None")
    keys = None if seed is None else Keys(seed, step, sample)
    tensors = _tensors_of(operands)
    found = find_update(tensors, table, row, keys)
    if found is None:
        return
    launch, repeated = found
    with _device_of(tensors[0]):
        repeated(tensors=Tensors(*launch.view(tensors)), keys=keys, table=table, row=row)


def normal_out(keys: Keys, stream: int, out: Tensor) -> None:
    """Write standard normals of one noise stream into `out` `[B, …]`, as `philox.normal` has them.

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
    """Advance by one step: `counters += 1`, then `t[i] = timesteps[counters[i]]`, in one program.

    Args:
        counters: int64 `[N]`, whose first values index `timesteps`; they are not checked.
        timesteps: int64 `[T]`.
        t: int64 `[M]`, M ≤ N.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
    """
    launch = find_advance(counters, timesteps, t)
    with _device_of(counters):
        launch(counters=counters, timesteps=timesteps, t=t)


def find_advance(counters: Tensor, timesteps: Tensor, t: Tensor) -> Repeated:
    """The checked launch of `advance` with such tensors."""
    return _found_advance(_likeness(counters), _likeness(timesteps), _likeness(t))


def find_update(
    tensors: tuple[Tensor | None, ...], table: Tensor, row: Tensor | None, keys: Keys | None
) -> tuple[_Launch, Repeated] | None:
    """The checked launch of an update of such tensors, or None where there is nothing to do."""
    return _found_update(
        *map(_likeness, tensors),
        *map(_likeness, (table, row)),
        *((None, None, None) if keys is None else map(_likeness, keys)),
    )


def _likeness(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Everything in a tensor that a launch depends on, with the properties of its address that
    kernels are specialised for.
    """
    if tensor is None:
        return None
    aligned = tensor.data_ptr() % 16 == 0
    # For AMD's GPUs, Triton asks whether 32 bits reach all of the memory.
    near = torch.version.hip is None or tensor.untyped_storage().nbytes() < 2**31
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, aligned, near


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context for a launch on the tensor's device, since Triton's is on the current one."""
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
        registers: the most registers of a thread, an option of NVIDIA's compiler alone.
    """
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    return options


_HERE = contextlib.nullcontext()


def _aligned(tensors: tuple[Tensor | None, ...]) -> bool:
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


@functools.lru_cache(maxsize=1024)
def _found_update(*likenesses: tuple[Any, ...] | None) -> tuple[_Launch, Repeated] | None:
    """See `find_update`; the likenesses are those of its tensors, in their order."""
    metas: list[Any] = [
        None if likeness is None else Meta(*likeness[:4]) for likeness in likenesses
    ]
    *tensors, table, row, seed, step, sample = metas
    keys = None if seed is None else Keys(seed, step, sample)
    aligned = all(likeness is None or likeness[4] for likeness in likenesses[: len(tensors)])
    launch = _prepare_update(Tensors(*tensors), table, row, keys, aligned)
    if launch is None:
        return None
    return launch, Repeated(update_kernel, launch.grid, launch.constants)


@functools.lru_cache(maxsize=1024)
def _found_advance(*likenesses: tuple[Any, ...]) -> Repeated:
    counters, timesteps, t = (Meta(*likeness[:4]) for likeness in likenesses)
    for name, meta in (("counters", counters), ("timesteps", timesteps), ("t", t)):
        check_integers(name, meta, counters.device)
    count, t_count = counters.shape[0], t.shape[0]
    if t_count > count:
        raise ValueError(f"t: expected at most one value a counter, {count}, got {t_count}")
    constants = {"count": count, "t_count": t_count, "TILE": _ADVANCE_TILE}
    return Repeated(advance_kernel, (1,), {**constants, "num_warps": _ADVANCE_TILE // 32})


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
        # Without noise a cap is not needed; a history, epsilon, a mask or float64 would not fit.
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
    """True where kernels may hold NVIDIA's instructions, unknown to Triton's interpreter."""
    return torch.version.hip is None and not triton.knobs.runtime.interpret


def _second_half(tensor: Meta | None, batch: int) -> int | None:
    """The number of elements between two stacked batches; None where there is one batch."""
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
