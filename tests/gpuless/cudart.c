// A stand-in for the CUDA runtime: what a translation unit of CUDA 13 needs to register its kernels
// and to launch them, and nothing else. Launches go to a callback.

#include <stddef.h>

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

enum { INVALID_CONFIGURATION = 9, NO_DEVICE = 100, INVALID_FUNCTION = 98 };
enum { MAX_KERNELS = 1024, MAX_NESTING = 16, MAX_GRID = 65535, MAX_THREADS = 1024 };

static Callback callback;
static int last_error;
static struct {
  const void* host;
  const char* name;
} kernels[MAX_KERNELS];
static int kernel_count;
static Configuration configurations[MAX_NESTING];
static int depth;
static void* fat_binary;

void fake_set_callback(Callback to) { callback = to; }

void** __cudaRegisterFatBinary(void* content) {
  (void)content;
  return &fat_binary;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }

void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name,
                            int thread_limit, void* tid, void* bid, void* block_dim, void* grid_dim,
                            int* warp_size) {
  (void)handle, (void)device, (void)thread_limit, (void)tid, (void)bid, (void)block_dim;
  (void)grid_dim, (void)warp_size;
  if (kernel_count == MAX_KERNELS) return;
  kernels[kernel_count].host = host;
  kernels[kernel_count++].name = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  if (depth == MAX_NESTING) return 1;
  configurations[depth++] = (Configuration){grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  const Configuration* top = &configurations[--depth];
  *grid = top->grid, *block = top->block, *shared = top->shared, *stream = top->stream;
  return 0;
}

int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = (void*)host;
  return 0;
}

static int launched(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                    void* stream) {
  const unsigned threads = block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFF) return INVALID_CONFIGURATION;
  if (grid.y > MAX_GRID || grid.z > MAX_GRID) return INVALID_CONFIGURATION;
  if (!threads || threads > MAX_THREADS) return INVALID_CONFIGURATION;
  if (!callback) return NO_DEVICE;
  for (int i = 0; i < kernel_count; ++i) {
    if (kernels[i].host == host) {
      return callback(kernels[i].name, grid, block, arguments, shared, stream);
    }
  }
  return INVALID_FUNCTION;
}

int __cudaLaunchKernel(void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                       void* stream) {
  const int code = launched(host, grid, block, arguments, shared, stream);
  if (code) last_error = code;
  return code;
}

int cudaGetLastError(void) {
  const int code = last_error;
  last_error = 0;
  return code;
}

const char* cudaGetErrorString(int code) {
  return code == INVALID_CONFIGURATION ? "invalid configuration argument" : "a stand-in's error";
}
