"""Tensors as kernels address them.

The dimensions of a launch's tensors are reordered and merged until as many tensors as possible are
one run of memory; sizes and strides of the others are arguments of a kernel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor as a kernel sees it."""

    data: Any
    sample_stride: int
    strides: tuple[int, ...]
    """Strides in a sample, in the layout's dimensions; empty where a sample is one run."""


class SampleLayout(NamedTuple):
    """The samples of a launch, and the strides in each of its tensors."""

    batch: int
    """Number of samples; 1 where all of them are taken as one."""
    elements: int
    """Number of elements of a sample."""
    sizes: tuple[int, ...]
    """Sizes of one sample; empty where every tensor is one run."""
    strides: tuple[tuple[int, tuple[int, ...]] | None, ...]
    """(sample_stride, strides) of each tensor's `View`; None where the tensor is absent."""
    wide: bool
    """True if 32 bits are too few for an index or offset inside a sample."""


def lay_out(
    shape: Sequence[int],
    strides: Sequence[Sequence[int] | None],
    *,
    ordered_by: int | None,
    one_row: bool,
) -> SampleLayout:
    """The layout of tensors of one shape `[B, …]`.

    Args:
        shape: batch first.
        strides: those of each tensor; None where it is absent.
        ordered_by: the tensor in whose memory order elements are counted, or None for row-major
            order, which noise is keyed by.
        one_row: whether all samples share one row of coefficients.
    """
    batch, count = shape[0], math.prod(shape[1:])
    dims = [d for d in range(1, len(shape)) if shape[d] != 1]
    if ordered_by is not None:
        order = strides[ordered_by]
        assert order is not None
        dims.sort(key=lambda d: -order[d])
    present = [s for s in strides if s is not None]
    sizes, merged = _merged(
        [shape[d] for d in dims], [[tensor[d] for d in dims] for tensor in present]
    )
    runs = [_is_run(sizes, tensor) for tensor in merged]
    runs_follow = batch == 1 or all(tensor[0] == count for tensor in present)
    if all(runs) and runs_follow and one_row and ordered_by is not None:
        batch, count = 1, batch * count
    views = iter(
        (tensor[0] if batch > 1 else 0, () if run else tuple(inner))
        for tensor, inner, run in zip(present, merged, runs, strict=True)
    )
    reach = max(
        (
            sum((n - 1) * s for n, s in zip(sizes, inner, strict=True))
            for inner, run in zip(merged, runs, strict=True)
            if not run
        ),
        default=0,
    )
    return SampleLayout(
        batch,
        count,
        () if all(runs) else tuple(sizes),
        tuple(None if tensor is None else next(views) for tensor in strides),
        # A tile may begin just below the last element.
        wide=not all(runs) and max(count + MAX_TILE, reach) >= 2**31,
    )


MAX_TILE = 2048


def _merged(sizes: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dimensions that are one run in every tensor."""
    merged_sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(sizes):
        if merged_sizes and all(
            kept[-1] == tensor[d] * size for kept, tensor in zip(merged, strides, strict=True)
        ):
            merged_sizes[-1] *= size
            for kept, tensor in zip(merged, strides, strict=True):
                kept[-1] = tensor[d]
        else:
            merged_sizes.append(size)
            for kept, tensor in zip(merged, strides, strict=True):
                kept.append(tensor[d])
    return merged_sizes, merged


def _is_run(sizes: list[int], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


class Tiles(NamedTuple):
    """The division of samples among programs."""

    size: int
    """Elements of a tile."""
    vector: int
    """Neighbouring elements that a thread moves at once."""
    num_warps: int
    per_sample: int


QUAD = 4
"""Elements that one call of the generator draws, and that a thread without vectors takes."""


def cut(layout: SampleLayout, itemsize: int, warp_size: int, *, aligned: bool) -> Tiles:
    """Tiles in which a thread moves 16 bytes of the tensor with the largest items at once, and as
    many elements of the others.

    A tile has 256 threads for a million elements or more, else 128, which makes more programs; it
    has fewer only where a sample is smaller.

    Args:
        itemsize: the largest of the tensors' item sizes.
        aligned: whether all tensors begin at a multiple of 16 bytes.
    """
    vector = 16 // itemsize if aligned and _divides(layout, 16) else 1
    threads = 256 if layout.batch * layout.elements >= 2**20 else 128
    width = vector if vector > 1 else QUAD
    while threads > warp_size and threads // 2 * width >= layout.elements:
        threads //= 2
    size = threads * width
    return Tiles(size, vector, threads // warp_size, -(-layout.elements // size))


def _divides(layout: SampleLayout, alignment: int) -> bool:
    """True if every sample is a run that begins and ends at a multiple of `alignment` elements.

    16 is what Triton's launches tell its compiler about integers.
    """
    sample_strides = [view[0] for view in layout.strides if view is not None]
    return not layout.sizes and not any(n % alignment for n in (layout.elements, *sample_strides))


@triton.jit
def locate(SAMPLES: tl.constexpr, TILE: tl.constexpr):
    """The sample of this program, and the first element in it.

    Samples are counted along the axis `SAMPLES` of the grid, their tiles along the other one of the
    first two axes. SAMPLES is None where there is one sample.
    """
    if SAMPLES is None:
        sample = tl.zeros((), tl.int64)
        first = tl.program_id(0).to(tl.int64) * TILE
    else:
        sample = tl.program_id(SAMPLES).to(tl.int64)
        first = tl.program_id(1 - SAMPLES).to(tl.int64) * TILE
    return sample, first


class Span(NamedTuple):
    """Some elements of a sample, inside a kernel."""

    sizes: Any
    sample: Any
    element: Any
    inside: Any
    """True for each element that exists."""


@triton.jit
def part(
    sizes,
    sample,
    first,
    count,
    i: tl.constexpr,
    keyed: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Part `i` of a tile; with vectors there is only one part.

    Without vectors there are QUAD parts, of one element per thread. Where noise is drawn, a thread
    has the elements of its quad; otherwise neighbouring threads have neighbouring elements.
    """
    if VECTOR > 1:
        lane = tl.arange(0, TILE)
    elif keyed:
        lane = tl.arange(0, TILE // _QUAD) * _QUAD + i
    else:
        lane = tl.arange(0, TILE // _QUAD) + i * (TILE // _QUAD)
    element = first + lane
    return Span(sizes, sample, element, element < count)


_QUAD = tl.constexpr(QUAD)


@triton.jit
def pointers(view, span, WIDE: tl.constexpr):
    at = view.data + span.sample * view.sample_stride
    if len(view.strides) == 0:
        at = at + span.element
    else:
        rest = span.element
        if not WIDE:
            rest = rest.to(tl.int32)
        offset = tl.zeros_like(rest)
        for d in tl.static_range(len(span.sizes) - 1, 0, -1):
            offset += rest % span.sizes[d] * view.strides[d]
            rest = rest // span.sizes[d]
        at = at + (offset + rest * view.strides[0])
    return at


@triton.jit
def read(view, span, WIDE: tl.constexpr):
    return tl.load(pointers(view, span, WIDE), mask=span.inside)


@triton.jit
def write(view, value, span, WIDE: tl.constexpr):
    tl.store(pointers(view, span, WIDE), narrowed(value, view), mask=span.inside)


@triton.jit
def narrowed(value, view):
    """The value in the view's dtype: from float64 by way of float32, as torch converts."""
    if view.data.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value.to(view.data.dtype.element_ty)


@triton.jit
def further(view, distance):
    """The same view, `distance` elements on."""
    return View(view.data + distance, view.sample_stride, view.strides)
