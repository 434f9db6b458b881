// The elements of a chunk in registers: loaded, stored and converted as whole words.

#pragma once

#include <stdint.h>

#include <type_traits>

#include "../dtypes.h"
#include "grid.cuh"

namespace FASTDDIM_NAMESPACE {

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

// A tensor that is contiguous within each sample.
struct DenseView {
  void* data;             // null where the tensor is absent
  uint32_t sample_bytes;  // from a sample to the next one
};

// The bytes to which a tensor must be aligned for its chunks to be moved in words.
template <class T, int SIZE>
constexpr int ALIGNMENT = SIZE * sizeof(T) < 32 ? 16 : 32;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int WIDEST = 32;
#else
constexpr int WIDEST = 16;
#endif

struct alignas(32) uint8 {
  uint32_t words[8];
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
template <>
struct Word<32> {
  using type = uint8;
};

// Words that are read only once: evicted first, which leaves the model's next input in the cache.
template <class W>
FASTDDIM_FN W load_word(const W* from) {
  return __ldcs(from);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
FASTDDIM_FN uint8 load_word(const uint8* from) {
  uint8 word;
  uint32_t* const w = word.words;
  asm volatile("ld.global.cs.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]), "=r"(w[4]), "=r"(w[5]), "=r"(w[6]),
                 "=r"(w[7])
               : "l"(from));
  return word;
}
FASTDDIM_FN void store_word(uint8* to, const uint8& word) {
  const uint32_t* const w = word.words;
  asm volatile("st.global.v8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};" ::"l"(to), "r"(w[0]),
               "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(w[4]), "r"(w[5]), "r"(w[6]), "r"(w[7])
               : "memory");
}
#endif

// One instruction each: the compiler splits a plain store of elements that it knows one by one.
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
  static constexpr int BYTES = SIZE * (int)sizeof(T);
  static constexpr int WORD_BYTES = BYTES % WIDEST == 0 ? WIDEST : BYTES % 16 == 0 ? 16 : 8;
  using Word = typename Word<WORD_BYTES>::type;
  static constexpr int WORDS = BYTES / WORD_BYTES;
  uint32_t words[BYTES / 4];
};

template <class T, int SIZE>
FASTDDIM_FN T* address(const DenseView& view, const Chunk& chunk) {
  return (T*)((char*)view.data + (uint64_t)chunk.sample * view.sample_bytes +
              (uint64_t)chunk.index * (SIZE * sizeof(T)));
}

template <class T, int SIZE>
FASTDDIM_FN Pack<T, SIZE> load_words(const DenseView& view, const Chunk& chunk) {
  using P = Pack<T, SIZE>;
  const auto* from = (const typename P::Word*)address<T, SIZE>(view, chunk);
  P pack;
  FASTDDIM_UNROLL
  for (int i = 0; i < P::WORDS; ++i) {
    const typename P::Word word = load_word(from + i);
    __builtin_memcpy(pack.words + i * P::WORD_BYTES / 4, &word, sizeof word);
  }
  return pack;
}

template <class T, int SIZE>
FASTDDIM_FN Pack<T, SIZE> load_elements(const DenseView& view, const Chunk& chunk, int count) {
  const T* from = address<T, SIZE>(view, chunk);
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
FASTDDIM_FN Pack<T, SIZE> load(const DenseView& view, const Grid& grid, const Chunk& chunk) {
  if (chunk.wide) return load_words<T, SIZE>(view, chunk);
  return load_elements<T, SIZE>(view, chunk, elements_of<SIZE>(grid, chunk));
}

template <class T, int SIZE>
FASTDDIM_FN void store(const DenseView& view, const Grid& grid, const Chunk& chunk,
                       const Pack<T, SIZE>& pack) {
  using P = Pack<T, SIZE>;
  T* to = address<T, SIZE>(view, chunk);
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

// The stored state, cast for the model.
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

}  // namespace FASTDDIM_NAMESPACE
