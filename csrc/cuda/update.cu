// The update on a GPU, in one pass: 16-byte accesses where the tensors allow it, the noise drawn in
// registers.
//
// A thread takes a chunk of one sample: whole quads of normals and whole 16-byte words of the
// state. Tensors that are contiguous within a sample and have the dtypes of an ordinary step go to
// `update`; every other layout and mix of dtypes goes to `update_strided`, element by element. Both
// compute by formula.h, built with -fmad=false, so their bits are those of the CPU kernel.

#include <limits.h>

#include <type_traits>

#include "../dtypes.h"
#include "../formula.h"
#include "launch.h"

// A seam for tests, which run the kernels as plain C++.
#if !defined(FASTDDIM_LAUNCH)
#define FASTDDIM_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#endif

#if defined(__CUDA_ARCH__)
#define FASTDDIM_UNROLL _Pragma("unroll")
#define FASTDDIM_NO_UNROLL _Pragma("unroll 1")
#else
#define FASTDDIM_UNROLL
#define FASTDDIM_NO_UNROLL
#endif

namespace FASTDDIM_NAMESPACE {

using fastddim::Dtype;
using fastddim::Job;
using fastddim::View;

constexpr int BLOCK = 256;

// Dimensions of a sample after merging neighbours; the strides of all tensors must fit into the
// kernel's parameters.
constexpr int STRIDED_DIMS = 12;

// How chunks are dealt to threads: a block takes one tile of a large sample, or several small
// samples.
struct Grid {
  int64_t batch, count, chunks;
  uint32_t tiles, samples_per_block, blocks, threads;
};

// One thread's chunk: elements [element, element + count) of `sample`.
struct Chunk {
  int64_t sample, element;
  int count;
};

template <int SIZE>
FASTDDIM_FN bool chunk_of(const Grid& grid, Chunk& chunk) {
  const uint32_t group = blockIdx.x / grid.tiles, tile = blockIdx.x - group * grid.tiles;
  uint32_t local = 0, thread = threadIdx.x;
  if (grid.samples_per_block > 1) {
    local = thread / (uint32_t)grid.chunks;
    thread -= local * (uint32_t)grid.chunks;
    if (local >= grid.samples_per_block) return false;
  }
  const int64_t index = (int64_t)tile * BLOCK + thread;
  chunk.sample = (int64_t)group * grid.samples_per_block + local;
  chunk.element = index * SIZE;
  if (chunk.sample >= grid.batch || index >= grid.chunks) return false;
  const int64_t rest = grid.count - chunk.element;
  chunk.count = rest < SIZE ? (int)rest : SIZE;
  return true;
}

// Coefficients and keys, in device memory.
struct Rows {
  const void* table;
  const int64_t* row;
  int64_t row_stride;
  const int64_t *seed, *step, *sample;
  uint32_t stream;
};

template <class C>
FASTDDIM_FN Row<C> row_of(const Rows& rows, int64_t sample) {
  const C* at = (const C*)rows.table + rows.row[sample * rows.row_stride] * ROW_FIELDS;
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], at[11]};
}

FASTDDIM_FN Key key_of(const Rows& rows, int64_t sample) {
  return {(uint64_t)rows.seed[sample], (uint32_t)rows.step[sample], (uint32_t)rows.sample[sample],
          rows.stream};
}

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// A chunk holds at least one quad of normals and at least one word of the state.
template <class T>
constexpr int SIZE_OF_CHUNK = sizeof(T) < 4 ? 16 / sizeof(T) : 4;

// A tensor that is contiguous within each sample; null where absent.
struct Operand {
  void* data;
  int64_t sample_stride;
};

template <int BYTES>
struct Word;
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// One instruction each: the compiler splits a plain store of what it knows element by element.
FASTDDIM_FN void store_word(uint2* to, uint2 word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
#else
  *to = word;
#endif
}
FASTDDIM_FN void store_word(uint4* to, uint4 word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
#else
  *to = word;
#endif
}

// The elements of one chunk, in registers.
template <class T, int SIZE>
struct Pack {
  T at[SIZE];
  static constexpr int BYTES = SIZE * sizeof(T) < 16 ? SIZE * (int)sizeof(T) : 16;
  static constexpr int WORDS = SIZE * sizeof(T) / BYTES;
  using Type = typename Word<BYTES>::type;
};

