// The stream that torch's work is queued on.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

namespace fastddim {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up in the library that torch has loaded, because linking cannot be relied on: torch loads
// its libraries without making their names global, linkers that default to --as-needed drop the
// only library of a CPU build's that leads there, and the CPU build has no such function.
inline CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? (CurrentStream)dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
}

inline void* current_stream(int32_t device) {
  static const CurrentStream get = find_current_stream();
  STD_TORCH_CHECK(get,
                  "fastddim: expected a CUDA build of torch, whose libtorch_cuda.so has "
                  "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace fastddim
