// Kernels with launchers, for the tests of the stand-in for the CUDA runtime.

#include <cstdint>

extern "C" {

__global__ void coordinates(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int place = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[place] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * threadIdx.x +
               10000 * threadIdx.y + 100000 * threadIdx.z;
}

struct Large {
  float values[1000];
  int64_t scale;
  char last;
};

__global__ void large_parameter(Large large, float* out) {
  out[threadIdx.x] = large.values[(threadIdx.x * 37) % 1000] * large.scale + large.last;
}

__global__ void fused(const float* in, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __fmaf_rn(in[i], 3.0f, 1.0f);
}

int launch_fused(const float* in, float* out, int blocks, int threads, int64_t shared,
                 void* stream) {
  fused<<<blocks, threads, shared, (cudaStream_t)stream>>>(in, out);
  return cudaGetLastError();
}
int launch_large(const Large* large, float* out, void* stream) {
  large_parameter<<<1, 64, 0, (cudaStream_t)stream>>>(*large, out);
  return cudaGetLastError();
}
int launch_grid(int* out, int x, int y, int z, int bx, int by, int bz) {
  coordinates<<<dim3(x, y, z), dim3(bx, by, bz)>>>(out);
  return cudaGetLastError();
}
const char* error_text(int code) { return cudaGetErrorString((cudaError_t)code); }

}  // extern "C"
