// Tensors and numbers of Python as plain data, where they are nothing more.

#pragma once

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "dlpack.h"
#include "job.h"

namespace fastddim {

// Python objects that are asked for once: strong references that are never given back.
struct Connected {
  PyObject* tensor_class;           // torch.Tensor
  PyObject* is_neg;                 // its method
  PyObject* empty_like;             // torch.empty_like
  PyObject* watchers;               // a tuple of functions, each true where something watches
  PyObject* forward_ad;             // the names of torch.autograd.forward_ad
  PyObject* written;                // counts a tensor's version up
  PyObject* fresh_seed;             // draws a seed
  PyObject* predictions;            // from words to `Prediction`
  PyObject* variances;              // from words to whether it is the large one
  PyObject* implementations;        // the words for the kernel here
  PyObject *level, *requires_grad;  // names
  DLPackDLTensorFromPyObjectNoSync read;
};

inline Connected connected;

// A tensor of the CPU. Its sizes and strides point into the tensor.
struct Plain {
  char* data;
  Dtype dtype;
  int64_t dims;
  const int64_t *sizes, *strides;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dims; ++d) product *= sizes[d];
    return product;
  }
  // Past the last byte.
  const char* end() const {
    int64_t last = 0;
    for (int64_t d = 0; d < dims; ++d) last += (sizes[d] - 1) * strides[d];
    return data + (last + 1) * size_of(dtype);
  }
  View view(int64_t part, int64_t batch) const {
    View view;
    view.dtype = dtype;
    view.sample_stride = strides[0];
    view.strides = strides + 1;
    view.data = data + part * batch * strides[0] * size_of(dtype);
    return view;
  }
};

// All functions below return false, without an error, where Python's own way has to be taken.

inline bool refused() {
  PyErr_Clear();
  return false;
}

// An attribute, or the result of a method, that must be False.
inline bool is_false(PyObject* value) {
  const bool result = value == Py_False;
  if (!value) PyErr_Clear();
  Py_XDECREF(value);
  return result;
}

inline bool dtype_of(const DLDataType& type, Dtype& dtype) {
  if (type.lanes != 1) return false;
  if (type.code == kDLBfloat && type.bits == 16) {
    dtype = Dtype::bfloat16;
    return true;
  }
  if (type.code != kDLFloat) return false;
  switch (type.bits) {
    case 16:
      dtype = Dtype::float16;
      return true;
    case 32:
      dtype = Dtype::float32;
      return true;
    case 64:
      dtype = Dtype::float64;
      return true;
    default:
      return false;
  }
}

// The address and the shape of a tensor of the CPU.
inline bool read_memory(PyObject* object, Plain& plain) {
  DLTensor tensor;
  if (connected.read(object, &tensor) != 0) return refused();
  plain.data = (char*)tensor.data + tensor.byte_offset;
  plain.dims = tensor.ndim;
  plain.sizes = tensor.shape;
  plain.strides = tensor.strides;
  return tensor.device.device_type == kDLCPU && tensor.data && dtype_of(tensor.dtype, plain.dtype);
}

// A tensor whose memory holds its values. A view may be negated, which its memory does not show.
inline bool read_tensor(PyObject* object, Plain& plain) {
  return (PyObject*)Py_TYPE(object) == connected.tensor_class && read_memory(object, plain) &&
         is_false(PyObject_CallFunctionObjArgs(connected.is_neg, object, nullptr)) &&
         (!aoti_torch_grad_mode_is_enabled() ||
          is_false(PyObject_GetAttr(object, connected.requires_grad)));
}

// True where nothing follows, records or changes computations in this thread now: no transform,
// mode, tracer or profiler, and no forward-mode differentiation in any thread.
inline bool unwatched() {
  const Py_ssize_t count = PyTuple_Size(connected.watchers);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const answer = PyObject_CallNoArgs(PyTuple_GetItem(connected.watchers, i));
    const int watches = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    if (watches < 0) return refused();
    if (watches) return false;
  }
  PyObject* const level = PyDict_GetItemWithError(connected.forward_ad, connected.level);
  const long value = level ? PyLong_AsLong(level) : 0;
  if (PyErr_Occurred()) return refused();
  return value < 0;
}

// A float, an int or a tensor without dimensions.
inline bool read_number(PyObject* object, double& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AsDouble(object);
  } else if (PyLong_CheckExact(object)) {
    number = PyLong_AsDouble(object);
    if (PyErr_Occurred()) return refused();
  } else {
    Plain plain;
    if (!read_tensor(object, plain) || plain.dims != 0) return false;
    if (plain.dtype == Dtype::float64) {
      number = *(const double*)plain.data;
    } else if (plain.dtype == Dtype::float32) {
      number = *(const float*)plain.data;
    } else {
      return false;
    }
  }
  return std::isfinite(number);
}

inline bool read_number(PyObject* object, double low, double high, double& number) {
  return read_number(object, number) && low <= number && number <= high;
}

// An int in [0, most].
inline bool read_integer(PyObject* object, uint64_t most, uint64_t& number) {
  if (!PyLong_CheckExact(object)) return false;
  number = PyLong_AsUnsignedLongLong(object);
  if (PyErr_Occurred()) return refused();
  return number <= most;
}

inline bool read_bool(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

// The number that `words` has for a word.
inline bool read_word(PyObject* object, PyObject* words, int& number) {
  if (!PyUnicode_CheckExact(object)) return false;
  PyObject* const found = PyDict_GetItemWithError(words, object);
  if (!found) return refused();
  number = (int)PyLong_AsLong(found);
  return true;
}

}  // namespace fastddim
