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
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
static thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
static cudaError_t cudaGetLastError() { return cudaSuccess; }
static const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

template <class T>
static T __ldcs(const T* from) {
  return *from;
}

template <class Turn>
static void for_each_index(const dim3& sizes, dim3& index, Turn turn) {
  for (index.z = 0; index.z < sizes.z; ++index.z) {
    for (index.y = 0; index.y < sizes.y; ++index.y) {
      for (index.x = 0; index.x < sizes.x; ++index.x) turn();
    }
  }
}

template <class Kernel>
static void for_each_thread(const dim3& blocks, const dim3& threads, Kernel kernel) {
  gridDim = blocks, blockDim = threads;
  for_each_index(blocks, blockIdx, [&] { for_each_index(threads, threadIdx, kernel); });
}

#define FASTDDIM_LAUNCH(kernel, extent, stream, ...) \
  (void)(stream), for_each_thread((extent).blocks, (extent).threads, [&] { kernel(__VA_ARGS__); })

#include "../../csrc/cuda/update.cu"
