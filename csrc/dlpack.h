// The part of DLPack 1 that is needed here; its ABI is stable. Names and layouts are those of
// https://github.com/dmlc/dlpack/blob/v1.3/include/dlpack/dlpack.h. An extension on torch's stable
// ABI cannot include torch's own copy.

#pragma once

#include <cstdint>

namespace fastddim {

constexpr uint32_t DLPACK_MAJOR_VERSION = 1;
constexpr const char* DLPACK_EXCHANGE_API = "dlpack_exchange_api";  // the name of the capsule
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackVersion {
  uint32_t major, minor;
};
struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* prev_api;
};

// Fills in a tensor that refers to the memory of the object, without waiting for a device; returns
// 0, or another number with a Python error set.
using DLPackDLTensorFromPyObjectNoSync = int (*)(void* object, DLTensor* out);

struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void* others[3];
  DLPackDLTensorFromPyObjectNoSync dltensor_from_py_object_no_sync;
  void* current_work_stream;
};

}  // namespace fastddim
