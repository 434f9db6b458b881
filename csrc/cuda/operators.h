// The operators through the CUDA launchers, with one launch each.

#pragma once

#include <torch/csrc/stable/library.h>

#include "../call.h"
#include "../layout.h"
#include "launch.h"

namespace fastddim {

inline void check_launch(int code) {
  STD_TORCH_CHECK(code == 0, "fastddim: CUDA error ", code, ": ", fastddim_cuda_error(code));
}

// `Stream(place)` makes the device of `place` the current one while it lives; its `handle` goes to
// the launchers.
template <class Stream>
struct CudaOperators {
  static void update_out(const UpdateArguments& given) {
    const Shape shape(given.x, "x");
    Job job = update_job(shape, given);
    const JobLayout layout(job, shape.sizes, (int)shape.dims, job.seed != nullptr,
                           job.row_stride == 0, Interleaved::as_any);
    const Stream stream(shape.place);
    check_launch(fastddim_cuda_update(&job, stream.handle));
  }

  static void fit_rows(Tensor x, Tensor model_output, Tensor table, Optional row, double rescale,
                       double ratio, double limit, Tensor out) {
    const Shape shape(x, "x");
    Job job = fit_job(shape, x, model_output, table, row, rescale, ratio, limit, out);
    const JobLayout layout(job, shape.sizes, (int)shape.dims, true, false, Interleaved::as_any);
    const Stream stream(shape.place);
    check_launch(fastddim_cuda_fit(&job, stream.handle));
  }

  static void backward_out(Optional grad_out, Optional grad_x_0, Tensor x, Tensor model_output,
                           Tensor table, Optional row, Optional mask, Tensor grad_x,
                           Tensor grad_model_output) {
    const Shape shape(x, "x");
    Job job = backward_job(shape, grad_out, grad_x_0, x, model_output, table, row, mask, grad_x,
                           grad_model_output);
    const JobLayout layout(job, shape.sizes, (int)shape.dims, false, job.row_stride == 0,
                           Interleaved::as_any);
    const Stream stream(shape.place);
    check_launch(fastddim_cuda_backward(&job, stream.handle));
  }

  static void normal_out(Tensor seed, Tensor step, Tensor sample, int64_t stream_of_noise,
                         Tensor out) {
    const Shape shape(out, "out");
    Job job = normal_job(shape, seed, step, sample, stream_of_noise, out);
    const JobLayout layout(job, shape.sizes, (int)shape.dims, true, false, Interleaved::as_any);
    const Stream stream(shape.place);
    check_launch(fastddim_cuda_normal(&job, stream.handle));
  }

  static void advance(Tensor counters, Tensor timesteps, Tensor t) {
    const Advance call(counters, timesteps, t);
    const Stream stream{Place(counters)};
    check_launch(fastddim_cuda_advance(call.counters, call.count, call.timesteps, call.t,
                                       call.t_count, stream.handle));
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("update_out", TORCH_BOX(&update_operator<update_out>));
    m.impl("fit_rows", TORCH_BOX(&fit_rows));
    m.impl("backward_out", TORCH_BOX(&backward_out));
    m.impl("normal_out", TORCH_BOX(&normal_out));
    m.impl("advance", TORCH_BOX(&advance));
  }
};

}  // namespace fastddim
