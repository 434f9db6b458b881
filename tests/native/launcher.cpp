// The CUDA launchers called as the binding calls them, but with CPU tensors: what they launch runs
// on an interpreter of PTX, or is itself plain C++. The schemas are registered in Python.

#include <torch/csrc/stable/library.h>

#include "../../csrc/call.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/layout.h"

namespace {

using namespace fastddim;

// Any address will do: it must come back as it was given.
void* const STREAM = (void*)0x51;

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
  check_launch(fastddim_cuda_update(&job, STREAM));
}

void normal_out(Tensor seed, Tensor step, Tensor sample, int64_t stream, Tensor out) {
  const Shape shape(out, "out");
  Job job = normal_job(shape, seed, step, sample, stream, out);
  const Layout layout(job, shape.sizes, (int)shape.dims, true, false, Interleaved::as_any);
  check_launch(fastddim_cuda_normal(&job, STREAM));
}

void advance(Tensor counters, Tensor timesteps, Tensor t) {
  const Advance call(counters, timesteps, t);
  check_launch(fastddim_cuda_advance(call.counters, call.count, call.timesteps, call.t,
                                     call.t_count, STREAM));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTDDIM_TEST_LIBRARY, CPU, m) {
  m.impl("update_out", TORCH_BOX(&update_out));
  m.impl("normal_out", TORCH_BOX(&normal_out));
  m.impl("advance", TORCH_BOX(&advance));
}
