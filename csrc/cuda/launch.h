// The functions of the CUDA library. They use no framework: they take plain pointers and sizes, and
// return the result of cudaGetLastError() after the launch (0 is success). None waits or allocates.

#pragma once

#include "../job.h"

extern "C" {

// The update of job.h on the current device, queued on `stream` (a cudaStream_t). Every pointer in
// the job is to device memory, except those to sizes and strides.
int fastddim_cuda_update(const fastddim::Job* job, void* stream);

// The rows of a job into `job->fitted`, with the factors that they take from the data.
int fastddim_cuda_fit(const fastddim::Job* job, void* stream);

// The gradients of an update.
int fastddim_cuda_backward(const fastddim::Job* job, void* stream);

// Standard normals into `job->out`.
int fastddim_cuda_normal(const fastddim::Job* job, void* stream);

// counters[i] += 1 for all `count` of them; then t[j] = timesteps[counters[j]] for the first
// `t_count`.
int fastddim_cuda_advance(int64_t* counters, int64_t count, const int64_t* timesteps, int64_t* t,
                          int64_t t_count, void* stream);

// The text of an error code.
const char* fastddim_cuda_error(int code);
}
