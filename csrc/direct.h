// Steps on the CPU that Python calls directly, past PyTorch's dispatcher: see fastddim/direct.py.

#pragma once

#include <Python.h>

namespace fastddim {

PyObject* connect(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
PyObject* direct_step(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
PyObject* make_stepper(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastddim
