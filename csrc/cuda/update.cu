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
#define FASTDDIM_LAUNCH(kernel, extent, stream, ...) \
  kernel<<<(extent).blocks, (extent).threads, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
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

// How chunks are dealt to threads. Along x: chunks of a sample, in tiles of BLOCK. Along y and z:
// samples; a block takes several of them where they are small.
struct Grid {
  int64_t count;
  uint32_t batch, chunks;
  uint32_t wide;  // chunks of a sample, the first ones, that are moved in 16-byte words
};

// One thread's chunk: elements from `element` on of `sample`.
struct Chunk {
  uint32_t sample, index;
  int64_t element;
  bool wide;
};

template <int SIZE>
FASTDDIM_FN bool chunk_of(const Grid& grid, Chunk& chunk) {
  chunk.sample = (blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  chunk.index = blockIdx.x * BLOCK + threadIdx.x;
  chunk.element = (int64_t)chunk.index * SIZE;
  chunk.wide = chunk.index < grid.wide;
  return chunk.sample < grid.batch && chunk.index < grid.chunks;
}

template <int SIZE>
FASTDDIM_FN int elements_of(const Grid& grid, const Chunk& chunk) {
  const int64_t rest = grid.count - chunk.element;
  return rest < SIZE ? (int)rest : SIZE;
}

// The word of an integer that holds all of it.
FASTDDIM_FN uint32_t low_word(const int64_t* at) {
  uint32_t word;
  __builtin_memcpy(&word, __builtin_assume_aligned(at, sizeof *at), sizeof word);
  return word;
}

// Coefficients and keys, in device memory.
struct Rows {
  const void* table;
  const int64_t* row;
  uint32_t row_stride;
  const int64_t *seed, *step, *sample;
  uint32_t stream;
};

template <class C>
FASTDDIM_FN const C* row_at(const Rows& rows, uint32_t sample) {
  const uint32_t row = low_word(rows.row + sample * rows.row_stride);
  return (const C*)rows.table + (uint64_t)row * ROW_FIELDS;
}

template <class C>
FASTDDIM_FN Row<C> row_of(const Rows& rows, uint32_t sample) {
  const C* at = row_at<C>(rows, sample);
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], at[11]};
}

// Of a table that is aligned to them.
template <class C>
FASTDDIM_FN Row<C> row_in_words(const Rows& rows, uint32_t sample) {
  constexpr int WORDS = sizeof(Row<C>) / sizeof(uint4);
  const auto* at = (const uint4*)row_at<C>(rows, sample);
  uint4 words[WORDS];
  FASTDDIM_UNROLL
  for (int i = 0; i < WORDS; ++i) words[i] = at[i];
  Row<C> row;
  __builtin_memcpy(&row, words, sizeof row);
  return row;
}

