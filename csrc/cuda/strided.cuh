// Kernels for tensors of any dtype and strides, which go element by element: the update, and the
// noise alone.

#pragma once

#include "../dtypes.h"
#include "../formula.h"
#include "../job.h"
#include "grid.cuh"
#include "rows.cuh"

namespace FASTDDIM_NAMESPACE {

namespace operand = fastddim::operand;
using fastddim::Dtype;
using fastddim::Job;
using fastddim::View;

// Dimensions of a sample after merging neighbours; the strides of all tensors must fit into the
// kernel's parameters.
constexpr int STRIDED_DIMS = 12;

// A tensor of any dtype and strides.
struct StridedView {
  void* data;
  Dtype dtype;
  int64_t sample_stride;
  int64_t strides[STRIDED_DIMS];
};

template <class C>
FASTDDIM_FN C read(const StridedView& view, int64_t offset) {
  switch (view.dtype) {
    case Dtype::float32:
      return (C)((const float*)view.data)[offset];
    case Dtype::float64:
      return (C)((const double*)view.data)[offset];
    case Dtype::float16:
      return (C)widened(((const Half*)view.data)[offset]);
    default:
      return (C)widened(((const BFloat16*)view.data)[offset]);
  }
}

template <class C>
FASTDDIM_FN void write(const StridedView& view, int64_t offset, C value) {
  switch (view.dtype) {
    case Dtype::float32:
      return narrow(value, ((float*)view.data)[offset]);
    case Dtype::float64:
      return narrow(value, ((double*)view.data)[offset]);
    case Dtype::float16:
      return narrow(value, ((Half*)view.data)[offset]);
    default:
      return narrow(value, ((BFloat16*)view.data)[offset]);
  }
}

// `value` after a round trip through `dtype`.
FASTDDIM_FN float stored_as(Dtype dtype, float value) {
  Half half;
  BFloat16 bfloat16;
  if (dtype == Dtype::float16) narrow(value, half), value = widened(half);
  if (dtype == Dtype::bfloat16) narrow(value, bfloat16), value = widened(bfloat16);
  return value;
}
FASTDDIM_FN double stored_as(Dtype, double value) { return value; }

struct Shape {
  int ndim;
  int64_t sizes[STRIDED_DIMS];
};

struct StridedCall {
  Grid grid;
  Rows rows;
  Shape shape;
  StridedView views[operand::OF_UPDATE];
};

// The offset of an element in each tensor, by coordinates that are worked out once.
template <int COUNT>
FASTDDIM_FN void offsets_of(const Shape& shape, const StridedView* const (&views)[COUNT],
                            int64_t sample, int64_t element, int64_t (&offsets)[COUNT]) {
  FASTDDIM_UNROLL
  for (int v = 0; v < COUNT; ++v) offsets[v] = sample * views[v]->sample_stride;
  FASTDDIM_NO_UNROLL
  for (int d = shape.ndim - 1; d >= 0; --d) {
    const int64_t rest = element / shape.sizes[d], index = element - rest * shape.sizes[d];
    element = rest;
    FASTDDIM_UNROLL
    for (int v = 0; v < COUNT; ++v) offsets[v] += index * views[v]->strides[d];
  }
}

template <class C, bool KEYED>
__global__ void __launch_bounds__(BLOCK, 2)
    update_strided(const __grid_constant__ StridedCall call) {
  Chunk chunk;
  if (!chunk_of<4>(call.grid, chunk)) return;
  const Row<C> row = row_of<C>(call.rows, chunk.sample);
  float z[4] = {};
  if constexpr (KEYED) {
    if (row.pn != 0) {
      normals_of_quad(key_of(call.rows, chunk.sample), chunk.index, z);
    }
  }
  const StridedView* views[operand::OF_UPDATE];
  FASTDDIM_UNROLL
  for (int v = 0; v < operand::OF_UPDATE; ++v) views[v] = &call.views[v];
  const int count = elements_of<4>(call.grid, chunk);
  FASTDDIM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    int64_t at[operand::OF_UPDATE];
    offsets_of(call.shape, views, chunk.sample, chunk.element + i, at);
    const C x = read<C>(call.views[operand::x], at[operand::x]);
    C m = read<C>(call.views[operand::unconditional], at[operand::unconditional]);
    if (call.views[operand::conditional].data)
      m = guided(row, m, read<C>(call.views[operand::conditional], at[operand::conditional]));
    const C x_0 = clipped(row, unclipped_x_0(row, x, m));
    C x_prev = noiseless(row, x, m, x_0);
    if (call.views[operand::history].data)
      x_prev = fma(row.ph, read<C>(call.views[operand::history], at[operand::history]), x_prev);
    if (call.views[operand::epsilon].data)
      write(call.views[operand::epsilon], at[operand::epsilon], epsilon(row, x, m, x_0));
    if (row.pn != 0) {
      if (KEYED) {
        x_prev = fma(row.pn, (C)z[i], x_prev);
      } else if (call.views[operand::noise].data) {
        x_prev = fma(row.pn, read<C>(call.views[operand::noise], at[operand::noise]), x_prev);
      }
    }
    if (call.views[operand::mask].data) {
      x_prev = blended(x_prev, read<C>(call.views[operand::mask], at[operand::mask]),
                       read<C>(call.views[operand::known], at[operand::known]));
    }
    write(call.views[operand::out], at[operand::out], x_prev);
    if (call.views[operand::x_0].data) write(call.views[operand::x_0], at[operand::x_0], x_0);
    const C state = stored_as(call.views[operand::out].dtype, x_prev);
    if (call.views[operand::model_input].data)
      write(call.views[operand::model_input], at[operand::model_input], state);
    if (call.views[operand::second_input].data)
      write(call.views[operand::second_input], at[operand::second_input], state);
  }
}

