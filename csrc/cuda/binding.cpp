// The operators on CUDA devices: the current stream of the tensors' device, one launch each.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../call.h"
#include "../layout.h"
#include "launch.h"

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

void check_launch(int code) {
  STD_TORCH_CHECK(code == 0, "fastddim: CUDA error ", code, ": ", fastddim_cuda_error(code));
}

void update_out(Tensor x, Tensor model_output, Tensor table, Tensor row, Optional noise,
                Optional seed, Optional step, Optional sample, Optional history, Optional mask,
                Optional known, Tensor out, Optional x_0, Optional model_input) {
  const Shape shape(x, "x");
  Job job = update_job(shape, x, model_output, table, row, noise, seed, step, sample, history, mask,
                       known, out, x_0, model_input);
  const Layout layout(job, shape.sizes, (int)shape.dims, job.seed != nullptr, job.row_stride == 0,
                      Interleaved::as_any);
  const DeviceGuard guard(shape.place.index);
  check_launch(fastddim_cuda_update(&job, current_stream(shape.place.index)));
}

void normal_out(Tensor seed, Tensor step, Tensor sample, int64_t stream, Tensor out) {
  const Shape shape(out, "out");
  Job job = normal_job(shape, seed, step, sample, stream, out);
  const Layout layout(job, shape.sizes, (int)shape.dims, true, false, Interleaved::as_any);
  const DeviceGuard guard(shape.place.index);
  check_launch(fastddim_cuda_normal(&job, current_stream(shape.place.index)));
}

void advance(Tensor counters, Tensor timesteps, Tensor t) {
  const Advance call(counters, timesteps, t);
  const int32_t index = counters.get_device_index();
  const DeviceGuard guard(index);
  check_launch(fastddim_cuda_advance(call.counters, call.count, call.timesteps, call.t,
                                     call.t_count, current_stream(index)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastddim, CUDA, m) {
  m.impl("update_out", TORCH_BOX(&update_out));
  m.impl("normal_out", TORCH_BOX(&normal_out));
  m.impl("advance", TORCH_BOX(&advance));
}
