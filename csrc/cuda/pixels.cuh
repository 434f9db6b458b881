// The update of tensors of any dtype except float64 whose samples are pixels of a few channels.
// Each tensor is interleaved (channels_last), or has one plane after the other. With one channel it
// is the update of contiguous tensors in other dtypes than those of contiguous.cuh.
//
// A thread takes all channels of some neighbouring pixels. So tensors of either order are moved in
// words, and noise is drawn in whole quads, which are keyed plane by plane.

#pragma once

#include "../dtypes.h"
#include "../formula.h"
#include "../job.h"
#include "grid.cuh"
#include "pack.cuh"
#include "rows.cuh"

namespace FASTDDIM_NAMESPACE {

namespace operand = fastddim::operand;
using fastddim::Dtype;
using fastddim::Job;
using fastddim::View;

// Pixels of a thread: those of a quad, or of a 16-byte word of halves where channels are few.
template <int CHANNELS>
constexpr int PIXELS = CHANNELS == 1 ? 8 : 4;

template <int CHANNELS>
constexpr int SIZE_OF_PIXELS = PIXELS<CHANNELS> * CHANNELS;

// Elements in registers are interleaved.
template <int CHANNELS>
using Pixels = float[SIZE_OF_PIXELS<CHANNELS>];

struct PixelView {
  void* data;  // null where the tensor is absent
  int64_t sample_stride;
  Dtype dtype;
  uint32_t pixel_stride;  // 1 where a plane follows the other; else of interleaved channels
};

struct PixelCall {
  Grid grid;  // of pixels
  Rows rows;
  PixelView views[operand::OF_UPDATE];
};

// The address of a thread's first element, by its index in the sample.
template <class S>
FASTDDIM_FN S* element_of(const PixelView& view, const Chunk& chunk, int64_t element) {
  return (S*)view.data + (chunk.sample * (uint64_t)view.sample_stride + element);
}

// The words that a run of neighbours is moved in: of 16 bytes, or of 8 where there is half a word.
template <class S, int SIZE>
using WordOf = typename Word<SIZE * sizeof(S) % 16 ? 8 : 16>::type;

template <class S, int SIZE>
FASTDDIM_FN void load_run(const S* from, float (&values)[SIZE]) {
  using W = WordOf<S, SIZE>;
  Pack<S, SIZE> pack;
  FASTDDIM_UNROLL
  for (int i = 0; i < Pack<S, SIZE>::BYTES / (int)sizeof(W); ++i) {
    const W word = load_word((const W*)from + i);
    __builtin_memcpy((char*)pack.words + i * sizeof word, &word, sizeof word);
  }
  widen(pack, values);
}

template <class S, int SIZE>
FASTDDIM_FN void store_run(S* to, const float (&values)[SIZE]) {
  using W = WordOf<S, SIZE>;
  const Pack<S, SIZE> pack = narrowed<S>(values);
  FASTDDIM_UNROLL
  for (int i = 0; i < Pack<S, SIZE>::BYTES / (int)sizeof(W); ++i) {
    W word;
    __builtin_memcpy(&word, (const char*)pack.words + i * sizeof word, sizeof word);
    store_word((W*)to + i, word);
  }
}

// `WIDER`: pixels may have more channels than are read, as where the variance is learned.
template <class S, int CHANNELS, bool WIDER>
FASTDDIM_FN void load_as(const PixelView& view, const Grid& grid, const Chunk& chunk,
                         Pixels<CHANNELS>& values) {
  const int64_t pixel = chunk.index * (int64_t)PIXELS<CHANNELS>;
  if (view.pixel_stride == CHANNELS) {
    load_run(element_of<S>(view, chunk, pixel * CHANNELS), values);
  } else if (CHANNELS > 1 && (!WIDER || view.pixel_stride == 1)) {
    FASTDDIM_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      float plane[PIXELS<CHANNELS>];
      load_run(element_of<S>(view, chunk, c * grid.count + pixel), plane);
      FASTDDIM_UNROLL
      for (int p = 0; p < PIXELS<CHANNELS>; ++p) values[p * CHANNELS + c] = plane[p];
    }
  } else if (WIDER) {
    const S* from = element_of<S>(view, chunk, pixel * view.pixel_stride);
    FASTDDIM_UNROLL
    for (int p = 0; p < PIXELS<CHANNELS>; ++p) {
      FASTDDIM_UNROLL
      for (int c = 0; c < CHANNELS; ++c) values[p * CHANNELS + c] = widened(from[c]);
      from += view.pixel_stride;
    }
  }
}

template <int CHANNELS, bool WIDER = false>
FASTDDIM_FN void load(const PixelView& view, const Grid& grid, const Chunk& chunk,
                      Pixels<CHANNELS>& values) {
  switch (view.dtype) {
    case Dtype::float32:
      return load_as<float, CHANNELS, WIDER>(view, grid, chunk, values);
    case Dtype::float16:
      return load_as<Half, CHANNELS, WIDER>(view, grid, chunk, values);
    default:
      return load_as<BFloat16, CHANNELS, WIDER>(view, grid, chunk, values);
  }
}

template <class S, int CHANNELS>
FASTDDIM_FN void store_as(const PixelView& view, const Grid& grid, const Chunk& chunk,
                          const Pixels<CHANNELS>& values) {
  const int64_t pixel = chunk.index * (int64_t)PIXELS<CHANNELS>;
  if (view.pixel_stride == CHANNELS) {
    store_run(element_of<S>(view, chunk, pixel * CHANNELS), values);
    return;
  }
  FASTDDIM_UNROLL
  for (int c = 0; c < CHANNELS; ++c) {
    float plane[PIXELS<CHANNELS>];
    FASTDDIM_UNROLL
    for (int p = 0; p < PIXELS<CHANNELS>; ++p) plane[p] = values[p * CHANNELS + c];
    store_run(element_of<S>(view, chunk, c * grid.count + pixel), plane);
  }
}

template <int CHANNELS>
FASTDDIM_FN void store(const PixelView& view, const Grid& grid, const Chunk& chunk,
                       const Pixels<CHANNELS>& values) {
  switch (view.dtype) {
    case Dtype::float32:
      return store_as<float, CHANNELS>(view, grid, chunk, values);
    case Dtype::float16:
      return store_as<Half, CHANNELS>(view, grid, chunk, values);
    default:
      return store_as<BFloat16, CHANNELS>(view, grid, chunk, values);
  }
}

// The values after a round trip through `dtype`.
template <int SIZE>
FASTDDIM_FN void round_to(Dtype dtype, float (&values)[SIZE]) {
  if (dtype == Dtype::float16) widen(narrowed<Half>(values), values);
  if (dtype == Dtype::bfloat16) widen(narrowed<BFloat16>(values), values);
}

template <int CHANNELS>
FASTDDIM_FN void add_normals(float scale, const Key& key, const Grid& grid, const Chunk& chunk,
                             Pixels<CHANNELS>& sum) {
  constexpr int QUADS = PIXELS<CHANNELS> / 4;
  FASTDDIM_UNROLL
  for (int quad = 0; quad < QUADS; ++quad) {
    uint32_t words[CHANNELS][4];
    philox(key, chunk.index * QUADS + quad, words, (uint32_t)(grid.count / 4));
    FASTDDIM_UNROLL
    for (int c = 0; c < CHANNELS; ++c) {
      float z[4];
      normals_of_words(words[c], z);
      FASTDDIM_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& element = sum[(4 * quad + i) * CHANNELS + c];
        element = fma(scale, z[i], element);
      }
    }
  }
}

template <int CHANNELS, bool KEYED>
__global__ void __launch_bounds__(BLOCK, 2) update_pixels(const __grid_constant__ PixelCall call) {
  constexpr int SIZE = SIZE_OF_PIXELS<CHANNELS>;
  Chunk chunk;
  if (!chunk_of<PIXELS<CHANNELS>>(call.grid, chunk)) return;
  const auto& views = call.views;
  Pixels<CHANNELS> x, m, x_prev;
  load<CHANNELS>(views[operand::x], call.grid, chunk, x);
  load<CHANNELS, true>(views[operand::unconditional], call.grid, chunk, m);
  const Row<float> row = row_in_words<float>(call.rows, chunk.sample);
  if (views[operand::conditional].data) {
    Pixels<CHANNELS> conditional;
    load<CHANNELS, true>(views[operand::conditional], call.grid, chunk, conditional);
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) m[i] = guided(row, m[i], conditional[i]);
  }
  const auto x_0_at = [&](int i) { return clipped(row, unclipped_x_0(row, x[i], m[i])); };
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) x_prev[i] = noiseless(row, x[i], m[i], x_0_at(i));
  if (views[operand::x_0].data) {
    Pixels<CHANNELS> x_0;
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) x_0[i] = x_0_at(i);
    store<CHANNELS>(views[operand::x_0], call.grid, chunk, x_0);
  }
  if (views[operand::history].data) {
    Pixels<CHANNELS> history;
    load<CHANNELS>(views[operand::history], call.grid, chunk, history);
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) x_prev[i] = fma(row.ph, history[i], x_prev[i]);
  }
  if (views[operand::epsilon].data) {
    Pixels<CHANNELS> eps;
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) eps[i] = epsilon(row, x[i], m[i], x_0_at(i));
    store<CHANNELS>(views[operand::epsilon], call.grid, chunk, eps);
  }
  if constexpr (KEYED) {
    if (row.pn != 0)
      add_normals<CHANNELS>(row.pn, key_of(call.rows, chunk.sample), call.grid, chunk, x_prev);
  } else if (views[operand::noise].data && row.pn != 0) {
    Pixels<CHANNELS> noise;
    load<CHANNELS>(views[operand::noise], call.grid, chunk, noise);
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) x_prev[i] = fma(row.pn, noise[i], x_prev[i]);
  }
  if (views[operand::mask].data) {
    Pixels<CHANNELS> mask, known;
    load<CHANNELS>(views[operand::mask], call.grid, chunk, mask);
    load<CHANNELS>(views[operand::known], call.grid, chunk, known);
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) x_prev[i] = blended(x_prev[i], mask[i], known[i]);
  }
  store<CHANNELS>(views[operand::out], call.grid, chunk, x_prev);
  if (views[operand::model_input].data) {
    round_to(views[operand::out].dtype, x_prev);
    store<CHANNELS>(views[operand::model_input], call.grid, chunk, x_prev);
    if (views[operand::second_input].data)
      store<CHANNELS>(views[operand::second_input], call.grid, chunk, x_prev);
  }
}

