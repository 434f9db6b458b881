// csrc/cuda/stream.h for ctypes: the failure, or nothing where the stream has been found.

#include "../../csrc/cuda/stream.h"

#include <exception>
#include <string>

extern "C" __attribute__((visibility("default"))) const char* stream_of(int32_t device,
                                                                        void** stream) {
  static std::string failure;
  try {
    *stream = fastddim::current_stream(device);
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}