template <class T, int SIZE>
FASTDDIM_FN Pack<T, SIZE> load(const Operand& operand, const Chunk& chunk, bool words) {
  using P = Pack<T, SIZE>;
  const T* from = (const T*)operand.data + chunk.sample * operand.sample_stride + chunk.element;
  P pack{};
  if (words && chunk.count == SIZE) {
    typename P::Type raw[P::WORDS];
    // Read once, here: evicted first, so that what the model reads next stays in the cache.
    FASTDDIM_UNROLL
    for (int i = 0; i < P::WORDS; ++i) raw[i] = __ldcs((const typename P::Type*)from + i);
    __builtin_memcpy(&pack, raw, sizeof pack);
  } else {
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) {
      if (i < chunk.count) pack.at[i] = from[i];
    }
  }
  return pack;
}

template <class T, int SIZE>
FASTDDIM_FN void store(const Operand& operand, const Chunk& chunk, bool words,
                       const Pack<T, SIZE>& pack) {
  using P = Pack<T, SIZE>;
  T* to = (T*)operand.data + chunk.sample * operand.sample_stride + chunk.element;
  if (words && chunk.count == SIZE) {
    typename P::Type raw[P::WORDS];
    __builtin_memcpy(raw, &pack, sizeof pack);
    FASTDDIM_UNROLL
    for (int i = 0; i < P::WORDS; ++i) store_word((typename P::Type*)to + i, raw[i]);
  } else {
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) {
      if (i < chunk.count) to[i] = pack.at[i];
    }
  }
}

struct Call {
  Grid grid;
  Rows rows;
  bool words;  // every tensor is aligned to its words, in every sample
  Operand x, unconditional, conditional, noise, history, mask, known;
  Operand out, x_0, epsilon, model_input[2];
};

// `plain` has what every step has, and the next model input; `guided` reads two model outputs and
// writes two inputs; `any` has all there is. Fewer tensors need fewer registers, and so more
// threads wait for memory at once.
enum class Kind { plain, guided, any };

// Blocks that fit into a multiprocessor by its number of threads.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int FULL = 1536 / BLOCK;
#else
constexpr int FULL = 2048 / BLOCK;
#endif

// How many of them the registers must leave room for: all without noise; three quarters with it,
// and where two outputs of eight elements each are read.
template <class T, Kind KIND, bool KEYED>
constexpr int RESIDENT = sizeof(T) == 8                           ? 3
                         : KIND == Kind::any                      ? FULL / 2
                         : KEYED                                  ? FULL * 3 / 4
                         : sizeof(T) == 2 && KIND == Kind::guided ? FULL * 3 / 4
                                                                  : FULL;

template <class T, class C, int SIZE>
FASTDDIM_FN Pack<T, SIZE> narrowed(const C (&values)[SIZE]) {
  Pack<T, SIZE> pack;
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; i += 2) narrow_pair(values[i], values[i + 1], &pack.at[i]);
  return pack;
}

// A cast of the stored state, as one would make it for the model.
template <class M, class T, int SIZE>
FASTDDIM_FN Pack<M, SIZE> converted(const Pack<T, SIZE>& pack) {
  if constexpr (std::is_same_v<M, T>) {
    return pack;
  } else {
    typename Compute<T>::type values[SIZE];
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) values[i] = widened(pack.at[i]);
    return narrowed<M>(values);
  }
}

template <class C, class S, int SIZE>
FASTDDIM_FN void add_scaled(C scale, const Pack<S, SIZE>& values, C (&sum)[SIZE]) {
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) sum[i] = fma(scale, (C)widened(values.at[i]), sum[i]);
}

// The seed as a value that the compiler cannot compare: it would keep the twenty round keys of a
// seed in registers, to use them for the next quad, where four additions make two of them anew.
FASTDDIM_FN Key unshared(Key key) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(key.seed));
#endif
  return key;
}

template <class C, int SIZE>
FASTDDIM_FN void add_normals(C scale, const Key& key, const Chunk& chunk, C (&sum)[SIZE]) {
  FASTDDIM_UNROLL
  for (int first = 0; first < SIZE; first += 4) {
    float z[4];
    normals_of_quad(unshared(key), (uint32_t)((chunk.element + first) / 4), z);
    FASTDDIM_UNROLL
    for (int i = 0; i < 4; ++i) sum[first + i] = fma(scale, (C)z[i], sum[first + i]);
  }
}

