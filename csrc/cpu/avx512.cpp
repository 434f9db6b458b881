// The kernel for AVX-512.

#if defined(__x86_64__)

#define FASTDDIM_NAMESPACE fastddim_avx512
#include "target.h"
FASTDDIM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

// GCC before 13 warns of its own intrinsics here (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "../scalar.h"

namespace FASTDDIM_NAMESPACE {

#define FASTDDIM_LANES 16
#include "vector.h"

FASTDDIM_FN Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FASTDDIM_FN Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
FASTDDIM_FN Floats root(Floats a) { return _mm512_sqrt_ps(a); }
FASTDDIM_FN FloatParts fma(FloatParts a, FloatParts b, FloatParts c) {
  return FASTDDIM_EACH(Floats, fma(a.part[i], b.part[i], c.part[i]));
}
FASTDDIM_FN FloatParts root(FloatParts a) { return FASTDDIM_EACH(Floats, root(a.part[i])); }

FASTDDIM_FN Floats from_half(const uint16_t* a) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)a));
}
FASTDDIM_FN void to_half(uint16_t* out, Floats a) {
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
FASTDDIM_FN void finish_streams() { _mm_sfence(); }
FASTDDIM_FN void stream(float* out, Floats a) { _mm512_stream_ps(out, a); }
FASTDDIM_FN void stream(double* out, Doubles a) { _mm512_stream_pd(out, a); }

// Eight 64-bit lanes, each with one 32-bit word in its low half; the high half is ignored.
using Words = __m512i;
FASTDDIM_FN Words words(uint32_t value) { return _mm512_set1_epi64(value); }
FASTDDIM_FN Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
FASTDDIM_FN Words mixed(Words high, Words b, Words c) {
  return _mm512_ternarylogic_epi64(_mm512_srli_epi64(high, 32), b, c, 0x96);
}
// Each product with a summand.
FASTDDIM_FN Words sums(const int64_t* products, uint64_t summand) {
  return _mm512_add_epi64(_mm512_loadu_si512(products), _mm512_set1_epi64((int64_t)summand));
}

// Words of two in turns, the low or the high ones: sixteen lanes of 32 bits.
FASTDDIM_FN Words merged(Words even, Words odd) {
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
FASTDDIM_FN Words merged_high(Words even, Words odd) {
  return _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
// Merging takes fewer instructions but is slower, by 4 % on Zen 4.
constexpr bool LAST_ROUND_MERGES = false;
// Rounded once.
FASTDDIM_FN Floats floats_of(Words word) { return _mm512_cvtepu32_ps(word); }

// Lane 4l + i of z_k is element k of quad 4i + l: after two rounds of unpacking, register i holds
// the quads 4i … 4i + 3 in memory order.
FASTDDIM_FN void order_quads(Floats z_0, Floats z_1, Floats z_2, Floats z_3, Floats (&ordered)[4]) {
  __m512d low_01 = _mm512_castps_pd(_mm512_unpacklo_ps(z_0, z_1));
  __m512d low_23 = _mm512_castps_pd(_mm512_unpacklo_ps(z_2, z_3));
  __m512d high_01 = _mm512_castps_pd(_mm512_unpackhi_ps(z_0, z_1));
  __m512d high_23 = _mm512_castps_pd(_mm512_unpackhi_ps(z_2, z_3));
  ordered[0] = (_mm512_castpd_ps(_mm512_unpacklo_pd(low_01, low_23)));
  ordered[1] = (_mm512_castpd_ps(_mm512_unpackhi_pd(low_01, low_23)));
  ordered[2] = (_mm512_castpd_ps(_mm512_unpacklo_pd(high_01, high_23)));
  ordered[3] = (_mm512_castpd_ps(_mm512_unpackhi_pd(high_01, high_23)));
}

}  // namespace FASTDDIM_NAMESPACE

#include "kernel.h"

namespace fastddim {
const Kernels AVX512 = {"avx512", &FASTDDIM_NAMESPACE::update, &FASTDDIM_NAMESPACE::backward,
                        &FASTDDIM_NAMESPACE::normal, &FASTDDIM_NAMESPACE::fit};
}

FASTDDIM_TARGET_END

#endif
