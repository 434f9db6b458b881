// The kernels for GPUs and their launchers, as one translation unit.
//
// A thread takes a chunk of one sample: whole quads of normals and whole 16-byte words of the
// state. Tensors that are contiguous within a sample and have the dtypes of an ordinary step go to
// contiguous.cuh, in 16-byte accesses where they allow it; other dtypes, and pixels of few channels
// in either order, go to pixels.cuh; every other layout goes to strided.cuh, element by element. In
// each case an update is one pass over memory, and noise is drawn in registers. All kernels compute
// by formula.h, built with -fmad=false, so their bits are those of the CPU kernel.

#include "backward.cuh"
#include "contiguous.cuh"
#include "counters.cuh"
#include "fit.cuh"
#include "launch.h"
#include "pixels.cuh"
#include "strided.cuh"

using namespace FASTDDIM_NAMESPACE;

int fastddim_cuda_update(const fastddim::Job* job, void* stream) {
  if (job->batch == 0 || job->count == 0) return 0;
  const int code = update_contiguous(*job, stream);
  if (code != NOT_CONTIGUOUS) return code;
  const int code_of_pixels = update_pixels(*job, stream);
  if (code_of_pixels != NO_PIXELS) return code_of_pixels;
  return job->float64 ? update_strided<double>(*job, stream) : update_strided<float>(*job, stream);
}

int fastddim_cuda_fit(const fastddim::Job* job, void* stream) {
  return job->batch == 0 ? 0 : fit_rows(*job, stream);
}

int fastddim_cuda_backward(const fastddim::Job* job, void* stream) {
  return job->batch == 0 || job->count == 0 ? 0 : backward_of_update(*job, stream);
}

int fastddim_cuda_normal(const fastddim::Job* job, void* stream) {
  if (job->batch == 0 || job->count == 0) return 0;
  return launch_normal(*job, stream);
}

int fastddim_cuda_advance(int64_t* counters, int64_t count, const int64_t* timesteps, int64_t* t,
                          int64_t t_count, void* stream) {
  return count == 0 ? 0 : launch_advance(counters, count, timesteps, t, t_count, stream);
}

const char* fastddim_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }
