// The choice among the kernels of this library for the CPU at hand.

#pragma once

#include <cstdlib>
#include <cstring>

#include "../job.h"

namespace fastddim {

inline const Kernels* supported_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (!name || !std::strcmp(name, AVX512.name))) return &AVX512;
  if (avx2 && (!name || !std::strcmp(name, AVX2.name))) return &AVX2;
#endif
  return !name || !std::strcmp(name, PLAIN.name) ? &PLAIN : nullptr;
}

}  // namespace fastddim
