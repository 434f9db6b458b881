// A stand-in for the CUDA runtime: what a translation unit of CUDA 13 needs to register its kernels
// and to launch them, and nothing else. Launches go to a callback.

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  unsigned x, y, z;
} Dim3;

typedef int (*Callback)(const char* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                        void* stream);

typedef struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} Configuration;

// Values of cudaError_t.
enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  INVALID_CONFIGURATION = 9,
  INSUFFICIENT_DRIVER = 35,
  INVALID_DEVICE_FUNCTION = 98,
  ILLEGAL_ADDRESS = 700,
};

enum { MAX_KERNELS = 4096, MAX_NESTING = 16 };
// Of compute capability 8.0 to 12.0; more shared memory takes an attribute that nobody can set
// here.
enum { MAX_GRID_YZ = 65535, MAX_THREADS = 1024, MAX_BLOCK_Z = 64, MAX_SHARED = 48 * 1024 };

static Callback callback;
static struct {
  const void* host;
  const char* name;
} kernels[MAX_KERNELS];
static int kernel_count;
static _Thread_local Configuration configurations[MAX_NESTING];
static _Thread_local int depth;
static _Thread_local int last_error;

void stand_in_set_callback(Callback to) { callback = to; }

void** __cudaRegisterFatBinary(void* content) {
  static void* handle;
  (void)content;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }

void __cudaUnregisterFatBinary(void** handle) { (void)handle; }

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                            int thread_limit, void* tid, void* bid, void* block_dim, void* grid_dim,
                            int* warp_size) {
  (void)handle, (void)device, (void)thread_limit, (void)tid, (void)bid, (void)block_dim;
  (void)grid_dim, (void)warp_size;
  if (kernel_count == MAX_KERNELS) {
    fprintf(stderr, "stand-in for the CUDA runtime: more than %d kernels\n", MAX_KERNELS);
    abort();
  }
  kernels[kernel_count].host = host;
  kernels[kernel_count++].name = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  if (depth == MAX_NESTING) return 1;
  configurations[depth++] = (Configuration){grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  if (depth == 0) return INVALID_VALUE;
  const Configuration* top = &configurations[--depth];
  *grid = top->grid, *block = top->block, *shared = top->shared, *stream = top->stream;
  return SUCCESS;
}

int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = (void*)host;
  return SUCCESS;
}

static int is_valid(Dim3 grid, Dim3 block) {
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return 0;
  if (grid.x > 0x7FFFFFFF || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ) return 0;
  if (block.x > MAX_THREADS || block.y > MAX_THREADS || block.z > MAX_BLOCK_Z) return 0;
  return block.x * block.y * block.z <= MAX_THREADS;
}

static int launch(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                  void* stream) {
  if (!callback) return INSUFFICIENT_DRIVER;
  if (!is_valid(grid, block)) return INVALID_CONFIGURATION;
  if (shared > MAX_SHARED) return INVALID_VALUE;
  for (int i = 0; i < kernel_count; ++i) {
    if (kernels[i].host == host) {
      return callback(kernels[i].name, grid, block, arguments, shared, stream);
    }
  }
  return INVALID_DEVICE_FUNCTION;
}

int __cudaLaunchKernel(void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                       void* stream) {
  const int code = launch(host, grid, block, arguments, shared, stream);
  if (code) last_error = code;
  return code;
}

int cudaGetLastError(void) {
  const int code = last_error;
  last_error = SUCCESS;
  return code;
}

const char* cudaGetErrorString(int code) {
  switch (code) {
    case SUCCESS:
      return "no error";
    case INVALID_VALUE:
      return "invalid argument";
    case INVALID_CONFIGURATION:
      return "invalid configuration argument";
    case INSUFFICIENT_DRIVER:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case INVALID_DEVICE_FUNCTION:
      return "invalid device function";
    case ILLEGAL_ADDRESS:
      return "an illegal memory access was encountered";
    default:
      return "unknown error";
  }
}
