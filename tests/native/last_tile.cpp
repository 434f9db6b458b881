// The last tile of a sample far too large to allocate: the tensors' addresses are set back so that
// only its end lies in memory.

#include <cstdint>

#include "../../csrc/cpu/select.h"

namespace {

fastddim::View view_of(float* end, int64_t extent, const int64_t* strides, bool contiguous) {
  fastddim::View view;
  view.data = (char*)((uintptr_t)end - 4 * (uintptr_t)extent);
  view.strides = strides;
  view.contiguous = contiguous;
  return view;
}

}  // namespace

// A sample of [rows, width] whose rows are `pitch` apart. x, m and out point one past their last
// element. Returns the number of elements in the last tile, or 0 where the CPU lacks the
// instruction set.
extern "C" int64_t last_tile(const char* instruction_set, int64_t rows, int64_t width,
                             int64_t pitch, float* x, float* m, float* out, const float* table,
                             const int64_t* key) {
  const fastddim::Kernels* kernels = fastddim::supported_kernels(instruction_set);
  if (!kernels) return 0;
  const bool contiguous = pitch == width;
  const int64_t sizes[] = {rows, width}, strides[] = {pitch, 1}, row = 0;
  const int64_t extent = (rows - 1) * pitch + width;
  fastddim::Job job{};
  job.batch = 1;
  job.tile = fastddim::TILE;
  job.count = rows * width;
  job.ndim = 2;
  job.sizes = sizes;
  job.views[fastddim::operand::x] = view_of(x, extent, strides, contiguous);
  job.views[fastddim::operand::unconditional] = view_of(m, extent, strides, contiguous);
  job.views[fastddim::operand::out] = view_of(out, extent, strides, contiguous);
  job.table = table;
  job.row = &row;
  job.seed = key;
  job.step = key + 1;
  job.sample = key + 2;
  job.stream = 1;
  const int64_t tiles = job.tiles_per_sample();
  kernels->update(job, tiles - 1, tiles);
  return job.count - (tiles - 1) * fastddim::TILE;
}
