// The kernel of one instruction set: tiles are read into compute precision, updated, and written
// back.
//
// A contiguous tensor of the compute dtype is read and written in place; any other tensor goes
// through a tile in the L1 cache. So every dtype and layout runs the same arithmetic, and dtypes do
// not multiply the code.

#pragma once

#include "../dtypes.h"
#include "../fitting.h"
#include "../formula.h"
#include "../job.h"

namespace FASTDDIM_NAMESPACE {

namespace operand = fastddim::operand;
using fastddim::Dtype;
using fastddim::Job;
using fastddim::TILE;
using fastddim::View;

FASTDDIM_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V, class T>
FASTDDIM_FN V load(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
FASTDDIM_FN void store(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

#include "convert.h"
#include "noise.h"

template <class V, class T>
FASTDDIM_FN Row<V> broadcast(const Row<T>& row) {
  V like{};
  return {splat(like, row.cx), splat(like, row.cm), splat(like, row.r),  splat(like, row.k0),
          splat(like, row.kx), splat(like, row.km), splat(like, row.pn), splat(like, row.g),
          splat(like, row.ph), splat(like, row.e0), splat(like, row.ex), splat(like, row.em)};
}

template <class T>
FASTDDIM_FN Row<T> row_of(const Job& job, int64_t sample) {
  const int64_t row = job.row ? job.row[sample * job.row_stride] : 0;
  const T* at = (const T*)job.table + row * ROW_FIELDS;
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], at[11]};
}

// Pointers to the elements of one tile in compute precision; null where absent.
template <class T>
struct Tile {
  const T *x, *unconditional, *conditional, *noise, *history, *mask, *known;
  T *out, *x_0, *epsilon;
  bool stream;
};

// The parts of a tile besides a state, a model output and a result. They are known at compile time,
// which saves a check for every element.
enum Features { CLIP = 1, GUIDED = 2, NOISE = 4, X_0 = 8, REST = 16, ALL = 31 };

template <int FEATURES, class V, class T>
FASTDDIM_FN void update_at(const Row<V>& row, const Tile<T>& tile, int64_t i) {
  V x = load<V>(tile.x + i);
  V m = load<V>(tile.unconditional + i);
  constexpr bool rest = FEATURES & REST;
  if constexpr (FEATURES & GUIDED) {
    if (!rest || tile.conditional) m = guided(row, m, load<V>(tile.conditional + i));
  }
  V x_0 = unclipped_x_0(row, x, m);
  if constexpr (FEATURES & CLIP) x_0 = clipped(row, x_0);
  V x_prev = noiseless(row, x, m, x_0);
  if constexpr (rest) {
    if (tile.history) x_prev = fma(row.ph, load<V>(tile.history + i), x_prev);
    if (tile.epsilon) store(tile.epsilon + i, epsilon(row, x, m, x_0));
  }
  if constexpr (FEATURES & NOISE) {
    if (!rest || tile.noise) x_prev = fma(row.pn, load<V>(tile.noise + i), x_prev);
  }
  if constexpr (rest) {
    if (tile.mask) x_prev = blended(x_prev, load<V>(tile.mask + i), load<V>(tile.known + i));
  }
  constexpr bool with_x_0 = FEATURES & X_0;
#if FASTDDIM_LANES > 1
  if constexpr (sizeof(V) > sizeof(T)) {
    if (tile.stream) {
      if (with_x_0 && (!rest || tile.x_0)) stream(tile.x_0 + i, x_0);
      return stream(tile.out + i, x_prev);
    }
  }
#endif
  if (with_x_0 && (!rest || tile.x_0)) store(tile.x_0 + i, x_0);
  store(tile.out + i, x_prev);
}

template <int FEATURES, class T>
FASTDDIM_FN void update_run(const Row<T>& row, const Tile<T>& tile, int64_t count) {
  int64_t i = 0;
#if FASTDDIM_LANES > 1
  using V = typename VectorOf<T>::type;
  constexpr int64_t width = sizeof(V) / sizeof(T);
  const Row<V> rows = broadcast<V>(row);
#pragma GCC unroll 4
  for (; i + width <= count; i += width) update_at<FEATURES>(rows, tile, i);
#endif
  for (; i < count; ++i) update_at<FEATURES>(row, tile, i);
}

// A step without any optional part: the checks of update_at are decided at compile time.
template <bool STREAM, class T>
FASTDDIM_FN void minimal_run(const Row<T>& row, const Tile<T>& tile, int64_t count) {
  const Tile<T> minimal{tile.x, tile.unconditional, {}, {}, {}, {}, {}, tile.out, {}, {}, STREAM};
  update_run<0>(row, minimal, count);
}

template <class T>
FASTDDIM_FN bool is_minimal(const Row<T>& row, const Tile<T>& tile) {
  const bool clip = row.r < __builtin_inff();
  return !clip && !tile.conditional && !tile.history && !tile.mask && !tile.x_0 && !tile.epsilon;
}

template <class T>
FASTDDIM_FN void update_tile(const Row<T>& row, const Tile<T>& tile, int64_t count) {
  const int features = (tile.conditional ? GUIDED : 0) | (tile.noise ? NOISE : 0) |
                       (tile.x_0 ? X_0 : 0) |
                       (tile.history || tile.epsilon || tile.mask ? REST : 0);
  switch (features) {
    case 0:
      if (row.r < __builtin_inff()) return update_run<CLIP>(row, tile, count);
      return tile.stream ? minimal_run<true>(row, tile, count)
                         : minimal_run<false>(row, tile, count);
    case GUIDED:
      return update_run<CLIP | GUIDED>(row, tile, count);
    case NOISE:
      return update_run<CLIP | NOISE>(row, tile, count);
    case X_0:
      return update_run<CLIP | X_0>(row, tile, count);
    case X_0 | NOISE:
      return update_run<CLIP | X_0 | NOISE>(row, tile, count);
    case X_0 | GUIDED:
      return update_run<CLIP | X_0 | GUIDED>(row, tile, count);
    default:
      return update_run<ALL>(row, tile, count);
  }
}

#if FASTDDIM_LANES > 1
// A minimal step that takes each vector of noise when it is drawn: data arrive from memory
// meanwhile. `buffer` holds the noise of the elements after the last whole vector.
template <bool STREAM>
FASTDDIM_FN void drawing_run(const Job& job, const Span& span, const Row<float>& row,
                             const Tile<float>& tile, float* buffer) {
  const Row<Floats> rows = broadcast<Floats>(row);
  const auto take = [&](int64_t i, Floats z) __attribute__((always_inline)) {
    if (i + LANES > span.count) return store(buffer + i, z);
    Floats x = load<Floats>(tile.x + i), m = load<Floats>(tile.unconditional + i);
    Floats x_prev = fma(rows.pn, z, noiseless(rows, x, m, unclipped_x_0(rows, x, m)));
    STREAM ? stream(tile.out + i, x_prev) : store(tile.out + i, x_prev);
  };
  for_normals(key_of(job, span.sample), (uint32_t)(span.first / 4), span.count, take);
  Tile<float> rest = tile;
  rest.noise = buffer;
  for (int64_t i = span.count / LANES * LANES; i < span.count; ++i) update_at<NOISE>(row, rest, i);
}

FASTDDIM_FN bool update_drawing(const Job& job, const Span& span, const Row<float>& row,
                                const Tile<float>& tile, float* buffer) {
  if (!job.seed || job.channels || !is_minimal(row, tile)) return false;
  tile.stream ? drawing_run<true>(job, span, row, tile, buffer)
              : drawing_run<false>(job, span, row, tile, buffer);
  return true;
}
#endif

// Updates the tile with noise drawn on the way, if that is possible; returns false if it is not.
template <class T>
FASTDDIM_FN bool update_drawing(const Job&, const Span&, const Row<T>&, const Tile<T>&, T*) {
  return false;
}

template <class T>
void update_tiles(const Job& job, int64_t begin, int64_t end) {
  alignas(64) T buffers[operand::OF_UPDATE][TILE];
  const int64_t per_sample = job.tiles_per_sample();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / per_sample;
    const Span span{job, sample, index % per_sample * job.tile};
    const Row<T> row = row_of<T>(job, sample);
    Tile<T> tile;
    tile.x = input(span, operand::x, buffers);
    tile.unconditional = input(span, operand::unconditional, buffers);
    tile.conditional = input(span, operand::conditional, buffers);
    tile.history = input(span, operand::history, buffers);
    tile.mask = input(span, operand::mask, buffers);
    tile.known = input(span, operand::known, buffers);
    tile.out = output(span, operand::out, buffers);
    tile.x_0 = output(span, operand::x_0, buffers);
    tile.epsilon = output(span, operand::epsilon, buffers);
    tile.stream = job.streaming && tile.out != buffers[operand::out] &&
                  (uintptr_t)tile.out % 64 == 0 && tile.x_0 != buffers[operand::x_0] &&
                  (uintptr_t)tile.x_0 % 64 == 0;
    tile.noise = nullptr;
    if (row.pn == 0 || !update_drawing(job, span, row, tile, buffers[operand::noise])) {
      if (row.pn != 0) {
        tile.noise = job.seed ? draw(job, span, buffers[operand::noise])
                              : input(span, operand::noise, buffers);
      }
      update_tile(row, tile, span.count);
    }
    const View& out = job.views[operand::out];
    write(out, span, tile.out);
    write(job.views[operand::x_0], span, tile.x_0);
    write(job.views[operand::epsilon], span, tile.epsilon);
    for (int v = operand::model_input; v <= operand::second_input; ++v) {
      const View& next = job.views[v];
      if (next.data) write(next, span, rounded(out.dtype, span.count, tile.out));
    }
  }
}

