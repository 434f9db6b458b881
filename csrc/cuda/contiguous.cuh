// The update of tensors that are contiguous within a sample and have the dtypes of an ordinary
// step.

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

// A long chunk, of two words, for noise of halves: the more quads a thread draws, the more of their
// arithmetic they share. All chunks are moved in words then. Below this number of elements, long
// chunks would leave multiprocessors without work.
template <class T>
constexpr int LONG_CHUNK = 2 * SIZE_OF_CHUNK<T>;
constexpr int64_t LONG_FROM = (int64_t)1 << 21;

struct Call {
  Grid grid;
  Rows rows;
  DenseView views[operand::OF_UPDATE];
};

// `plain` has the tensors of every step, and the next model input; `guided` reads two model outputs
// and writes two inputs; `any` has all tensors. Fewer tensors need fewer registers, and so more
// threads wait for memory at once.
enum class Kind { plain, guided, any };

// Blocks that fit into a multiprocessor by its number of threads.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int FULL = 1536 / BLOCK;
#else
constexpr int FULL = 2048 / BLOCK;
#endif

// The part of these blocks that the registers must leave room for: all blocks without noise; three
// quarters with noise, or where two outputs of eight elements are read; half with long chunks.
template <class T, Kind KIND, bool KEYED, int SIZE>
constexpr int RESIDENT = sizeof(T) == 8                           ? 3
                         : KIND == Kind::any                      ? FULL / 2
                         : SIZE > SIZE_OF_CHUNK<T>                ? FULL / 2
                         : KEYED                                  ? FULL * 3 / 4
                         : sizeof(T) == 2 && KIND == Kind::guided ? FULL * 3 / 4
                                                                  : FULL;

template <class C, class S, int SIZE>
FASTDDIM_FN void add_scaled(C scale, const Pack<S, SIZE>& pack, C (&sum)[SIZE]) {
  C values[SIZE];
  widen(pack, values);
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) sum[i] = fma(scale, values[i], sum[i]);
}

template <class C, int SIZE>
FASTDDIM_FN void add_normals(C scale, const Key& key, const Chunk& chunk, C (&sum)[SIZE]) {
  constexpr int QUADS = SIZE / 4;
  uint32_t words[QUADS][4];
  philox(key, chunk.index * QUADS, words);
  FASTDDIM_UNROLL
  for (int quad = 0; quad < QUADS; ++quad) {
    float z[4];
    normals_of_words(words[quad], z);
    FASTDDIM_UNROLL
    for (int i = 0; i < 4; ++i) sum[4 * quad + i] = fma(scale, (C)z[i], sum[4 * quad + i]);
  }
}

// State of type T, model output of type M.
template <class T, class M, Kind KIND, bool KEYED, int SIZE>
__global__ void __launch_bounds__(BLOCK, (RESIDENT<T, KIND, KEYED, SIZE>)) update(const Call call) {
  using C = typename Compute<T>::type;
  constexpr bool GUIDED = KIND != Kind::plain, ANY = KIND == Kind::any;
  Chunk chunk;
  if (!chunk_of<SIZE>(call.grid, chunk)) return;
  if constexpr (!ANY) chunk.wide = true;
  const bool guided_here = GUIDED && call.views[operand::conditional].data;
  Row<C> row;
  Pack<T, SIZE> x;
  Pack<M, SIZE> u, c{};
  if (chunk.wide) {
    x = load_words<T, SIZE>(call.views[operand::x], chunk);
    u = load_words<M, SIZE>(call.views[operand::unconditional], chunk);
    if (guided_here) c = load_words<M, SIZE>(call.views[operand::conditional], chunk);
    row = row_in_words<C>(call.rows, chunk.sample);
  } else {
    const int count = elements_of<SIZE>(call.grid, chunk);
    x = load_elements<T, SIZE>(call.views[operand::x], chunk, count);
    u = load_elements<M, SIZE>(call.views[operand::unconditional], chunk, count);
    if (guided_here) c = load_elements<M, SIZE>(call.views[operand::conditional], chunk, count);
    row = row_of<C>(call.rows, chunk.sample);
  }

  C state[SIZE], m[SIZE], x_prev[SIZE], x_0[SIZE], eps[SIZE];
  widen(x, state);
  widen(u, m);
  if (guided_here) {
    C conditional[SIZE];
    widen(c, conditional);
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) m[i] = guided<C>(row, m[i], conditional[i]);
  }
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) {
    const C predicted = clipped(row, unclipped_x_0<C>(row, state[i], m[i]));
    x_prev[i] = noiseless<C>(row, state[i], m[i], predicted);
    if constexpr (ANY) {
      x_0[i] = predicted;
      eps[i] = epsilon<C>(row, state[i], m[i], predicted);
    }
  }
  if constexpr (ANY) {
    if (call.views[operand::x_0].data)
      store(call.views[operand::x_0], call.grid, chunk, narrowed<T>(x_0));
    if (call.views[operand::history].data) {
      add_scaled(row.ph, load<M, SIZE>(call.views[operand::history], call.grid, chunk), x_prev);
    }
    if (call.views[operand::epsilon].data)
      store(call.views[operand::epsilon], call.grid, chunk, narrowed<M>(eps));
  }
  if constexpr (KEYED) {
    if (row.pn != 0) add_normals(row.pn, key_of(call.rows, chunk.sample), chunk, x_prev);
  } else if constexpr (ANY) {
    if (call.views[operand::noise].data && row.pn != 0) {
      add_scaled(row.pn, load<T, SIZE>(call.views[operand::noise], call.grid, chunk), x_prev);
    }
  }
  if constexpr (ANY) {
    if (call.views[operand::mask].data) {
      C mask[SIZE], known[SIZE];
      widen(load<T, SIZE>(call.views[operand::mask], call.grid, chunk), mask);
      widen(load<T, SIZE>(call.views[operand::known], call.grid, chunk), known);
      FASTDDIM_UNROLL
      for (int i = 0; i < SIZE; ++i) x_prev[i] = blended<C>(x_prev[i], mask[i], known[i]);
    }
  }

  const auto out = narrowed<T>(x_prev);
  store(call.views[operand::out], call.grid, chunk, out);
  if (call.views[operand::model_input].data) {
    const auto input = converted<M>(out);
    store(call.views[operand::model_input], call.grid, chunk, input);
    if (GUIDED && call.views[operand::second_input].data) {
      store(call.views[operand::second_input], call.grid, chunk, input);
    }
  }
}

template <class T>
constexpr Dtype DTYPE = Dtype::float32;
template <>
constexpr Dtype DTYPE<double> = Dtype::float64;
template <>
constexpr Dtype DTYPE<Half> = Dtype::float16;
template <>
constexpr Dtype DTYPE<BFloat16> = Dtype::bfloat16;

// True for a tensor with the dtype of the model output, false for one with that of the state.
constexpr bool is_of_model(int v) {
  return v == operand::unconditional || v == operand::conditional || v == operand::history ||
         v == operand::epsilon || v == operand::model_input || v == operand::second_input;
}

// Collects the tensors of a call and the properties that they share.
class Collector {
 public:
  // A table need not be aligned to more than its own words.
  explicit Collector(const Job& job)
      : places_((uintptr_t)job.table % sizeof(uint4)), single_(job.batch == 1) {}

  template <class T>
  DenseView of(const View& view) {
    if (!view.data) return {};
    const uint64_t stride = single_ ? 0 : view.sample_stride * (uint64_t)sizeof(T);
    fits_ &= view.contiguous && view.dtype == DTYPE<T> && stride <= UINT32_MAX;
    places_ |= (uintptr_t)view.data | stride;
    return {view.data, (uint32_t)stride};
  }

  bool fits() const { return fits_; }