struct NormalCall {
  Grid grid;
  Rows rows;
  Shape shape;
  StridedView views[1];  // the result
};

__global__ void __launch_bounds__(BLOCK) normal(const __grid_constant__ NormalCall call) {
  Chunk chunk;
  if (!chunk_of<4>(call.grid, chunk)) return;
  float z[4];
  normals_of_quad(key_of(call.rows, chunk.sample), chunk.index, z);
  const StridedView* const views[] = {&call.views[0]};
  const int count = elements_of<4>(call.grid, chunk);
  FASTDDIM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
    int64_t at[1];
    offsets_of(call.shape, views, chunk.sample, chunk.element + i, at);
    write(call.views[0], at[0], z[i]);
  }
}

StridedView strided_view(const Job& job, const View& view) {
  StridedView strided{view.data, view.dtype, view.sample_stride, {}};
  for (int d = 0; d < job.ndim && view.data; ++d) strided.strides[d] = view.strides[d];
  return strided;
}

Shape shape_of(const Job& job) {
  Shape shape{job.ndim, {}};
  for (int d = 0; d < job.ndim; ++d) shape.sizes[d] = job.sizes[d];
  return shape;
}

template <class C>
int update_strided(const Job& job, void* stream) {
  StridedCall call{};
  Extent extent;
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, extent, job.batch, job.count, 4)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  call.shape = shape_of(job);
  for (int v = 0; v < operand::OF_UPDATE; ++v) call.views[v] = strided_view(job, job.views[v]);
  if (job.seed) {
    FASTDDIM_LAUNCH((update_strided<C, true>), extent, stream, call);
  } else {
    FASTDDIM_LAUNCH((update_strided<C, false>), extent, stream, call);
  }
  return cudaGetLastError();
}

int launch_normal(const Job& job, void* stream) {
  NormalCall call{};
  Extent extent;
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, extent, job.batch, job.count, 4)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  call.shape = shape_of(job);
  call.views[0] = strided_view(job, job.views[operand::out]);
  FASTDDIM_LAUNCH(normal, extent, stream, call);
  return cudaGetLastError();
}

}  // namespace FASTDDIM_NAMESPACE
