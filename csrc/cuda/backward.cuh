// The gradient of the update: backward_tiles of csrc/cpu/kernel.h on a GPU, to the bit.

#pragma once

#include "../dtypes.h"
#include "../formula.h"
#include "../job.h"
#include "contiguous.cuh"
#include "grid.cuh"
#include "pack.cuh"
#include "rows.cuh"
#include "strided.cuh"

namespace FASTDDIM_NAMESPACE {

template <class C>
struct Gradients {
  C x, unconditional, conditional;
};

// The gradients of one element, whose guided model output is m; `next` is the gradient of x_prev
// without the mask.
template <class C>
FASTDDIM_FN Gradients<C> gradients(const Row<C>& row, C x, C m, C next, C of_x_0, bool guided) {
  const C x_0 = unclipped_x_0<C>(row, x, m);
  const bool inside = x_0 >= -row.r && x_0 <= row.r;
  const C to_x_0 = inside ? row.k0 * next + of_x_0 : C(0);
  const C to_m = row.cm * to_x_0 + row.km * next, to_conditional = row.g * to_m;
  return {row.cx * to_x_0 + row.kx * next, guided ? to_m - to_conditional : to_m, to_conditional};
}

// The tensors of a call, in the order of its `views`.
namespace slot {
enum Slot : int {
  x,
  unconditional,
  conditional,
  mask,
  grad_out,
  grad_x_0,
  grad_x,
  grad_unconditional,
  grad_conditional,
  COUNT
};
}  // namespace slot

constexpr int OPERANDS[slot::COUNT] = {
    operand::x,      operand::unconditional,      operand::conditional,
    operand::mask,   operand::grad_out,           operand::grad_x_0,
    operand::grad_x, operand::grad_unconditional, operand::grad_conditional,
};

struct BackwardCall {
  Grid grid;
  Rows rows;
  DenseView views[slot::COUNT];
};

template <class T, class C, int SIZE>
FASTDDIM_FN void load_if(const DenseView& view, const Grid& grid, const Chunk& chunk,
                         C (&values)[SIZE]) {
  if (view.data) widen(load<T, SIZE>(view, grid, chunk), values);
}

template <class T, class M, int SIZE>
__global__ void __launch_bounds__(BLOCK) backward(const __grid_constant__ BackwardCall call) {
  using C = typename Compute<T>::type;
  Chunk chunk;
  if (!chunk_of<SIZE>(call.grid, chunk)) return;
  const DenseView* const views = call.views;
  const bool guided_here = views[slot::conditional].data;
  C x[SIZE], m[SIZE], c[SIZE], mask[SIZE], next[SIZE] = {}, of_x_0[SIZE] = {};
  load_if<T>(views[slot::x], call.grid, chunk, x);
  load_if<M>(views[slot::unconditional], call.grid, chunk, m);
  load_if<M>(views[slot::conditional], call.grid, chunk, c);
  load_if<T>(views[slot::mask], call.grid, chunk, mask);
  load_if<T>(views[slot::grad_out], call.grid, chunk, next);
  load_if<T>(views[slot::grad_x_0], call.grid, chunk, of_x_0);
  const Row<C> row = row_of<C>(call.rows, chunk.sample);
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) {
    if (guided_here) m[i] = guided<C>(row, m[i], c[i]);
    if (views[slot::mask].data) next[i] -= mask[i] * next[i];
    const auto to = gradients<C>(row, x[i], m[i], next[i], of_x_0[i], guided_here);
    x[i] = to.x;
    m[i] = to.unconditional;
    c[i] = to.conditional;
  }
  store(views[slot::grad_x], call.grid, chunk, narrowed<T>(x));
  store(views[slot::grad_unconditional], call.grid, chunk, narrowed<M>(m));
  if (guided_here) store(views[slot::grad_conditional], call.grid, chunk, narrowed<M>(c));
}

struct StridedBackwardCall {
  Grid grid;
  Rows rows;
  Shape shape;
  StridedView views[slot::COUNT];
};

template <class C>
__global__ void __launch_bounds__(BLOCK)
    backward_strided(const __grid_constant__ StridedBackwardCall call) {
  Chunk chunk;
  if (!chunk_of<1>(call.grid, chunk)) return;
  const Row<C> row = row_of<C>(call.rows, chunk.sample);
  const StridedView* views[slot::COUNT];
  FASTDDIM_UNROLL
  for (int v = 0; v < slot::COUNT; ++v) views[v] = &call.views[v];
  int64_t at[slot::COUNT];
  offsets_of(call.shape, views, chunk.sample, chunk.element, at);
  const auto value = [&](slot::Slot v) {
    return call.views[v].data ? read<C>(call.views[v], at[v]) : C(0);
  };
  const bool guided_here = call.views[slot::conditional].data;
  const C x = value(slot::x);
  C m = value(slot::unconditional), next = value(slot::grad_out);
  if (guided_here) m = guided<C>(row, m, value(slot::conditional));
  if (call.views[slot::mask].data) next -= value(slot::mask) * next;
  const auto to = gradients<C>(row, x, m, next, value(slot::grad_x_0), guided_here);
  write(call.views[slot::grad_x], at[slot::grad_x], to.x);
  write(call.views[slot::grad_unconditional], at[slot::grad_unconditional], to.unconditional);
  if (guided_here) {
    write(call.views[slot::grad_conditional], at[slot::grad_conditional], to.conditional);
  }
}

template <class T, class M>
int backward_contiguous(const Job& job, void* stream) {
  constexpr int SIZE = SIZE_OF_CHUNK<T>;
  Collector collector(job);
  BackwardCall call;
  for (int v = 0; v < slot::COUNT; ++v) {
    const View& view = job.views[OPERANDS[v]];
    const bool of_model = v == slot::unconditional || v == slot::conditional ||
                          v == slot::grad_unconditional || v == slot::grad_conditional;
    call.views[v] = of_model ? collector.template of<M>(view) : collector.template of<T>(view);
  }
  if (!collector.fits()) return NOT_CONTIGUOUS;
  Extent extent;
  if (!make_grid(call.grid, extent, job.batch, job.count, SIZE)) {
    return cudaErrorInvalidConfiguration;
  }
  if (collector.aligned(ALIGNMENT<T, SIZE>)) call.grid.wide = (uint32_t)(job.count / SIZE);
  call.rows = rows_of(job);
  FASTDDIM_LAUNCH((backward<T, M, SIZE>), extent, stream, call);
  return cudaGetLastError();
}

template <class C>
int backward_strided(const Job& job, void* stream) {
  StridedBackwardCall call{};
  Extent extent;
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, extent, job.batch, job.count, 1)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  call.shape = shape_of(job);
  for (int v = 0; v < slot::COUNT; ++v) {
    call.views[v] = strided_view(job, job.views[OPERANDS[v]]);
  }
  FASTDDIM_LAUNCH(backward_strided<C>, extent, stream, call);
  return cudaGetLastError();
}

int backward_of_update(const Job& job, void* stream) {
  const int code = for_dtypes(job, [&](auto state, auto model) {
    return backward_contiguous<decltype(state), decltype(model)>(job, stream);
  });
  if (code != NOT_CONTIGUOUS) return code;
  return job.float64 ? backward_strided<double>(job, stream) : backward_strided<float>(job, stream);
}

}  // namespace FASTDDIM_NAMESPACE