  // Whether every sample of every tensor is.
  bool aligned(int bytes) const { return places_ % bytes == 0; }

 private:
  uint64_t places_;
  bool single_, fits_ = true;
};

template <class T, class M, Kind KIND, bool KEYED, int SIZE>
int launch_update(const Job& job, Call& call, bool aligned, void* stream) {
  Extent extent;
  if (!make_grid(call.grid, extent, job.batch, job.count, SIZE)) {
    return cudaErrorInvalidConfiguration;
  }
  if (aligned) call.grid.wide = (uint32_t)(job.count / SIZE);
  FASTDDIM_LAUNCH((update<T, M, KIND, KEYED, SIZE>), extent, stream, call);
  return cudaGetLastError();
}

// One kernel serves chunks that may not be words, and tensors that few steps have.
template <class T, class M, bool KEYED>
int launch_kind(const Job& job, Call& call, const Collector& collector, void* stream) {
  constexpr int SIZE = SIZE_OF_CHUNK<T>, LONG = LONG_CHUNK<T>;
  const bool aligned = collector.aligned(ALIGNMENT<T, SIZE>);
  if (!aligned || job.count % SIZE || job.views[operand::noise].data ||
      job.views[operand::history].data || job.views[operand::mask].data ||
      job.views[operand::x_0].data || job.views[operand::epsilon].data) {
    return launch_update<T, M, Kind::any, KEYED, SIZE>(job, call, aligned, stream);
  }
  if (job.views[operand::conditional].data || job.views[operand::second_input].data) {
    return launch_update<T, M, Kind::guided, KEYED, SIZE>(job, call, true, stream);
  }
  if constexpr (KEYED && sizeof(T) == 2) {
    if (collector.aligned(ALIGNMENT<T, LONG>) && job.count % LONG == 0 &&
        job.batch * job.count >= LONG_FROM) {
      return launch_update<T, M, Kind::plain, KEYED, LONG>(job, call, true, stream);
    }
  }
  return launch_update<T, M, Kind::plain, KEYED, SIZE>(job, call, true, stream);
}

constexpr int NOT_CONTIGUOUS = -1;

// The kernel for a state of type T and a model output of type M, if the tensors fit it.
template <class T, class M>
int update_contiguous(const Job& job, void* stream) {
  Collector collector(job);
  Call call;
  for (int v = 0; v < operand::OF_UPDATE; ++v) {
    const View& view = job.views[v];
    call.views[v] = is_of_model(v) ? collector.of<M>(view) : collector.of<T>(view);
  }
  if (!collector.fits()) return NOT_CONTIGUOUS;
  call.rows = rows_of(job);
  return job.seed ? launch_kind<T, M, true>(job, call, collector, stream)
                  : launch_kind<T, M, false>(job, call, collector, stream);
}

// `launch`, called with a value of the type of the state and one of that of the model output, where
// kernels are made for them.
template <class Launch>
int for_dtypes(const Job& job, Launch launch) {
  const Dtype state = job.views[operand::x].dtype, model = job.views[operand::unconditional].dtype;
  if (state == Dtype::float32 && model == Dtype::float32) return launch(float{}, float{});
  if (state == Dtype::float32 && model == Dtype::float16) return launch(float{}, Half{});
  if (state == Dtype::float32 && model == Dtype::bfloat16) return launch(float{}, BFloat16{});
  if (state == Dtype::float16 && model == Dtype::float16) return launch(Half{}, Half{});
  if (state == Dtype::bfloat16 && model == Dtype::bfloat16) return launch(BFloat16{}, BFloat16{});
  if (state == Dtype::float64 && model == Dtype::float64) return launch(double{}, double{});
  return NOT_CONTIGUOUS;
}

int update_contiguous(const Job& job, void* stream) {
  return for_dtypes(job, [&](auto state, auto model) {
    return update_contiguous<decltype(state), decltype(model)>(job, stream);
  });
}

}  // namespace FASTDDIM_NAMESPACE
