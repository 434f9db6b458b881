// The two 16-bit floating-point types, and conversions between storage and compute types, rounded
// to nearest, ties to even, on a CPU and in a CUDA kernel.

#pragma once

#include <stdint.h>

#include "scalar.h"

namespace FASTDDIM_NAMESPACE {

struct Half {
  uint16_t word;
};
struct BFloat16 {
  uint16_t word;
};

FASTDDIM_FN float widened(float a) { return a; }
FASTDDIM_FN double widened(double a) { return a; }
FASTDDIM_FN float widened(BFloat16 a) { return from_bits((int32_t)((uint32_t)a.word << 16)); }

FASTDDIM_FN void narrow(float a, float& out) { out = a; }
FASTDDIM_FN void narrow(double a, double& out) { out = a; }
FASTDDIM_FN void narrow(float a, double& out) { out = a; }

#if defined(__CUDA_ARCH__)

FASTDDIM_FN float widened(Half a) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(a.word));
  return value;
}
FASTDDIM_FN void narrow(float a, Half& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.word) : "f"(a));
}
FASTDDIM_FN void narrow(float a, BFloat16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.word) : "f"(a));
}
FASTDDIM_FN void narrow_pair(float a, float b, Half, uint32_t& pair) {
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
}
FASTDDIM_FN void narrow_pair(float a, float b, BFloat16, uint32_t& pair) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
}

#else

FASTDDIM_FN float widened(Half a) {
  uint32_t sign = (uint32_t)(a.word & 0x8000) << 16, magnitude = a.word & 0x7FFF;
  // Moved to the float's exponent field, the value is off by 2^112; multiplying also normalises
  // subnormals.
  float scaled = from_bits((int32_t)(magnitude << 13)) * 0x1p112f;
  uint32_t special = magnitude >= 0x7C00 ? 0x7F800000 | magnitude << 13 : (uint32_t)bits(scaled);
  return from_bits((int32_t)(sign | special));
}
FASTDDIM_FN void narrow(float a, BFloat16& out) {
  uint32_t word = (uint32_t)bits(a);
  uint32_t even = word + 0x7FFF + (word >> 16 & 1);
  out.word = (uint16_t)(a != a ? 0x7FC0 : even >> 16);
}
FASTDDIM_FN void narrow(float a, Half& out) {
  uint32_t word = (uint32_t)bits(a), sign = word >> 16 & 0x8000, magnitude = word & 0x7FFFFFFF;
  uint32_t result;
  if (magnitude >= 0x47800000) {  // 2^16 and above, infinity, NaN
    result = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the sum's own rounding leaves a subnormal
    result = (uint32_t)bits(from_bits((int32_t)magnitude) + 0.5f) - 0x3F000000;
  } else {
    result = (magnitude + 0xC8000FFF + (magnitude >> 13 & 1)) >> 13;
  }
  out.word = (uint16_t)(sign | result);
}

#endif

// By way of float, as torch converts.
FASTDDIM_FN void narrow(double a, float& out) { out = (float)a; }
FASTDDIM_FN void narrow(double a, Half& out) { narrow((float)a, out); }
FASTDDIM_FN void narrow(double a, BFloat16& out) { narrow((float)a, out); }

// Two neighbours in memory, the first one in the lower half of a word.
template <class T>
FASTDDIM_FN void widen_pair(uint32_t pair, T, float& a, float& b) {
  a = widened(T{(uint16_t)pair});
  b = widened(T{(uint16_t)(pair >> 16)});
}
// Written out, for compilers that would move the upper half down and up again.
FASTDDIM_FN void widen_pair(uint32_t pair, BFloat16, float& a, float& b) {
  a = from_bits((int32_t)(pair << 16));
  b = from_bits((int32_t)(pair & 0xFFFF0000));
}
template <class T>
FASTDDIM_FN void narrow_pair(float a, float b, T, uint32_t& pair) {
  T halves[2];
  narrow(a, halves[0]);
  narrow(b, halves[1]);
  pair = halves[0].word | (uint32_t)halves[1].word << 16;
}

}  // namespace FASTDDIM_NAMESPACE