FASTDDIM_FN Key key_of(const Rows& rows, uint32_t sample) {
  return {(uint64_t)rows.seed[sample], low_word(rows.step + sample), low_word(rows.sample + sample),
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

// Two words, where noise is drawn for halves: the more quads a thread draws, the more of their
// arithmetic they share. All chunks are moved in words then. Fewer elements than these would leave
// multiprocessors without work.
template <class T>
constexpr int LONG_CHUNK = 2 * SIZE_OF_CHUNK<T>;
constexpr int64_t LONG_FROM = (int64_t)1 << 21;

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

// The elements of one chunk as they lie in memory, in registers.
template <class T, int SIZE>
struct Pack {
  static constexpr int BYTES = SIZE * (int)sizeof(T), WORD_BYTES = BYTES < 16 ? BYTES : 16;
  using Word = typename Word<WORD_BYTES>::type;
  static constexpr int WORDS = BYTES / WORD_BYTES;
  uint32_t words[BYTES / 4];
};

template <class T>
FASTDDIM_FN T* address(const Operand& operand, const Chunk& chunk) {
  return (T*)operand.data + (chunk.sample * (uint64_t)operand.sample_stride + chunk.element);
}

template <class T, int SIZE>
FASTDDIM_FN Pack<T, SIZE> load_words(const Operand& operand, const Chunk& chunk) {
  using P = Pack<T, SIZE>;
  const auto* from = (const typename P::Word*)address<T>(operand, chunk);
  P pack;
  FASTDDIM_UNROLL
  for (int i = 0; i < P::WORDS; ++i) {
    // Read once, here: evicted first, so that what the model reads next stays in the cache.
    const typename P::Word word = __ldcs(from + i);
    __builtin_memcpy(pack.words + i * P::WORD_BYTES / 4, &word, sizeof word);
  }
  return pack;
}

template <class T, int SIZE>
FASTDDIM_FN Pack<T, SIZE> load_elements(const Operand& operand, const Chunk& chunk, int count) {
  const T* from = address<T>(operand, chunk);
  Pack<T, SIZE> pack{};
  FASTDDIM_UNROLL
  for (int i = 0; i < SIZE; ++i) {
    if (i < count) {
      const T value = from[i];
      __builtin_memcpy((char*)pack.words + i * sizeof(T), &value, sizeof value);
    }
  }
  return pack;
}

template <class T, int SIZE>
FASTDDIM_FN Pack<T, SIZE> load(const Operand& operand, const Grid& grid, const Chunk& chunk) {
  if (chunk.wide) return load_words<T, SIZE>(operand, chunk);
  return load_elements<T, SIZE>(operand, chunk, elements_of<SIZE>(grid, chunk));
}

template <class T, int SIZE>
FASTDDIM_FN void store(const Operand& operand, const Grid& grid, const Chunk& chunk,
                       const Pack<T, SIZE>& pack) {
  using P = Pack<T, SIZE>;
  T* to = address<T>(operand, chunk);
  if (chunk.wide) {
    FASTDDIM_UNROLL
    for (int i = 0; i < P::WORDS; ++i) {
      typename P::Word word;
      __builtin_memcpy(&word, pack.words + i * P::WORD_BYTES / 4, sizeof word);
      store_word((typename P::Word*)to + i, word);
    }
  } else {
    const int count = elements_of<SIZE>(grid, chunk);
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; ++i) {
      T value;
      __builtin_memcpy(&value, (const char*)pack.words + i * sizeof(T), sizeof value);
      if (i < count) to[i] = value;
    }
  }
}

struct Call {
  Grid grid;
  Rows rows;
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
// and where two outputs of eight elements each are read; half with long chunks.
template <class T, Kind KIND, bool KEYED, int SIZE>
constexpr int RESIDENT = sizeof(T) == 8                           ? 3
                         : KIND == Kind::any                      ? FULL / 2
                         : SIZE > SIZE_OF_CHUNK<T>                ? FULL / 2
                         : KEYED                                  ? FULL * 3 / 4
                         : sizeof(T) == 2 && KIND == Kind::guided ? FULL * 3 / 4
                                                                  : FULL;

template <class C, class T, int SIZE>
FASTDDIM_FN void widen(const Pack<T, SIZE>& pack, C (&values)[SIZE]) {
  if constexpr (sizeof(T) == 2) {
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; i += 2) {
      widen_pair(pack.words[i / 2], T{}, values[i], values[i + 1]);
    }
  } else {
    __builtin_memcpy(values, pack.words, sizeof values);
  }
}

template <class T, class C, int SIZE>
FASTDDIM_FN Pack<T, SIZE> narrowed(const C (&values)[SIZE]) {
  Pack<T, SIZE> pack;
  if constexpr (sizeof(T) == 2) {
    FASTDDIM_UNROLL
    for (int i = 0; i < SIZE; i += 2) {
      narrow_pair(values[i], values[i + 1], T{}, pack.words[i / 2]);
    }
  } else {
    __builtin_memcpy(pack.words, values, sizeof values);
  }
  return pack;
}

// A cast of the stored state, as one would make it for the model.
template <class M, class T, int SIZE>
FASTDDIM_FN Pack<M, SIZE> converted(const Pack<T, SIZE>& pack) {
  if constexpr (std::is_same_v<M, T>) {
    return pack;
  } else {
    typename Compute<T>::type values[SIZE];
    widen(pack, values);
    return narrowed<M>(values);
  }
}

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
  if constexpr (SIZE > SIZE_OF_CHUNK<T>) chunk.wide = true;
  const bool guided_here = GUIDED && call.conditional.data;
  Row<C> row;
  Pack<T, SIZE> x;
  Pack<M, SIZE> u, c{};
  if (chunk.wide) {
    x = load_words<T, SIZE>(call.x, chunk);
    u = load_words<M, SIZE>(call.unconditional, chunk);
    if (guided_here) c = load_words<M, SIZE>(call.conditional, chunk);
    row = row_in_words<C>(call.rows, chunk.sample);
  } else {
    const int count = elements_of<SIZE>(call.grid, chunk);
    x = load_elements<T, SIZE>(call.x, chunk, count);
    u = load_elements<M, SIZE>(call.unconditional, chunk, count);
    if (guided_here) c = load_elements<M, SIZE>(call.conditional, chunk, count);
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
    if (call.x_0.data) store(call.x_0, call.grid, chunk, narrowed<T>(x_0));
    if (call.history.data) {
      add_scaled(row.ph, load<M, SIZE>(call.history, call.grid, chunk), x_prev);
    }
    if (call.epsilon.data) store(call.epsilon, call.grid, chunk, narrowed<M>(eps));
  }
  if constexpr (KEYED) {
    if (row.pn != 0) add_normals(row.pn, key_of(call.rows, chunk.sample), chunk, x_prev);
  } else if constexpr (ANY) {
    if (call.noise.data && row.pn != 0) {
      add_scaled(row.pn, load<T, SIZE>(call.noise, call.grid, chunk), x_prev);
    }
  }
  if constexpr (ANY) {
    if (call.mask.data) {
      C mask[SIZE], known[SIZE];
      widen(load<T, SIZE>(call.mask, call.grid, chunk), mask);
      widen(load<T, SIZE>(call.known, call.grid, chunk), known);
      FASTDDIM_UNROLL
      for (int i = 0; i < SIZE; ++i) x_prev[i] = blended<C>(x_prev[i], mask[i], known[i]);
    }
  }

  const auto out = narrowed<T>(x_prev);
  store(call.out, call.grid, chunk, out);
  if (call.model_input[0].data) {
    const auto input = converted<M>(out);
    store(call.model_input[0], call.grid, chunk, input);
    if (GUIDED && call.model_input[1].data) {
      store(call.model_input[1], call.grid, chunk, input);
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
      normals_of_quad(key_of(call.rows, chunk.sample), chunk.index, z);
    }
  }
  const StridedOperand* const tensors[] = {
      &call.x,       &call.unconditional,  &call.conditional,    &call.noise,
      &call.history, &call.mask,           &call.known,          &call.out,
      &call.x_0,     &call.model_input[0], &call.model_input[1], &call.epsilon};
  const int count = elements_of<4>(call.grid, chunk);
  FASTDDIM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
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
  normals_of_quad(key_of(call.rows, chunk.sample), chunk.index, z);
  const StridedOperand* const tensors[] = {&call.out};
  const int count = elements_of<4>(call.grid, chunk);
  FASTDDIM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= count) break;
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

