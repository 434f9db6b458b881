// The factors that rows take from the data of their samples: csrc/cpu/fit.h on a GPU, to the bit.
//
// A block takes a sample, and each of its threads one of the accumulators of a sum. Nothing of the
// size of a sample is kept: each pass works the values out anew from x and the model output.
// Threads exchange values through shared memory. A histogram is counted by atomic additions, which
// give the same counts in every order.

#pragma once

#include "../dtypes.h"
#include "../fitting.h"
#include "../job.h"
#include "contiguous.cuh"
#include "grid.cuh"
#include "rows.cuh"
#include "strided.cuh"

namespace FASTDDIM_NAMESPACE {

static_assert(BLOCK == ACCUMULATORS);

// The operands of the model's output and the state, contiguous within a sample.
template <class T, class M>
struct DenseSource {
  using Computed = typename Compute<T>::type;
  static constexpr int AT_ONCE = 4;  // elements whose loads wait for memory together
  const T* x;
  const M *unconditional, *conditional;
  int64_t strides[3];  // between samples

  DenseSource(const Job& job)
      : x((const T*)job.views[operand::x].data),
        unconditional((const M*)job.views[operand::unconditional].data),
        conditional((const M*)job.views[operand::conditional].data),
        strides{job.views[operand::x].sample_stride,
                job.views[operand::unconditional].sample_stride,
                job.views[operand::conditional].sample_stride} {}

  FASTDDIM_FN bool is_guided() const { return conditional; }

  template <bool STATE>
  FASTDDIM_FN void read_at(uint32_t sample, int64_t i, Computed& state, Computed& u,
                           Computed& c) const {
    if (STATE) state = widened(x[sample * strides[0] + i]);
    u = widened(unconditional[sample * strides[1] + i]);
    if (conditional) c = widened(conditional[sample * strides[2] + i]);
  }
};

// The same operands with any dtype and strides.
template <class C>
struct StridedSource {
  using Computed = C;
  static constexpr int AT_ONCE = 1;
  Shape shape;
  StridedView x, unconditional, conditional;

  StridedSource(const Job& job)
      : shape(shape_of(job)),
        x(strided_view(job, job.views[operand::x])),
        unconditional(strided_view(job, job.views[operand::unconditional])),
        conditional(strided_view(job, job.views[operand::conditional])) {}

  FASTDDIM_FN bool is_guided() const { return conditional.data; }

  template <bool STATE>
  FASTDDIM_FN void read_at(uint32_t sample, int64_t i, C& state, C& u, C& c) const {
    const StridedView* const views[] = {&x, &unconditional, &conditional};
    int64_t at[3];
    offsets_of(shape, views, sample, i, at);
    if (STATE) state = read<C>(x, at[0]);
    u = read<C>(unconditional, at[1]);
    if (conditional.data) c = read<C>(conditional, at[2]);
  }
};

template <class Source>
struct FitCall {
  Source source;
  Rows rows;
  int64_t count;
  double rescale, ratio, limit;
  Quantile quantile;
  void* fitted;
};

// Calls visit(x, m, conditional) with m guided, for each element of the sample that is this
// thread's, in ascending order.
template <bool STATE, class Source, class C, class Visit>
FASTDDIM_DEVICE void for_each_element(const FitCall<Source>& call, const Row<C>& row, Visit visit) {
  constexpr int AT_ONCE = Source::AT_ONCE;
  const bool guided_here = call.source.is_guided();
  FASTDDIM_NO_UNROLL
  for (int64_t first = threadIdx.x; first < call.count; first += AT_ONCE * BLOCK) {
    C x[AT_ONCE] = {}, u[AT_ONCE] = {}, c[AT_ONCE] = {};
    FASTDDIM_UNROLL
    for (int k = 0; k < AT_ONCE; ++k) {
      const int64_t i = first + k * BLOCK;
      if (k == 0 || i < call.count)
        call.source.template read_at<STATE>(blockIdx.x, i, x[k], u[k], c[k]);
    }
    FASTDDIM_UNROLL
    for (int k = 0; k < AT_ONCE; ++k) {
      if (k == 0 || first + k * BLOCK < call.count) {
        visit(x[k], guided_here ? guided<C>(row, u[k], c[k]) : u[k], c[k]);
      }
    }
  }
}

// Combines the values that the threads have stored in each row, the upper half with the lower half,
// until the first element holds the total. No thread may change it before all have read it.
template <int ROWS, class V, class Combine>
FASTDDIM_DEVICE void reduce(V (&rows)[ROWS][BLOCK], Combine combine) {
  FASTDDIM_NO_UNROLL
  for (unsigned width = BLOCK / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) {
      FASTDDIM_UNROLL
      for (auto& row : rows) row[threadIdx.x] = combine(row[threadIdx.x], row[threadIdx.x + width]);
    }
  }
  __syncthreads();
}

template <class Source, class C>
FASTDDIM_DEVICE C rescaling(const FitCall<Source>& call, const Row<C>& row) {
  __shared__ double sums[4][BLOCK];
  double of_conditional = 0, of_guided = 0;  // the values that others are counted from
  if (call.count > 0) {
    C x, u, c;
    call.source.template read_at<false>(blockIdx.x, 0, x, u, c);
    of_conditional = c;
    of_guided = guided<C>(row, u, c);
  }
  double mine[4] = {};
  for_each_element<false>(call, row, [&](C, C m, C conditional) {
    const double d = conditional - of_conditional, e = m - of_guided;
    mine[0] += d;
    mine[1] += d * d;
    mine[2] += e;
    mine[3] += e * e;
  });
  FASTDDIM_UNROLL
  for (int k = 0; k < 4; ++k) sums[k][threadIdx.x] = mine[k];
  reduce(sums, [](double a, double b) { return a + b; });
  return rescaling_factor<C>(squared_deviations(sums[0][0], sums[1][0], call.count),
                             squared_deviations(sums[2][0], sums[3][0], call.count), call.rescale);
}

// The count of each digit.
struct Histogram {
  static constexpr int PER_THREAD = (1 << DIGIT) / BLOCK;
  uint32_t counts[1 << DIGIT];
  // A binary tree of sums of counts: the children of node n are 2n and 2n + 1, and the leaves, from
  // BLOCK on, are the counts of PER_THREAD digits each. The root, 1, is not needed.
  uint32_t nodes[2 * BLOCK];

  FASTDDIM_DEVICE void clear() {
    FASTDDIM_UNROLL
    for (int k = 0; k < PER_THREAD; ++k) counts[threadIdx.x + k * BLOCK] = 0;
    __syncthreads();
  }

  // The digit of the value of this rank. `rank` becomes the value's rank among those with the same
  // digit, and `equal` the number of these.
  FASTDDIM_DEVICE uint32_t find(uint32_t& rank, uint32_t& equal) {
    __syncthreads();
    uint32_t sum = 0;
    FASTDDIM_UNROLL
    for (int k = 0; k < PER_THREAD; ++k) sum += counts[threadIdx.x * PER_THREAD + k];
    nodes[BLOCK + threadIdx.x] = sum;
    FASTDDIM_NO_UNROLL
    for (unsigned width = BLOCK / 2; width > 1; width /= 2) {
      __syncthreads();
      const unsigned node = width + threadIdx.x;
      if (threadIdx.x < width) nodes[node] = nodes[2 * node] + nodes[2 * node + 1];
    }
    __syncthreads();
    uint32_t node = 1;
    FASTDDIM_NO_UNROLL
    while (node < BLOCK) {
      node *= 2;
      const uint32_t lower = nodes[node];
      if (rank >= lower) rank -= lower, ++node;
    }
    uint32_t digit = (node - BLOCK) * PER_THREAD;
    FASTDDIM_NO_UNROLL
    while (equal = counts[digit], rank >= equal) rank -= equal, ++digit;
    __syncthreads();
    return digit;
  }
};

template <class Source, class C, class Visit>
FASTDDIM_DEVICE void for_each_magnitude(const FitCall<Source>& call, const Row<C>& row,
                                        Visit visit) {
  for_each_element<true>(call, row,
                         [&](C x, C m, C) { visit(magnitude_of(unclipped_x_0<C>(row, x, m))); });
}

// The combination over all threads. Each kind of it has words of its own and occurs once in a
// sample.
template <class Word, class Combine>
FASTDDIM_DEVICE Word reduced(Word mine, Combine combine) {
  __shared__ Word words[1][BLOCK];
  words[0][threadIdx.x] = mine;
  reduce(words, combine);
  return words[0][0];
}

