// The run of a job on the CPU: its instruction set and its threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "../job.h"
#include "../layout.h"

namespace fastddim {

// A second thread costs about as much as this many elements.
constexpr int64_t GRAIN = 32768, NOISY_GRAIN = 16384;

// Above this many bytes the output would only push the inputs out of the caches.
constexpr int64_t STREAMING_BYTES = 16 << 20;

const Kernels& current_kernels();

inline void run(const Job& job, Kernel kernel, bool noisy) {
  const int64_t per_tile = std::max<int64_t>(std::min(job.count, job.tile), 1);
  const int64_t grain = std::max<int64_t>((noisy ? NOISY_GRAIN : GRAIN) / per_tile, 1);
  const int64_t tiles = job.batch * job.tiles_per_sample();
  if (tiles <= grain) return kernel(job, 0, tiles);
  torch::stable::parallel_for(0, tiles, grain,
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

// Sets what follows from an update's layout: its tiles, and whether its output bypasses the caches.
inline void set_tiles(Job& job, const JobLayout& layout) {
  const Dtype computed = job.float64 ? Dtype::float64 : Dtype::float32;
  if (!job.seed && layout.direct(computed)) job.tile = DIRECT_TILE;
  const View& out = job.views[operand::out];
  job.streaming = out.data != job.views[operand::x].data && !job.views[operand::model_input].data &&
                  job.batch * job.count * size_of(out.dtype) >= STREAMING_BYTES;
}

}  // namespace fastddim
