// The arithmetic of rescaled rows that every device shares, without the sums and the selection over
// a sample. rescaled_rows in fastddim/reference.py specifies it.

#pragma once

#include <stdint.h>

#include "formula.h"

namespace FASTDDIM_NAMESPACE {

// Sums over a sample have the same order for every device, number of threads and batch, so their
// bits depend on none of these: element i is added to accumulator i mod ACCUMULATORS, in ascending
// order. The upper half of the accumulators is then added to the lower half, until one is left.
constexpr int ACCUMULATORS = 256;

// The sum of squared deviations from the mean, by the sums of d and of d·d, where d is the distance
// of a value from some number near all of them.
FASTDDIM_FN double squared_deviations(double sum, double square, int64_t count) {
  return square - sum * sum / (double)count;
}

// The factor of a guided model output, from squared deviations; 1 where there are none to compare.
template <class C>
FASTDDIM_FN C rescaling_factor(double of_conditional, double of_guided, double rescale) {
  const double ratio = __builtin_sqrt(of_conditional / of_guided);
  const bool finite = ratio - ratio == 0;
  return (C)(rescale * (finite ? ratio : 1) + (1 - rescale));
}

template <class C>
FASTDDIM_FN void rescale_row(Row<C>& row, C factor) {
  row.cm *= factor;
  row.km *= factor;
  row.em *= factor;
}

// The order statistics that a quantile lies between, counted from 0, and its distance from the
// lower one as a part of the way to the upper one.
struct Quantile {
  int64_t rank;
  double fraction;

  FASTDDIM_FN Quantile(double ratio, int64_t count) {
    const double position = ratio * (double)(count - 1);
    rank = (int64_t)position;
    fraction = position - (double)rank;
  }
};

// The threshold: the quantile, between 1 and the limit.
template <class C>
FASTDDIM_FN C threshold_between(C low, C high, double fraction, double limit) {
  const C s = low + (high - low) * (C)fraction;
  const C floored = s < 1 ? (C)1 : s;
  return floored > limit ? (C)limit : floored;
}

template <class C>
FASTDDIM_FN void threshold_row(Row<C>& row, C threshold) {
  row.cx /= threshold;
  row.cm /= threshold;
  row.r = 1;
}

// Magnitudes as words, which have the order of the values; those of NaN are above INFINITE.
template <class C>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Word = uint32_t;
  static constexpr int BITS = 31;
  static constexpr Word INFINITE = 0x7F800000u;
};
template <>
struct Magnitude<double> {
  using Word = uint64_t;
  static constexpr int BITS = 63;
  static constexpr Word INFINITE = 0x7FF0000000000000u;
};

template <class C>
FASTDDIM_FN typename Magnitude<C>::Word magnitude_of(C value) {
  typename Magnitude<C>::Word word;
  __builtin_memcpy(&word, &value, sizeof word);
  return word & ~((typename Magnitude<C>::Word)1 << Magnitude<C>::BITS);
}

template <class C>
FASTDDIM_FN C value_of(typename Magnitude<C>::Word word) {
  C value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// The bits of magnitudes that one pass of a selection counts by.
constexpr int DIGIT = 11;

}  // namespace FASTDDIM_NAMESPACE