struct Extent {
  dim3 blocks, threads;
};

// Whether the samples' chunks can be dealt to the threads of one launch.
inline bool make_grid(Grid& grid, Extent& extent, int64_t batch, int64_t count, int64_t size) {
  constexpr int64_t ALONG_Y = 0xFFFF, ALONG_Z = 0xFFFF;  // the most blocks that there may be
  const int64_t chunks = (count + size - 1) / size, tiles = (chunks + BLOCK - 1) / BLOCK;
  int64_t samples = chunks < BLOCK ? BLOCK / chunks : 1;
  if (samples > batch) samples = batch;
  const int64_t groups = (batch + samples - 1) / samples, planes = (groups + ALONG_Y - 1) / ALONG_Y;
  if (batch > INT_MAX || chunks > INT_MAX || planes > ALONG_Z) return false;
  grid = {count, (uint32_t)batch, (uint32_t)chunks, 0};
  extent.blocks = {(uint32_t)tiles, (uint32_t)(groups < ALONG_Y ? groups : ALONG_Y),
                   (uint32_t)planes};
  extent.threads = {(uint32_t)(chunks < BLOCK ? chunks : BLOCK), (uint32_t)samples, 1};
  return true;
}

inline Rows rows_of(const Job& job) {
  return {job.table, job.row, (uint32_t)job.row_stride, job.seed, job.step, job.sample, job.stream};
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

// `aligned`: every word of every tensor and row is.
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

template <class T, class M, bool KEYED>
int launch_kind(const Job& job, Call& call, bool aligned, void* stream) {
  constexpr int SIZE = SIZE_OF_CHUNK<T>;
  if (job.noise.data || job.history.data || job.mask.data || job.x_0.data || job.epsilon.data) {
    return launch_update<T, M, Kind::any, KEYED, SIZE>(job, call, aligned, stream);
  }
  if (job.conditional.data || job.model_input[1].data) {
    return launch_update<T, M, Kind::guided, KEYED, SIZE>(job, call, aligned, stream);
  }
  if constexpr (KEYED && sizeof(T) == 2) {
    if (aligned && job.count % LONG_CHUNK<T> == 0 && job.batch * job.count >= LONG_FROM) {
      return launch_update<T, M, Kind::plain, KEYED, LONG_CHUNK<T>>(job, call, aligned, stream);
    }
  }
  return launch_update<T, M, Kind::plain, KEYED, SIZE>(job, call, aligned, stream);
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
  const bool aligned = operands.words && (uintptr_t)job.table % sizeof(uint4) == 0;
  return job.seed ? launch_kind<T, M, true>(job, call, aligned, stream)
                  : launch_kind<T, M, false>(job, call, aligned, stream);
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
  Extent extent;
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, extent, job.batch, job.count, 4)) {
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
    FASTDDIM_LAUNCH((update_strided<C, true>), extent, stream, call);
  } else {
    FASTDDIM_LAUNCH((update_strided<C, false>), extent, stream, call);
  }
  return cudaGetLastError();
}

int normal(const Job& job, void* stream) {
  NormalCall call{};
  Extent extent;
  if (job.ndim > STRIDED_DIMS || !make_grid(call.grid, extent, job.batch, job.count, 4)) {
    return cudaErrorInvalidConfiguration;
  }
  call.rows = rows_of(job);
  call.shape = shape_of(job);
  call.out = strided(job, job.out);
  FASTDDIM_LAUNCH(normal, extent, stream, call);
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
  const FASTDDIM_NAMESPACE::Extent extent{{1, 1, 1}, {FASTDDIM_NAMESPACE::BLOCK, 1, 1}};
  FASTDDIM_LAUNCH(FASTDDIM_NAMESPACE::advance, extent, stream, counters, count, timesteps, t,
                  t_count);
  return cudaGetLastError();
}

const char* fastddim_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }
