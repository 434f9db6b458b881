// The operations that formula.h needs beyond + − * and comparison, for one element, on a CPU or in
// a CUDA kernel.

#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FASTDDIM_FN __host__ __device__ __forceinline__
#else
#define FASTDDIM_FN inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define FASTDDIM_UNROLL _Pragma("unroll")
#define FASTDDIM_NO_UNROLL _Pragma("unroll 1")
#else
#define FASTDDIM_UNROLL
#define FASTDDIM_NO_UNROLL
#endif

// A header compiled for several instruction sets needs one namespace for each: the linker keeps one
// copy of equal names, and that copy may use instructions that the caller's CPU lacks.
#if !defined(FASTDDIM_NAMESPACE)
#define FASTDDIM_NAMESPACE fastddim_default
#endif

namespace FASTDDIM_NAMESPACE {

FASTDDIM_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTDDIM_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

#if defined(__CUDA_ARCH__)
// The square root, rounded to nearest, of 0 or a number in [2^-26, 2^6]: the operations that
// sqrt.rn.f32 consists of in this range, without the branch for other numbers. Where a is 0 the
// reciprocal is infinite, and any finite number takes its place.
FASTDDIM_FN float root(float a) {
  float reciprocal;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(a));
  reciprocal = __builtin_fminf(__builtin_fabsf(reciprocal), 0x1p+40f);
  float approximate = a * reciprocal;
  return fma(fma(-approximate, approximate, a), 0.5f * reciprocal, approximate);
}

// `a` clamped to [-limit, limit]; NaN stays NaN, and a limit of NaN has no effect.
FASTDDIM_FN float clamped(float a, float limit) {
  limit = __builtin_fminf(limit, __builtin_inff());
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(-limit));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(limit));
  return a;
}
#else
FASTDDIM_FN float root(float a) { return __builtin_sqrtf(a); }
#endif

// A product of two words.
struct Product {
  uint32_t high, low;
};
#if defined(__CUDA_ARCH__)
// Taken apart as a pair of registers, since ptxas adds 0 to the upper one for a shift by 32.
FASTDDIM_FN Product product(uint32_t a, uint32_t b) {
  Product product;
  asm("{\n\t.reg .b64 product;\n\t"
      "mul.wide.u32 product, %2, %3;\n\t"
      "mov.b64 {%0, %1}, product;\n\t}"
      : "=r"(product.low), "=r"(product.high)
      : "r"(a), "r"(b));
  return product;
}
#else
FASTDDIM_FN Product product(uint32_t a, uint32_t b) {
  const uint64_t product = (uint64_t)a * b;
  return {(uint32_t)(product >> 32), (uint32_t)product};
}
#endif

FASTDDIM_FN int32_t bits(float a) {
  int32_t word;
  __builtin_memcpy(&word, &a, sizeof word);
  return word;
}
FASTDDIM_FN float from_bits(int32_t word) {
  float a;
  __builtin_memcpy(&a, &word, sizeof a);
  return a;
}
FASTDDIM_FN float to_float(int32_t a) { return (float)a; }
FASTDDIM_FN int32_t truncated(float a) { return (int32_t)a; }
FASTDDIM_FN float select(bool condition, float a, float b) { return condition ? a : b; }
FASTDDIM_FN float splat(float, float value) { return value; }
FASTDDIM_FN double splat(double, double value) { return value; }

}  // namespace FASTDDIM_NAMESPACE
