// The operators on CUDA devices, on the current stream of the tensors' device.

#include <torch/csrc/stable/accelerator.h>

#include "operators.h"

// Only CUDA builds of torch have these, and which of them depends on the release.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle, void**);
}

namespace {

using namespace fastddim;
using torch::stable::accelerator::DeviceGuard;

void* current_stream(int32_t index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }
  STD_TORCH_CHECK(torch_stream_native_handle, "fastddim: this build of torch tells no CUDA stream");
  StreamHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(index, &handle));
  const AOTITorchError code = torch_stream_native_handle(handle, &stream);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_delete_stream(handle));
  STABLE_TORCH_ERROR_CODE_CHECK(code);
  return stream;
}

struct Stream {
  explicit Stream(const Place& place) : guard(place.index), handle(current_stream(place.index)) {}
  const DeviceGuard guard;
  void* const handle;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastddim, CUDA, m) { CudaOperators<Stream>::implement(m); }
