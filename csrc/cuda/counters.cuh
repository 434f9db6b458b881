// The counters of a loop.

#pragma once

#include <stdint.h>

#include "grid.cuh"

namespace FASTDDIM_NAMESPACE {

__global__ void __launch_bounds__(BLOCK)
    advance(int64_t* counters, int64_t count, const int64_t* timesteps, int64_t* t,
            int64_t t_count) {
  for (int64_t i = threadIdx.x; i < count; i += BLOCK) {
    const int64_t next = counters[i] + 1;
    counters[i] = next;
    if (i < t_count) t[i] = timesteps[next];
  }
}

inline int launch_advance(int64_t* counters, int64_t count, const int64_t* timesteps, int64_t* t,
                          int64_t t_count, void* stream) {
  const Extent extent{{1, 1, 1}, {BLOCK, 1, 1}};
  FASTDDIM_LAUNCH(advance, extent, stream, counters, count, timesteps, t, t_count);
  return cudaGetLastError();
}

}  // namespace FASTDDIM_NAMESPACE