// State of type T, model output of type M.
template <class T, class M, Kind KIND, bool KEYED>
__global__ void __launch_bounds__(BLOCK, (RESIDENT<T, KIND, KEYED>)) update(const Call call) {
  using C = typename Compute<T>::type;
  constexpr int SIZE = SIZE_OF_CHUNK<T>;
  constexpr bool GUIDED = KIND != Kind::plain, ANY = KIND == Kind::any;
  Chunk chunk;
  if (!chunk_of<SIZE>(call.grid, chunk)) return;
  const auto x = load<T, SIZE>(call.x, chunk, call.words);
  const auto u = load<M, SIZE>(call.unconditional, chunk, call.words);
  Pack<M, SIZE> c{};
  const bool guided_here = GUIDED && call.conditional.data;
  if (guided_here) c = load<M, SIZE>(call.conditional, chunk, call.words);
  const Row<C> row = row_of<C>(call.rows, chunk.sample);

  C x_prev[SIZE], x_0[SIZE], eps[SIZE];
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) {
    const C state = widened(x.at[i]);
    C m = widened(u.at[i]);
    if (guided_here) m = guided<C>(row, m, widened(c.at[i]));
    const C predicted = clipped(row, unclipped_x_0<C>(row, state, m));
    x_prev[i] = noiseless<C>(row, state, m, predicted);
    if constexpr (ANY) {
      x_0[i] = predicted;
      eps[i] = epsilon<C>(row, state, m, predicted);
    }
  }
  if constexpr (ANY) {
    if (call.x_0.data) store(call.x_0, chunk, call.words, narrowed<T>(x_0));
    if (call.history.data) {
      const auto history = load<M, SIZE>(call.history, chunk, call.words);
      add_scaled(row.ph, history, x_prev);
    }
    if (call.epsilon.data) store(call.epsilon, chunk, call.words, narrowed<M>(eps));
  }
  if constexpr (KEYED) {
    if (row.pn != 0) add_normals(row.pn, key_of(call.rows, chunk.sample), chunk, x_prev);
  } else if constexpr (ANY) {
    if (call.noise.data && row.pn != 0) {
      const auto noise = load<T, SIZE>(call.noise, chunk, call.words);
      add_scaled(row.pn, noise, x_prev);
    }
  }
  if constexpr (ANY) {
    if (call.mask.data) {
      const auto mask = load<T, SIZE>(call.mask, chunk, call.words);
      const auto known = load<T, SIZE>(call.known, chunk, call.words);
      FASTDDIM_UNROLL
      for (int i = 0; i < SIZE; ++i) {
        x_prev[i] = blended<C>(x_prev[i], widened(mask.at[i]), widened(known.at[i]));
      }
    }
  }

  const auto out = narrowed<T>(x_prev);
  store(call.out, chunk, call.words, out);
  if (call.model_input[0].data) {
    const auto input = converted<M>(out);
    store(call.model_input[0], chunk, call.words, input);
    if (GUIDED && call.model_input[1].data) {
      store(call.model_input[1], chunk, call.words, input);
    }
  }
}

// A tensor of any dtype and strides.
struct StridedOperand {
  void* data;
  Dtype dtype;
  int64_t sample_stride;
  int64_t strides[STRIDED_DIMS];
};

template <class C>
FASTDDIM_FN C read(const StridedOperand& operand, int64_t offset) {
  switch (operand.dtype) {
    case Dtype::float32:
      return (C)((const float*)operand.data)[offset];
    case Dtype::float64:
      return (C)((const double*)operand.data)[offset];
    case Dtype::float16:
      return (C)widened(((const Half*)operand.data)[offset]);
    default:
      return (C)widened(((const Brain*)operand.data)[offset]);
  }
}

template <class C>
FASTDDIM_FN void write(const StridedOperand& operand, int64_t offset, C value) {
  switch (operand.dtype) {
    case Dtype::float32:
      return narrow(value, ((float*)operand.data)[offset]);
    case Dtype::float64:
      return narrow(value, ((double*)operand.data)[offset]);
    case Dtype::float16:
      return narrow(value, ((Half*)operand.data)[offset]);
    default:
      return narrow(value, ((Brain*)operand.data)[offset]);
  }
}

