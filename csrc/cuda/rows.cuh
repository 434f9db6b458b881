// Rows of coefficients and keys of noise, which are read from device memory.

#pragma once

#include <stdint.h>

#include "../formula.h"
#include "../job.h"
#include "grid.cuh"

namespace FASTDDIM_NAMESPACE {

using fastddim::Job;

// The low word of an integer, which holds all of its bits here.
FASTDDIM_FN uint32_t low_word(const int64_t* at) {
  uint32_t word;
  __builtin_memcpy(&word, __builtin_assume_aligned(at, sizeof *at), sizeof word);
  return word;
}

// Stands for a stride where all samples have the first row.
constexpr uint32_t NO_INDEX = 2;

// Coefficients and keys, in device memory.
struct Rows {
  const void* table;
  const int64_t* row;
  uint32_t row_stride;  // 0, 1 or NO_INDEX
  const int64_t *seed, *step, *sample;
  uint32_t stream;
};

// Without indices a thread does not wait for an index before it loads its row.
template <class C>
FASTDDIM_FN const C* row_at(const Rows& rows, uint32_t sample) {
  uint32_t row = 0;
  if (rows.row_stride != NO_INDEX) row = low_word(rows.row + sample * rows.row_stride);
#if defined(__CUDA_ARCH__)
  // Opaque: one multiply-add then makes the address, while a product in the choice takes three.
  asm("" : "+r"(row));
#endif
  return (const C*)rows.table + (uint64_t)row * ROW_FIELDS;
}

template <class C>
FASTDDIM_FN Row<C> row_of(const Rows& rows, uint32_t sample) {
  const C* at = row_at<C>(rows, sample);
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], at[11]};
}

// The words of a row, in a table that is aligned to them.
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

inline Rows rows_of(const Job& job) {
  const uint32_t stride = job.row ? (uint32_t)job.row_stride : NO_INDEX;
  return {job.table, job.row, stride, job.seed, job.step, job.sample, job.stream};
}

}  // namespace FASTDDIM_NAMESPACE