// The gradient of the update, which is affine where the clip does not act.
template <class T>
void backward_tiles(const Job& job, int64_t begin, int64_t end) {
  alignas(64) T buffers[operand::COUNT][TILE];
  const int64_t per_sample = job.tiles_per_sample();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / per_sample;
    const Span span{job, sample, index % per_sample * job.tile};
    const Row<T> row = row_of<T>(job, sample);
    const T* x = input(span, operand::x, buffers);
    const T* unconditional = input(span, operand::unconditional, buffers);
    const T* conditional = input(span, operand::conditional, buffers);
    const T* mask = input(span, operand::mask, buffers);
    const T* grad_out = input(span, operand::grad_out, buffers);
    const T* grad_x_0 = input(span, operand::grad_x_0, buffers);
    T *grad_x = buffers[operand::grad_x], *grad_u = buffers[operand::grad_unconditional];
    T* grad_c = buffers[operand::grad_conditional];
    for (int64_t i = 0; i < span.count; ++i) {
      T m = unconditional[i];
      if (conditional) m = guided(row, m, conditional[i]);
      T x_0 = unclipped_x_0(row, x[i], m);
      bool inside = x_0 >= -row.r && x_0 <= row.r;
      T next = grad_out ? grad_out[i] : T(0);
      if (mask) next -= mask[i] * next;
      T to_x_0 = row.k0 * next + (grad_x_0 ? grad_x_0[i] : T(0));
      if (!inside) to_x_0 = T(0);
      T to_m = row.cm * to_x_0 + row.km * next;
      grad_x[i] = row.cx * to_x_0 + row.kx * next;
      grad_u[i] = conditional ? to_m - row.g * to_m : to_m;
      if (conditional) grad_c[i] = row.g * to_m;
    }
    write(job.views[operand::grad_x], span, grad_x);
    write(job.views[operand::grad_unconditional], span, grad_u);
    write(job.views[operand::grad_conditional], span, grad_c);
  }
}

// Standard normals into `out`, drawn in float32 for every dtype.
void normal(const Job& job, int64_t begin, int64_t end) {
  alignas(64) float buffer[TILE];
  const int64_t per_sample = job.tiles_per_sample();
  for (int64_t index = begin; index < end; ++index) {
    const Span span{job, index / per_sample, index % per_sample * job.tile};
    write(job.views[operand::out], span, draw(job, span, buffer));
  }
}

#include "fit.h"

void update(const Job& job, int64_t begin, int64_t end) {
  job.float64 ? update_tiles<double>(job, begin, end) : update_tiles<float>(job, begin, end);
#if FASTDDIM_LANES > 1
  if (job.streaming) finish_streams();
#endif
}

void fit(const Job& job, int64_t begin, int64_t end) {
  job.float64 ? fit_samples<double>(job, begin, end) : fit_samples<float>(job, begin, end);
}

void backward(const Job& job, int64_t begin, int64_t end) {
  job.float64 ? backward_tiles<double>(job, begin, end) : backward_tiles<float>(job, begin, end);
}

}  // namespace FASTDDIM_NAMESPACE