// `value` as it is after a round trip through `dtype`.
FASTDDIM_FN float stored_as(Dtype dtype, float value) {
  Half half;
  Brain brain;
  if (dtype == Dtype::float16) narrow(value, half), value = widened(half);
  if (dtype == Dtype::bfloat16) narrow(value, brain), value = widened(brain);
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
  StridedOperand x, unconditional, conditional, noise, history, mask, known;
  StridedOperand out, x_0, epsilon, model_input[2];
};

// Where an element lies in each tensor: its coordinates are worked out once.
template <int TENSORS>
FASTDDIM_FN void offsets_of(const Shape& shape, const StridedOperand* const (&tensors)[TENSORS],
                            int64_t sample, int64_t element, int64_t (&offsets)[TENSORS]) {
  FASTDDIM_UNROLL
  for (int v = 0; v < TENSORS; ++v) offsets[v] = sample * tensors[v]->sample_stride;
  FASTDDIM_NO_UNROLL
  for (int d = shape.ndim - 1; d >= 0; --d) {
    const int64_t rest = element / shape.sizes[d], index = element - rest * shape.sizes[d];
    element = rest;
    FASTDDIM_UNROLL
    for (int v = 0; v < TENSORS; ++v) offsets[v] += index * tensors[v]->strides[d];
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
      normals_of_quad(key_of(call.rows, chunk.sample), (uint32_t)(chunk.element / 4), z);
    }
  }
  const StridedOperand* const tensors[] = {
      &call.x,       &call.unconditional,  &call.conditional,    &call.noise,
      &call.history, &call.mask,           &call.known,          &call.out,
      &call.x_0,     &call.model_input[0], &call.model_input[1], &call.epsilon};
  FASTDDIM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= chunk.count) break;
    int64_t at[12];
    offsets_of(call.shape, tensors, chunk.sample, chunk.element + i, at);
    const C x = read<C>(call.x, at[0]);
    C m = read<C>(call.unconditional, at[1]);
    if (call.conditional.data) m = guided(row, m, read<C>(call.conditional, at[2]));
    const C x_0 = clipped(row, unclipped_x_0(row, x, m));
    C x_prev = noiseless(row, x, m, x_0);
    if (call.history.data) x_prev = fma(row.ph, read<C>(call.history, at[4]), x_prev);
    if (call.epsilon.data) write(call.epsilon, at[11], epsilon(row, x, m, x_0));
    if (row.pn != 0) {
      if (KEYED) {
        x_prev = fma(row.pn, (C)z[i], x_prev);
      } else if (call.noise.data) {
        x_prev = fma(row.pn, read<C>(call.noise, at[3]), x_prev);
      }
    }
    if (call.mask.data) {
      x_prev = blended(x_prev, read<C>(call.mask, at[5]), read<C>(call.known, at[6]));
    }
    write(call.out, at[7], x_prev);
    if (call.x_0.data) write(call.x_0, at[8], x_0);
    const C state = stored_as(call.out.dtype, x_prev);
    if (call.model_input[0].data) write(call.model_input[0], at[9], state);
    if (call.model_input[1].data) write(call.model_input[1], at[10], state);
  }
}

struct NormalCall {
  Grid grid;
  Rows rows;
  Shape shape;
  StridedOperand out;
};

__global__ void __launch_bounds__(BLOCK) normal(const __grid_constant__ NormalCall call) {
  Chunk chunk;
  if (!chunk_of<4>(call.grid, chunk)) return;
  float z[4];
  normals_of_quad(key_of(call.rows, chunk.sample), (uint32_t)(chunk.element / 4), z);
  const StridedOperand* const tensors[] = {&call.out};
  FASTDDIM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= chunk.count) break;
    int64_t at[1];
    offsets_of(call.shape, tensors, chunk.sample, chunk.element + i, at);
    write(call.out, at[0], z[i]);
  }
}

__global__ void __launch_bounds__(BLOCK)
    advance(int64_t* counters, int64_t count, const int64_t* timesteps, int64_t* t,
            int64_t t_count) {
  for (int64_t i = threadIdx.x; i < count; i += BLOCK) {
    const int64_t next = counters[i] + 1;
    counters[i] = next;
    if (i < t_count) t[i] = timesteps[next];
  }
}