// Order statistic `rank` (from 0) of |x_0| and the next one. False where any value is NaN.
template <class Source, class C>
FASTDDIM_DEVICE bool order_statistics(const FitCall<Source>& call, const Row<C>& row, C& low,
                                      C& high) {
  using Word = typename Magnitude<C>::Word;
  __shared__ Histogram histogram;
  Word prefix = 0, largest = 0;
  uint32_t rank = (uint32_t)call.quantile.rank, equal = 0;
  FASTDDIM_NO_UNROLL
  for (int shift = Magnitude<C>::BITS; shift > 0;) {
    const int width = shift < DIGIT ? shift : DIGIT, known = shift;
    shift -= width;
    histogram.clear();
    for_each_magnitude(call, row, [&](Word word) {
      largest = word > largest ? word : largest;
      if (word >> known == prefix) {
        atomicAdd(&histogram.counts[word >> shift & (((Word)1 << width) - 1)], 1u);
      }
    });
    if (known == Magnitude<C>::BITS) {
      largest = reduced(largest, [](Word a, Word b) { return a > b ? a : b; });
      if (largest > Magnitude<C>::INFINITE) return false;
    }
    prefix = prefix << width | (Word)histogram.find(rank, equal);
  }
  Word next = prefix;
  if (rank + 1 >= equal && largest > prefix) {
    next = largest;
    for_each_magnitude(call, row, [&](Word word) {
      if (word > prefix && word < next) next = word;
    });
    next = reduced(next, [](Word a, Word b) { return a < b ? a : b; });
  }
  low = value_of<C>(prefix);
  high = value_of<C>(next);
  return true;
}

template <class Source, class C>
FASTDDIM_DEVICE C threshold(const FitCall<Source>& call, const Row<C>& row) {
  if (call.count == 0) return 1;
  C low, high;
  if (!order_statistics(call, row, low, high)) return value_of<C>(Magnitude<C>::INFINITE + 1);
  return threshold_between(low, high, call.quantile.fraction, call.limit);
}

template <class Source>
__global__ void __launch_bounds__(BLOCK, 4) fit(const __grid_constant__ FitCall<Source> call) {
  using C = typename Source::Computed;
  Row<C> row = row_of<C>(call.rows, blockIdx.x);
  C factor = 1, s = 1;
  if (call.rescale > 0) {
    factor = rescaling(call, row);
    rescale_row(row, factor);
  }
  if (call.ratio > 0) s = threshold(call, row);
  if (threadIdx.x > 0) return;
  // The row is read again: the passes need three of its numbers, and have no registers for others.
  row = row_of<C>(call.rows, blockIdx.x);
  if (call.rescale > 0) rescale_row(row, factor);
  if (call.ratio > 0) threshold_row(row, s);
  ((Row<C>*)call.fitted)[blockIdx.x] = row;
}

template <class Source>
int launch_fit(const Job& job, void* stream) {
  // Counts have 32 bits.
  if (job.batch > INT_MAX || job.count > UINT32_MAX) return cudaErrorInvalidConfiguration;
  const Quantile quantile(job.ratio, job.count > 0 ? job.count : 1);
  const FitCall<Source> call{Source(job), rows_of(job), job.count, job.rescale,
                             job.ratio,   job.limit,    quantile,  job.fitted};
  const Extent extent{{(uint32_t)job.batch, 1, 1}, {BLOCK, 1, 1}};
  FASTDDIM_LAUNCH(fit<Source>, extent, stream, call);
  return cudaGetLastError();
}

int fit_rows(const Job& job, void* stream) {
  const int code = for_dtypes(job, [&](auto state, auto model) {
    using T = decltype(state);
    using M = decltype(model);
    Collector collector(job);
    collector.template of<T>(job.views[operand::x]);
    collector.template of<M>(job.views[operand::unconditional]);
    collector.template of<M>(job.views[operand::conditional]);
    return collector.fits() ? launch_fit<DenseSource<T, M>>(job, stream) : NOT_CONTIGUOUS;
  });
  if (code != NOT_CONTIGUOUS) return code;
  if (job.ndim > STRIDED_DIMS) return cudaErrorInvalidConfiguration;
  return job.float64 ? launch_fit<StridedSource<double>>(job, stream)
                     : launch_fit<StridedSource<float>>(job, stream);
}

}  // namespace FASTDDIM_NAMESPACE
