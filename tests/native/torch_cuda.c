// A stand-in for torch's libtorch_cuda.so: all of it that fastddim asks for. Device 9 has no
// stream.

#include <stdint.h>

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = (void*)(intptr_t)(0x1000 + device);
  return device == 9;
}
