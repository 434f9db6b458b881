// One call of the update as plain data, which the binding hands to the kernel of the CPU at hand.

#pragma once

#include <stdint.h>

namespace fastddim {

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// Inlined always: a copy of its own would be shared between instruction sets.
__attribute__((always_inline)) inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

constexpr int MAX_DIMS = 64;

// Samples are cut into tiles. Elements that have to be converted, gathered or drawn go through
// buffers of TILE elements: small enough for a handful of them to stay in the L1 cache, and whole
// batches of noise. Tiles that need no buffer are longer.
constexpr int64_t TILE = 1024, DIRECT_TILE = 16 * TILE;

// The tensors of a call, each shaped like the state. Of a tensor that may have twice as many
// samples, each half is an operand.
namespace operand {
enum Operand : int {
  x,
  unconditional,  // the model output; under guidance its first half
  conditional,    // the second half
  noise,
  history,
  mask,
  known,
  out,
  x_0,
  model_input,
  second_input,  // the second half of the model input
  epsilon,
  OF_UPDATE,  // how many an update has

  // The backward pass has inputs of the update, and these.
  grad_out = OF_UPDATE,
  grad_x_0,
  grad_x,
  grad_unconditional,
  grad_conditional,
  COUNT
};
}  // namespace operand

struct View {
  char* data = nullptr;  // null where the optional tensor is absent
  Dtype dtype = Dtype::float32;
  bool contiguous = false;  // each sample is one run in the order elements are counted
  int64_t sample_stride = 0;
  const int64_t* strides = nullptr;  // [ndim], of one sample
};

struct Job {
  int64_t batch, count;  // samples, and elements of one
  int64_t tile;          // elements of a tile
  int ndim;              // dimensions of one sample
  const int64_t* sizes;  // [ndim]
  bool float64;          // the compute type, else float32
  bool streaming;        // the output is too large to stay in a cache

  View views[operand::COUNT];

  // The channels of a pixel where elements are counted pixel by pixel (channels_last) while noise
  // is keyed channel by channel; 0 where elements are counted in the order of noise.
  int64_t channels;

  const void* table;   // rows of float32, or float64
  const int64_t* row;  // null where all samples share the first
  int64_t row_stride;  // 0 where all samples share one row
  const int64_t *seed, *step, *sample;
  uint32_t stream;

  // The options of rescaled rows, and their memory: see Rescaling in fastddim/options.py.
  double rescale, ratio, limit;
  void* fitted;

  // Inlined always: a copy of its own would be shared between instruction sets.
  __attribute__((always_inline)) int64_t tiles_per_sample() const {
    return (count + tile - 1) / tile;
  }
};

// Run the tiles [begin, end) of a job, counted through all samples. One per instruction set.
using Kernel = void (*)(const Job&, int64_t begin, int64_t end);

struct Kernels {
  const char* name;
  Kernel update, backward, normal;
  Kernel fit;  // runs whole samples
};

extern const Kernels PLAIN;
#if defined(__x86_64__)
extern const Kernels AVX2, AVX512;
#endif

}  // namespace fastddim
