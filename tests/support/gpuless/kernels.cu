// Small kernels for the tests of the interpreter: some break a rule that it must notice.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

extern "C" {

// Rules broken.

__global__ void two_writers(float* out) { out[threadIdx.x / 2] = threadIdx.x; }
__global__ void two_blocks_write(float* out) { out[threadIdx.x] = blockIdx.x; }
__global__ void read_after_write(float* out) {
  out[threadIdx.x] = 1;
  asm volatile("" ::: "memory");
  const float next = ((volatile float*)out)[threadIdx.x ^ 1];
  out[threadIdx.x] = next;
}
__global__ void write_after_read(float* out) { out[threadIdx.x + 1] = out[threadIdx.x]; }
__global__ void neighbouring_bytes(unsigned char* out) { out[threadIdx.x] = threadIdx.x; }
__global__ void a_byte_of_a_word(float* out) {
  if (threadIdx.x == 0)
    out[1] = 1;
  else
    ((unsigned char*)out)[7] = 1;
}
__global__ void a_byte_of_what_was_read(float* out) {
  if (threadIdx.x == 0) {
    const float4 wide = *(const float4*)(out + 4);
    out[0] = wide.x + wide.y + wide.z + wide.w;
  }
  asm volatile("" ::: "memory");
  if (threadIdx.x == 1) ((unsigned char*)out)[21] = 1;
}
__global__ void written_by_the_last_reader(float* out) {
  const float value = out[64];
  if (threadIdx.x == 63) out[64] = value + 1;
  out[threadIdx.x] = value;
}
__global__ void in_place(float* out) { out[threadIdx.x] = out[threadIdx.x] + 1; }
__global__ void reads_back_through_nc(float* out) {
  out[threadIdx.x] = 3;
  float got;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(got) : "l"(out + threadIdx.x) : "memory");
  out[threadIdx.x] = got;
}
__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void barrier_after_exit(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 0;" ::: "memory");
  else {
    out[threadIdx.x] = 0;
    asm volatile("bar.sync 0;" ::: "memory");
  }
  out[threadIdx.x] = 1;
}
__global__ void shared_without_barrier(float* out) {
  __shared__ float row[64];
  row[threadIdx.x] = threadIdx.x;
  asm volatile("" ::: "memory");
  out[threadIdx.x] = row[63 - threadIdx.x];
}
__global__ void counted_and_read(float* out) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1u);
  asm volatile("" ::: "memory");
  out[threadIdx.x] = ((volatile unsigned&)count);
}
__global__ void counted_before_the_barrier(float* out) {
  __shared__ unsigned count;
  if (threadIdx.x == 63) count = 0;
  atomicAdd(&count, 1u);
  __syncthreads();
  out[threadIdx.x] = count;
}
__global__ void read_and_counted(float* out) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  out[threadIdx.x] = ((volatile unsigned&)count);
  atomicAdd(&count, 1u);
}
__global__ void counted_beyond_shared(float* out) {
  __shared__ unsigned counts[64];
  atomicAdd(&counts[threadIdx.x + 1], 1u);
  __syncthreads();
  out[threadIdx.x] = counts[threadIdx.x];
}
__global__ void beyond_shared(float* out) {
  __shared__ float row[64];
  row[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
__global__ void copy_bytes(const char* in, char* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i];
}
__global__ void copy_wide(const float4* in, float4* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i];
}

// Rules kept.

__global__ void reverse(float* out) {
  __shared__ float row[64];
  const int i = blockIdx.x * 64 + threadIdx.x;
  row[threadIdx.x] = out[i];
  __syncthreads();
  out[i] = row[63 - threadIdx.x];
}
__global__ void sum_of_block(const int* in, int* out) {
  extern __shared__ int part[];
  part[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}
__global__ void histogram_of_block(const int* in, int* out) {
  __shared__ unsigned counts[64];
  counts[threadIdx.x] = 0;
  __syncthreads();
  const int i = blockIdx.x * 64 + threadIdx.x;
  atomicAdd(&counts[in[i]], 1u);
  if (threadIdx.x % 3 == 0) atomicAdd(&counts[63], 2u);
  __syncthreads();
  out[i] = counts[threadIdx.x];
}
__global__ void order_of_atomics(float* out) {
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  out[threadIdx.x] = atomicAdd(&count, 1u);
}
__global__ void steps_to_one(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int steps = 0;
  for (int64_t value = in[i]; value != 1; ++steps) {
    value = value & 1 ? 3 * value + 1 : value / 2;
  }
  out[i] = steps;
}
__constant__ int primes[6] = {2, 3, 5, 7, 11, 13};
__device__ int counter = 40;
__global__ void variables(int* out) { out[threadIdx.x] = primes[threadIdx.x] + counter; }
__global__ void local_array(const int* in, int* out) {
  int seen[8];
  for (int i = 0; i < 8; ++i) seen[i] = in[i] + threadIdx.x;
  asm volatile("" ::: "memory");
  out[threadIdx.x] = seen[in[threadIdx.x]];
}
__global__ void narrow(const float* in, __half* half, __nv_bfloat16* brain, double* wide) {
  const int i = threadIdx.x;
  half[i] = __float2half_rn(in[i]);
  brain[i] = __float2bfloat16_rn(in[i]);
  wide[i] = __half2float(half[i]) + (double)__bfloat162float(brain[i]);
}
__global__ void shuffles(const int* in, int* out) {
  const int i = blockIdx.x * 64 + threadIdx.x, value = in[i], lane = threadIdx.x % 32;
  out[i] = __shfl_sync(~0u, value, 5);
  out[i + 128] = __shfl_sync(~0u, value, lane * 7);
  out[i + 256] = __shfl_xor_sync(~0u, value, 9);
  out[i + 384] = __shfl_up_sync(~0u, value, 3);
  out[i + 512] = __shfl_down_sync(~0u, value, 4);
  out[i + 640] = __shfl_sync(~0u, value, lane + 1, 8);
}
__global__ void shuffles_by_mask(const int* in, int* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x % 32 < 16 ? 0xFFFFu : ~0xFFFFu, in[threadIdx.x], 5);
}
__global__ void shuffles_of_some(const int* in, int* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_sync(~0u, in[threadIdx.x], 5);
}
__global__ void __launch_bounds__(64) at_most_64(float* out) { out[threadIdx.x] = 1; }

}  // extern "C"