// Whether the grid has a launchable number of blocks.
inline bool make_grid(Grid& grid, int64_t batch, int64_t count, int64_t chunk) {
  grid.batch = batch;
  grid.count = count;
  grid.chunks = (count + chunk - 1) / chunk;
  grid.samples_per_block = grid.chunks < BLOCK ? (uint32_t)(BLOCK / grid.chunks) : 1;
  if ((int64_t)grid.samples_per_block > batch) grid.samples_per_block = (uint32_t)batch;
  const int64_t tiles = (grid.chunks + BLOCK - 1) / BLOCK;
  const int64_t groups = (batch + grid.samples_per_block - 1) / grid.samples_per_block;
  if (tiles > INT_MAX || groups > INT_MAX / tiles) return false;
  grid.tiles = (uint32_t)tiles;
  grid.blocks = (uint32_t)(groups * tiles);
  const int64_t threads = tiles > 1 ? BLOCK : grid.samples_per_block * grid.chunks;
  grid.threads = (uint32_t)((threads + 31) / 32 * 32);
  return true;
}

inline Rows rows_of(const Job& job) {
  return {job.table, job.row, job.row_stride, job.seed, job.step, job.sample, job.stream};
}

template <class T>
constexpr Dtype DTYPE = Dtype::float32;
template <>
constexpr Dtype DTYPE<double> = Dtype::float64;
template <>
constexpr Dtype DTYPE<Half> = Dtype::float16;
template <>
constexpr Dtype DTYPE<Brain> = Dtype::bfloat16;

// Collects the operands of a call and what they have in common.
struct Operands {
  const Job& job;
  bool contiguous = true, words = true;

  template <class T>
  Operand of(const View& view) {
    if (!view.data) return {};
    contiguous &= view.contiguous && view.dtype == DTYPE<T>;
    words &= (uintptr_t)view.data % 16 == 0;
    words &= job.batch == 1 || view.sample_stride * (int64_t)sizeof(T) % 16 == 0;
    return {view.data, view.sample_stride};
  }
};

template <class T, class M, bool KEYED>
int launch_update(const Call& call, Kind kind, void* stream) {
  const unsigned blocks = call.grid.blocks, threads = call.grid.threads;
  switch (kind) {
    case Kind::plain:
      FASTDDIM_LAUNCH((update<T, M, Kind::plain, KEYED>), blocks, threads, stream, call);
      break;
    case Kind::guided:
      FASTDDIM_LAUNCH((update<T, M, Kind::guided, KEYED>), blocks, threads, stream, call);
      break;
    case Kind::any:
      FASTDDIM_LAUNCH((update<T, M, Kind::any, KEYED>), blocks, threads, stream, call);
      break;
  }
  return cudaGetLastError();
}

constexpr int NOT_CONTIGUOUS = -1;

// The kernel for a state of type T and a model output of type M, if the tensors fit it.
template <class T, class M>
int update_contiguous(const Job& job, void* stream) {
  Operands operands{job};
  Call call;
  call.x = operands.of<T>(job.x);
  call.unconditional = operands.of<M>(job.unconditional);
  call.conditional = operands.of<M>(job.conditional);
  call.noise = operands.of<T>(job.noise);
  call.history = operands.of<M>(job.history);
  call.mask = operands.of<T>(job.mask);
  call.known = operands.of<T>(job.known);
  call.out = operands.of<T>(job.out);
  call.x_0 = operands.of<T>(job.x_0);
  call.epsilon = operands.of<M>(job.epsilon);
  for (int i = 0; i < 2; ++i) call.model_input[i] = operands.of<M>(job.model_input[i]);
  if (!operands.contiguous) return NOT_CONTIGUOUS;
  call.rows = rows_of(job);
  call.words = operands.words;
  if (!make_grid(call.grid, job.batch, job.count, SIZE_OF_CHUNK<T>)) {
    return cudaErrorInvalidConfiguration;
  }
  const bool any =
      job.noise.data || job.history.data || job.mask.data || job.x_0.data || job.epsilon.data;
  const bool two = job.conditional.data || job.model_input[1].data;
  const Kind kind = any ? Kind::any : two ? Kind::guided : Kind::plain;
  return job.seed ? launch_update<T, M, true>(call, kind, stream)
                  : launch_update<T, M, false>(call, kind, stream);
}

int update_contiguous(const Job& job, void* stream) {
  const Dtype state = job.x.dtype, model = job.unconditional.dtype;
  if (state == Dtype::float32 && model == Dtype::float32) {
    return update_contiguous<float, float>(job, stream);
  }
  if (state == Dtype::float32 && model == Dtype::float16) {
    return update_contiguous<float, Half>(job, stream);
  }
  if (state == Dtype::float32 && model == Dtype::bfloat16) {
    return update_contiguous<float, Brain>(job, stream);
  }
  if (state == Dtype::float16 && model == Dtype::float16) {
    return update_contiguous<Half, Half>(job, stream);
  }
  if (state == Dtype::bfloat16 && model == Dtype::bfloat16) {
    return update_contiguous<Brain, Brain>(job, stream);
  }
  if (state == Dtype::float64 && model == Dtype::float64) {
    return update_contiguous<double, double>(job, stream);
  }
  return NOT_CONTIGUOUS;
}

StridedOperand strided(const Job& job, const View& view) {
  StridedOperand operand{view.data, view.dtype, view.sample_stride, {}};
  for (int d = 0; d < job.ndim && view.data; ++d) operand.strides[d] = view.strides[d];
  return operand;
}

Shape shape_of(const Job& job) {
  Shape shape{job.ndim, {}};
  for (int d = 0; d < job.ndim; ++d) shape.sizes[d] = job.sizes[d];
  return shape;
}

template <class C>
int update_strided(const Job& job, void* stream) {
  StridedCall call{};
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, job.batch, job.count, 4)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  call.shape = shape_of(job);
  call.x = strided(job, job.x);
  call.unconditional = strided(job, job.unconditional);
  call.conditional = strided(job, job.conditional);
  call.noise = strided(job, job.noise);
  call.history = strided(job, job.history);
  call.mask = strided(job, job.mask);
  call.known = strided(job, job.known);
  call.out = strided(job, job.out);
  call.x_0 = strided(job, job.x_0);
  call.epsilon = strided(job, job.epsilon);
  for (int i = 0; i < 2; ++i) call.model_input[i] = strided(job, job.model_input[i]);
  if (job.seed) {
    FASTDDIM_LAUNCH((update_strided<C, true>), call.grid.blocks, call.grid.threads, stream, call);
  } else {
    FASTDDIM_LAUNCH((update_strided<C, false>), call.grid.blocks, call.grid.threads, stream, call);
  }
  return cudaGetLastError();
}

int normal(const Job& job, void* stream) {
  NormalCall call{};
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, job.batch, job.count, 4)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  call.shape = shape_of(job);
  call.out = strided(job, job.out);
  FASTDDIM_LAUNCH(normal, call.grid.blocks, call.grid.threads, stream, call);
  return cudaGetLastError();
}

}  // namespace FASTDDIM_NAMESPACE

int fastddim_cuda_update(const fastddim::Job* job, void* stream) {
  if (job->batch == 0 || job->count == 0) return 0;
  const int code = FASTDDIM_NAMESPACE::update_contiguous(*job, stream);
  if (code != FASTDDIM_NAMESPACE::NOT_CONTIGUOUS) return code;
  return job->float64 ? FASTDDIM_NAMESPACE::update_strided<double>(*job, stream)
                      : FASTDDIM_NAMESPACE::update_strided<float>(*job, stream);
}

int fastddim_cuda_normal(const fastddim::Job* job, void* stream) {
  if (job->batch == 0 || job->count == 0) return 0;
  return FASTDDIM_NAMESPACE::normal(*job, stream);
}

int fastddim_cuda_advance(int64_t* counters, int64_t count, const int64_t* timesteps, int64_t* t,
                          int64_t t_count, void* stream) {
  if (count == 0) return 0;
  FASTDDIM_LAUNCH(FASTDDIM_NAMESPACE::advance, 1, FASTDDIM_NAMESPACE::BLOCK, stream, counters,
                  count, timesteps, t, t_count);
  return cudaGetLastError();
}

const char* fastddim_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }
