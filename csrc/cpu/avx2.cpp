// The kernel for AVX2.

#if defined(__x86_64__)

#define FASTDDIM_NAMESPACE fastddim_avx2
#include "target.h"
FASTDDIM_TARGET_BEGIN("avx2,fma,f16c")

#include <immintrin.h>

#include "../scalar.h"

namespace FASTDDIM_NAMESPACE {

#define FASTDDIM_LANES 8
#include "vector.h"

FASTDDIM_FN Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
FASTDDIM_FN Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
FASTDDIM_FN Floats root(Floats a) { return _mm256_sqrt_ps(a); }
FASTDDIM_FN FloatParts fma(FloatParts a, FloatParts b, FloatParts c) {
  return FASTDDIM_EACH(Floats, fma(a.part[i], b.part[i], c.part[i]));
}
FASTDDIM_FN FloatParts root(FloatParts a) { return FASTDDIM_EACH(Floats, root(a.part[i])); }

FASTDDIM_FN Floats from_half(const uint16_t* a) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)a));
}
FASTDDIM_FN void to_half(uint16_t* out, Floats a) {
  _mm_storeu_si128((__m128i*)out, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
FASTDDIM_FN void finish_streams() { _mm_sfence(); }
FASTDDIM_FN void stream(float* out, Floats a) { _mm256_stream_ps(out, a); }
FASTDDIM_FN void stream(double* out, Doubles a) { _mm256_stream_pd(out, a); }

// Four 64-bit lanes, each with one 32-bit word in its low half; the high half is ignored.
using Words = __m256i;
FASTDDIM_FN Words words(uint32_t value) { return _mm256_set1_epi32((int)value); }
FASTDDIM_FN Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
FASTDDIM_FN Words mixed(Words high, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(high, 32), b), c);
}
// Each product with a summand.
FASTDDIM_FN Words sums(const int64_t* products, uint64_t summand) {
  const __m256i all = _mm256_loadu_si256((const __m256i*)products);
  return _mm256_add_epi64(all, _mm256_set1_epi64x((int64_t)summand));
}

// Words of two in turns, the low or the high ones: eight lanes of 32 bits.
FASTDDIM_FN Words merged(Words even, Words odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
FASTDDIM_FN Words merged_high(Words even, Words odd) {
  return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
// This halves the mixing, and needs fewer registers at a time.
constexpr bool LAST_ROUND_MERGES = true;
// Rounded once: AVX2 converts signed words only, so the halves are converted exactly and added with
// the one rounding.
FASTDDIM_FN Floats floats_of(Words word) {
  Floats high = _mm256_cvtepi32_ps(_mm256_srli_epi32(word, 16));
  Floats low = _mm256_cvtepi32_ps(_mm256_and_si256(word, _mm256_set1_epi32(0xFFFF)));
  return fma(high, splat(high, 65536.0f), low);
}

// Lane 4l + i of z_k is element k of quad 2i + l: after two rounds of unpacking, register i holds
// the quads 2i and 2i + 1 in memory order.
FASTDDIM_FN void order_quads(Floats z_0, Floats z_1, Floats z_2, Floats z_3, Floats (&ordered)[4]) {
  __m256d low_01 = _mm256_castps_pd(_mm256_unpacklo_ps(z_0, z_1));
  __m256d low_23 = _mm256_castps_pd(_mm256_unpacklo_ps(z_2, z_3));
  __m256d high_01 = _mm256_castps_pd(_mm256_unpackhi_ps(z_0, z_1));
  __m256d high_23 = _mm256_castps_pd(_mm256_unpackhi_ps(z_2, z_3));
  ordered[0] = (_mm256_castpd_ps(_mm256_unpacklo_pd(low_01, low_23)));
  ordered[1] = (_mm256_castpd_ps(_mm256_unpackhi_pd(low_01, low_23)));
  ordered[2] = (_mm256_castpd_ps(_mm256_unpacklo_pd(high_01, high_23)));
  ordered[3] = (_mm256_castpd_ps(_mm256_unpackhi_pd(high_01, high_23)));
}

}  // namespace FASTDDIM_NAMESPACE

#include "kernel.h"

namespace fastddim {
const Kernels AVX2 = {"avx2", &FASTDDIM_NAMESPACE::update, &FASTDDIM_NAMESPACE::backward,
                      &FASTDDIM_NAMESPACE::normal, &FASTDDIM_NAMESPACE::fit};
}

FASTDDIM_TARGET_END

#endif
