// The update and the noise, once, for every compiler and instruction set.
//
// The functions are templates over a value type: a scalar, or a vector of lanes that has the same
// operators. Every fused multiply-add is written out and contraction is off everywhere, so all
// instantiations give the same bits. Names are those of fastddim/reference.py and
// fastddim/philox.py, which specify what is computed here.
//
// Included after `fma` and `root` are declared for the value types in use; see scalar.h.

#pragma once

#include <stdint.h>

#include "scalar.h"

namespace FASTDDIM_NAMESPACE {

template <class V>
struct Row {
  V cx, cm, r, k0, kx, km, pn, g, ph, e0, ex, em;
};
constexpr int ROW_FIELDS = 12;

template <class V>
FASTDDIM_FN V guided(const Row<V>& row, V unconditional, V conditional) {
  return fma(row.g, conditional - unconditional, unconditional);
}

template <class V>
FASTDDIM_FN V unclipped_x_0(const Row<V>& row, V x, V m) {
  return fma(row.cx, x, row.cm * m);
}

// NaN passes through, since the comparisons are false for it.
template <class V>
FASTDDIM_FN V clamped(V a, V limit) {
  V floored = a < -limit ? -limit : a;
  return floored > limit ? limit : floored;
}

template <class V>
FASTDDIM_FN V clipped(const Row<V>& row, V x_0) {
  return clamped(x_0, row.r);
}

template <class V>
FASTDDIM_FN V noiseless(const Row<V>& row, V x, V m, V x_0) {
  return fma(row.k0, x_0, fma(row.kx, x, row.km * m));
}

template <class V>
FASTDDIM_FN V epsilon(const Row<V>& row, V x, V m, V x_0) {
  return fma(row.e0, x_0, fma(row.ex, x, row.em * m));
}

template <class V>
FASTDDIM_FN V blended(V x_prev, V mask, V known) {
  return fma(mask, known - x_prev, x_prev);
}

template <class V, int N>
FASTDDIM_FN V polynomial(const float (&coefficients)[N], V x) {
  V value = splat(x, coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) value = fma(value, x, splat(x, coefficients[i]));
  return value;
}

// ln u for u in [2^-33, 1]; 1.41 ulp. The exponent stays where it is in the word, as 2^23 times its
// value, which changes no rounding.
template <class V>
FASTDDIM_FN V ln(V u) {
  constexpr float coefficients[] = {-0x1.fffffap-2f, 0x1.5556f6p-2f,  -0x1.0004cap-2f,
                                    0x1.98d22cp-3f,  -0x1.53522ap-3f, 0x1.3174c8p-3f,
                                    -0x1.25183ap-3f, 0x1.6607fep-4f};
  auto word = bits(u);
  auto exponent = (word - 0x3F3504F3) & -0x800000;
  V f = from_bits(word - exponent) - splat(u, 1.0f);
  V mantissa = fma(f * f, polynomial(coefficients, f), f);
  return fma(to_float(exponent), splat(u, 0x1.62e430p-24f), mantissa);
}

// sin 2πu and cos 2πu for u in [0, 1], up to a change of sign of both, which is returned: bit 31 is
// set where both signs change, and no other bit ever is; 0.88 ulp.
template <class V>
FASTDDIM_FN auto sincos_2pi(V u, V& sine, V& cosine) {
  constexpr float odd[] = {-0x1.a32bd0p-23f, -0x1.4abbbap+5f, 0x1.465eeap+6f, -0x1.2da156p+6f};
  constexpr float even[] = {1.0f, -0x1.3bd3ccp+4f, 0x1.03c1aep+6f, -0x1.55b146p+6f, 0x1.d47d48p+5f};
  auto quarter = truncated(fma(u, splat(u, 4.0f), splat(u, 0.5f)));
  V r = fma(to_float(quarter), splat(u, -0.25f), u);
  V square = r * r;
  V s = fma(r, splat(u, 0x1.921fb6p+2f), r * polynomial(odd, square));
  V c = polynomial(even, square);
  auto swapped = (quarter & 1) != 0;
  sine = select(swapped, c, s);
  cosine = select(swapped, -s, c);
  // Bit 1 of the quarter.
  return (quarter << 30) & INT32_MIN;
}

// u in (0, 1], from a word that was rounded to float once.
template <class V>
FASTDDIM_FN V uniform(V word) {
  return fma(word, splat(word, 0x1p-32f), splat(word, 0x1p-33f));
}

template <class V>
FASTDDIM_FN void box_muller(V word_0, V word_1, V& z_0, V& z_1) {
  V radius = root(ln(uniform(word_0)) * splat(word_0, -2.0f));
  V sine, cosine;
  auto sign = sincos_2pi(uniform(word_1), sine, cosine);
  radius = from_bits(bits(radius) ^ sign);
  z_0 = radius * cosine;
  z_1 = radius * sine;
}

constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_WEYL_0 = 0x9E3779B9u, PHILOX_WEYL_1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;
// The keys of the noise of one sample at one step; fastddim/philox.py lists the noise streams.
struct Key {
  uint64_t seed;
  uint32_t step, sample, stream;
};

// The words of N quads from `first` on, `apart` from each other. They are computed in step, since
// they share the keys of the rounds.
template <int N>
FASTDDIM_FN void philox(const Key& key, uint32_t first, uint32_t (&counters)[N][4],
                        uint32_t apart = 1) {
  for (int i = 0; i < N; ++i) {
    counters[i][0] = first + (uint32_t)i * apart;
    counters[i][1] = key.step;
    counters[i][2] = key.sample;
    counters[i][3] = key.stream;
  }
  uint32_t k_0 = (uint32_t)key.seed, k_1 = (uint32_t)(key.seed >> 32);
  FASTDDIM_UNROLL
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    for (auto& counter : counters) {
      const Product product_0 = product(PHILOX_MULTIPLIER_0, counter[0]);
      const Product product_1 = product(PHILOX_MULTIPLIER_1, counter[2]);
      counter[0] = product_1.high ^ counter[1] ^ k_0;
      counter[1] = product_1.low;
      counter[2] = product_0.high ^ counter[3] ^ k_1;
      counter[3] = product_0.low;
    }
    k_0 += PHILOX_WEYL_0;
    k_1 += PHILOX_WEYL_1;
  }
}

FASTDDIM_FN void normals_of_words(const uint32_t (&words)[4], float (&z)[4]) {
  box_muller((float)words[0], (float)words[1], z[0], z[1]);
  box_muller((float)words[2], (float)words[3], z[2], z[3]);
}

// The normals of elements 4·quad … 4·quad + 3.
FASTDDIM_FN void normals_of_quad(const Key& key, uint32_t quad, float (&z)[4]) {
  uint32_t words[1][4];
  philox(key, quad, words);
  normals_of_words(words[0], z);
}

}  // namespace FASTDDIM_NAMESPACE