constexpr int NO_PIXELS = -1;

// A tensor as pixels of a job; false where it does not consist of pixels, or cannot be moved in
// words.
template <int CHANNELS>
bool pixel_view(const Job& job, int v, int channel_dim, int64_t pixels, PixelView& found) {
  const View& view = job.views[v];
  found = {};
  if (!view.data) return true;
  const int64_t pixel_stride = view.strides[CHANNELS > 1 ? 1 - channel_dim : 0];
  const int64_t channel_stride = CHANNELS > 1 ? view.strides[channel_dim] : 1;
  const bool wider = (v == operand::unconditional || v == operand::conditional) &&
                     pixel_stride > CHANNELS && pixel_stride <= INT_MAX;
  const bool planes = pixel_stride == 1 && (CHANNELS == 1 || channel_stride == pixels);
  const bool interleaved = channel_stride == 1 && (pixel_stride == CHANNELS || wider);
  if (view.dtype == Dtype::float64 || !(planes || interleaved)) return false;
  const int64_t size = view.dtype == Dtype::float32 ? 4 : 2;
  const int64_t run = PIXELS<CHANNELS> * (planes ? 1 : CHANNELS) * size;
  const int64_t word = wider ? size : run % 16 ? 8 : 16;
  if ((uintptr_t)view.data % word) return false;
  if (job.batch > 1 && view.sample_stride * size % word) return false;
  found = {view.data, view.sample_stride, view.dtype, (uint32_t)pixel_stride};
  return true;
}

template <int CHANNELS>
int launch_pixels(const Job& job, int channel_dim, void* stream) {
  PixelCall call{};
  const int64_t pixels = job.count / CHANNELS;
  if (pixels % PIXELS<CHANNELS> || (uintptr_t)job.table % sizeof(uint4)) return NO_PIXELS;
  for (int v = 0; v < operand::OF_UPDATE; ++v) {
    if (!pixel_view<CHANNELS>(job, v, channel_dim, pixels, call.views[v])) return NO_PIXELS;
  }
  Extent extent;
  if (!make_grid(call.grid, extent, job.batch, pixels, PIXELS<CHANNELS>)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  if (job.seed) {
    FASTDDIM_LAUNCH((update_pixels<CHANNELS, true>), extent, stream, call);
  } else {
    FASTDDIM_LAUNCH((update_pixels<CHANNELS, false>), extent, stream, call);
  }
  return cudaGetLastError();
}

// The kernel for pixels, if the tensors fit it. Noise is keyed plane by plane, so channels come
// first where it is drawn.
int update_pixels(const Job& job, void* stream) {
  if (job.float64) return NO_PIXELS;
  if (job.ndim == 1) return launch_pixels<1>(job, 0, stream);
  for (int d = 0; job.ndim == 2 && d < (job.seed ? 1 : 2); ++d) {
    int code = NO_PIXELS;
    if (job.sizes[d] == 3) code = launch_pixels<3>(job, d, stream);
    if (job.sizes[d] == 4) code = launch_pixels<4>(job, d, stream);
    if (code != NO_PIXELS) return code;
  }
  return NO_PIXELS;
}

}  // namespace FASTDDIM_NAMESPACE
