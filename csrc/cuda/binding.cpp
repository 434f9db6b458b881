// The operators on CUDA devices, on the current stream of the tensors' device.

#include <torch/csrc/stable/accelerator.h>

#include "operators.h"
#include "stream.h"

namespace {

using namespace fastddim;
using torch::stable::accelerator::DeviceGuard;

struct Stream {
  explicit Stream(const Place& place) : guard(place.index), handle(current_stream(place.index)) {}
  const DeviceGuard guard;
  void* const handle;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastddim, CUDA, m) { CudaOperators<Stream>::implement(m); }
