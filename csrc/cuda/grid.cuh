// The division of a batch among the threads of a launch.

#pragma once

#include <limits.h>
#include <stdint.h>

#include "../scalar.h"

// Tests that run the kernels as plain C++ define a launch of their own.
#if !defined(FASTDDIM_LAUNCH)
#define FASTDDIM_LAUNCH(kernel, extent, stream, ...) \
  kernel<<<(extent).blocks, (extent).threads, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#endif

// A function that only kernels call.
#define FASTDDIM_DEVICE __device__ __forceinline__

namespace FASTDDIM_NAMESPACE {

constexpr int BLOCK = 256;

// The chunks that threads take. Along x: chunks of a sample, in tiles of BLOCK. Along y and z:
// samples; a block takes several of them where they are small.
struct Grid {
  int64_t count;
  uint32_t batch, chunks;
  uint32_t wide;  // chunks of a sample, the first ones, that are moved in words
};

// One thread's chunk: elements from `element` on of `sample`.
struct Chunk {
  uint32_t sample, index;
  int64_t element;
  bool wide;
};

template <int SIZE>
FASTDDIM_FN bool chunk_of(const Grid& grid, Chunk& chunk) {
  chunk.sample = (blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
  chunk.index = blockIdx.x * BLOCK + threadIdx.x;
  chunk.element = (int64_t)chunk.index * SIZE;
  chunk.wide = chunk.index < grid.wide;
  return chunk.sample < grid.batch && chunk.index < grid.chunks;
}

template <int SIZE>
FASTDDIM_FN int elements_of(const Grid& grid, const Chunk& chunk) {
  const int64_t rest = grid.count - chunk.element;
  return rest < SIZE ? (int)rest : SIZE;
}

struct Extent {
  dim3 blocks, threads;
};

// Sets the grid and its extent; false where one launch has too few threads for the chunks.
inline bool make_grid(Grid& grid, Extent& extent, int64_t batch, int64_t count, int64_t size) {
  constexpr int64_t ALONG_Y = 0xFFFF, ALONG_Z = 0xFFFF;  // the most blocks that there may be
  const int64_t chunks = (count + size - 1) / size, tiles = (chunks + BLOCK - 1) / BLOCK;
  int64_t samples = chunks < BLOCK ? BLOCK / chunks : 1;
  if (samples > batch) samples = batch;
  const int64_t groups = (batch + samples - 1) / samples, planes = (groups + ALONG_Y - 1) / ALONG_Y;
  if (batch > INT_MAX || chunks > INT_MAX || planes > ALONG_Z) return false;
  grid = {count, (uint32_t)batch, (uint32_t)chunks, 0};
  extent.blocks = {(uint32_t)tiles, (uint32_t)(groups < ALONG_Y ? groups : ALONG_Y),
                   (uint32_t)planes};
  extent.threads = {(uint32_t)(chunks < BLOCK ? chunks : BLOCK), (uint32_t)samples, 1};
  return true;
}

}  // namespace FASTDDIM_NAMESPACE
