// The CUDA kernels as plain C++, for AddressSanitizer and UndefinedBehaviorSanitizer: each thread
// of a launch is one turn of a loop. There are no barriers and no shared memory to model.

#include <stdint.h>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8)));
struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct Index {
  uint32_t x;
};
static thread_local Index blockIdx, threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
static cudaError_t cudaGetLastError() { return cudaSuccess; }
static const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

template <class T>
static T __ldcs(const T* from) {
  return *from;
}

template <class Kernel>
static void for_each_thread(uint32_t blocks, uint32_t threads, Kernel kernel) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
  }
}

#define FASTDDIM_LAUNCH(kernel, grid, block, stream, ...) \
  (void)(stream), for_each_thread(grid, block, [&] { kernel(__VA_ARGS__); })

#include "../../csrc/cuda/update.cu"
