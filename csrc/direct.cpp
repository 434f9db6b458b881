// Steps on the CPU that Python calls directly.
//
// A step of a small state takes less time than PyTorch's dispatcher and the checks of Python. It is
// taken here where both have nothing else to do: for tensors of numbers on the CPU that fit each
// other, without derivatives and unwatched. In all other cases the functions return None, and the
// caller's own way finds and names errors.

#include "direct.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "call.h"
#include "coefficients.h"
#include "cpu/run.h"
#include "plain.h"

namespace fastddim {
namespace {

// Work on fewer elements than this is done before another thread could take over.
constexpr int64_t KEEPS_GIL = 4096;

constexpr uint64_t WORD = 0xFFFFFFFF;

// The row of a step, and the properties that all steps of its table share.
struct Coefficients {
  const double* exact;
  const float* rounded;
  bool noisy, guided;
};

// The arguments of a step besides its coefficients, as Python has them.
struct Operands {
  PyObject *x, *model_output, *noise, *seed, *sample_offset, *step_index, *out, *return_x0;
};

// The keys of the noise of a batch.
struct Keys {
  std::vector<int64_t> values;

  void set(Job& job, uint64_t seed, uint64_t step, uint64_t first) {
    values.resize(3 * job.batch);
    int64_t *seeds = values.data(), *steps = seeds + job.batch, *samples = steps + job.batch;
    for (int64_t b = 0; b < job.batch; ++b) {
      seeds[b] = (int64_t)seed;
      steps[b] = (int64_t)step;
      samples[b] = (int64_t)first + b;
    }
    job.seed = seeds;
    job.step = steps;
    job.sample = samples;
    job.stream = STEP_NOISE;
  }
};

bool same_shape(const Plain& tensor, const Plain& x) {
  return tensor.dims == x.dims && std::equal(x.sizes, x.sizes + x.dims, tensor.sizes);
}

// See `check_model_output` in fastddim/validation.py.
bool fits(const Plain& model_output, const Plain& x, bool guided) {
  if (model_output.dims != x.dims || model_output.sizes[0] != (guided ? 2 : 1) * x.sizes[0]) {
    return false;
  }
  for (int64_t d = 1; d < x.dims; ++d) {
    const bool wide = d == 1 && model_output.sizes[d] == 2 * x.sizes[d];
    if (model_output.sizes[d] != x.sizes[d] && !wide) return false;
  }
  return true;
}

// See `check_overlap` in fastddim/validation.py.
bool overlaps(const Plain& out, const Plain& in) {
  const bool same = out.data == in.data && out.dtype == in.dtype && out.dims == in.dims &&
                    std::equal(in.strides, in.strides + in.dims, out.strides);
  return !same && out.data < in.end() && in.data < out.end();
}

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object = nullptr) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

PyObject* declined() { Py_RETURN_NONE; }

PyObject* unexpected() {
  PyErr_SetString(PyExc_RuntimeError, "fastddim: expected torch.empty_like to give such a tensor");
  return nullptr;
}

// False, with an error set, where the kernel failed.
bool run_without_gil(const Job& job, bool noisy, int64_t elements) {
  std::string failure;
  PyThreadState* const state = elements < KEEPS_GIL ? nullptr : PyEval_SaveThread();
  try {
    run(job, current_kernels().update, noisy);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  if (state) PyEval_RestoreThread(state);
  if (failure.empty()) return true;
  PyErr_SetString(PyExc_RuntimeError, failure.c_str());
  return false;
}

// x_prev or (x_prev, x_0); None where the step is declined.
PyObject* take(const Operands& given, const Coefficients& coefficients) {
  Plain x, model_output, noise, out, predicted;
  bool return_x0;
  if (!read_bool(given.return_x0, return_x0) || !read_tensor(given.x, x)) return declined();
  const int64_t elements = x.count();
  if (x.dims < 1 || x.dims >= MAX_DIMS || elements == 0) return declined();
  if (!read_tensor(given.model_output, model_output)) return declined();
  if (!fits(model_output, x, coefficients.guided)) return declined();

  Job job{};
  job.tile = TILE;
  job.batch = x.sizes[0];
  job.float64 = x.dtype == Dtype::float64;
  job.table = job.float64 ? (const void*)coefficients.exact : coefficients.rounded;
  View* const views = job.views;
  views[operand::x] = x.view(0, job.batch);
  views[operand::unconditional] = model_output.view(0, job.batch);
  if (coefficients.guided) views[operand::conditional] = model_output.view(1, job.batch);

  const bool keyed = coefficients.noisy && given.noise == Py_None;
  uint64_t seed = 0, first = 0, step = 0;
  if (keyed) {
    const bool seeded = given.seed != Py_None;
    if (seeded && !read_integer(given.seed, UINT64_MAX, seed)) return declined();
    if (!read_integer(given.sample_offset, WORD, first)) return declined();
    if (!read_integer(given.step_index, WORD, step)) return declined();
    if (first + job.batch > WORD + 1 || elements / job.batch > (int64_t)4 << 32) return declined();
  } else if (coefficients.noisy) {
    if (!read_tensor(given.noise, noise) || !same_shape(noise, x)) return declined();
    views[operand::noise] = noise.view(0, job.batch);
  }
  const bool made = given.out == Py_None;
  if (!made) {
    if (!read_tensor(given.out, out) || !same_shape(out, x) || out.dtype != x.dtype) {
      return declined();
    }
    if (overlaps(out, x) || overlaps(out, model_output)) return declined();
  }
  if (!unwatched()) return declined();

  // From here on nothing is declined: a seed is drawn once.
  Keys keys;
  if (keyed) {
    if (given.seed == Py_None) {
      const Owned drawn(PyObject_CallNoArgs(connected.fresh_seed));
      if (!drawn.get()) return nullptr;
      seed = PyLong_AsUnsignedLongLong(drawn.get());
      if (PyErr_Occurred()) return nullptr;
    }
    try {
      keys.set(job, seed, step, first);
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    }
  }
  Owned x_prev(made ? PyObject_CallFunctionObjArgs(connected.empty_like, given.x, nullptr)
                    : Py_NewRef(given.out));
  if (!x_prev.get()) return nullptr;
  if (made && !read_memory(x_prev.get(), out)) return unexpected();
  Owned x_0(return_x0 ? PyObject_CallFunctionObjArgs(connected.empty_like, given.x, nullptr)
                      : nullptr);
  if (return_x0 && !x_0.get()) return nullptr;
  if (return_x0 && !read_memory(x_0.get(), predicted)) return unexpected();
  views[operand::out] = out.view(0, job.batch);
  if (return_x0) views[operand::x_0] = predicted.view(0, job.batch);

  const JobLayout layout(job, x.sizes, (int)x.dims, job.seed != nullptr, true);
  set_tiles(job, layout);
  if (!run_without_gil(job, keyed, elements)) return nullptr;
  if (!made) {
    const Owned counted(PyObject_CallFunctionObjArgs(connected.written, given.out, nullptr));
    if (!counted.get()) return nullptr;
  }
  return return_x0 ? PyTuple_Pack(2, x_prev.get(), x_0.get()) : x_prev.release();
}

// False where a coefficient is NaN, or too large for the dtype.
bool in_range(const double* exact, const float* rounded) {
  constexpr int BOUND = 2;  // the only one that may be infinite
  for (int k = 0; k < ROW_FIELDS; ++k) {
    const bool unbounded = k == BOUND && std::isinf(exact[k]);
    if (!std::isfinite(rounded[k]) && !unbounded) return false;
  }
  return true;
}

// A table of rows, and the properties that its steps share.
class Stepper {
 public:
  Stepper(const double* rows, int64_t count, bool noisy, bool guided)
      : exact_(rows, rows + count * ROW_FIELDS),
        rounded_(exact_.begin(), exact_.end()),
        count_(count),
        noisy_(noisy),
        guided_(guided) {}

  int64_t count() const { return count_; }
  Coefficients row(int64_t i) const {
    return {exact_.data() + i * ROW_FIELDS, rounded_.data() + i * ROW_FIELDS, noisy_, guided_};
  }

 private:
  std::vector<double> exact_;
  std::vector<float> rounded_;
  int64_t count_;
  bool noisy_, guided_;
};

constexpr const char* STEPPER = "fastddim.Stepper";

void free_stepper(PyObject* capsule) { delete (Stepper*)PyCapsule_GetPointer(capsule, STEPPER); }

bool check_count(const char* name, Py_ssize_t expected, Py_ssize_t count) {
  if (count == expected) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, expected, count);
  return false;
}

PyObject* call_stepper(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count("stepper", 9, count)) return nullptr;
  const auto* const stepper = (const Stepper*)PyCapsule_GetPointer(capsule, STEPPER);
  PyObject *const x = arguments[0], *const model_output = arguments[1], *const row = arguments[2];
  uint64_t i;
  if (!read_integer(row, (uint64_t)stepper->count() - 1, i)) return declined();
  const Coefficients coefficients = stepper->row((int64_t)i);
  if (!in_range(coefficients.exact, coefficients.rounded)) return declined();
  return take({.x = x,
               .model_output = model_output,
               .noise = arguments[3],
               .seed = arguments[4],
               .sample_offset = arguments[5],
               .step_index = arguments[6],
               .out = arguments[7],
               .return_x0 = arguments[8]},
              coefficients);
}

PyMethodDef stepper_call = {"stepper", (PyCFunction)(void*)call_stepper, METH_FASTCALL,
                            "The result of a step by its row; None where it is declined."};

// False where the options of a step are not those of a step of numbers, each in its range.
bool read_step(PyObject* const* arguments, StepNumbers& step, bool& guided) {
  enum {
    ALPHA_T,
    ALPHA_PREV,
    ETA,
    VARIANCE,
    PREDICTION,
    CLIP,
    REDERIVE_EPS,
    GUIDANCE_SCALE,
    TEMPERATURE
  };
  constexpr double MOST = std::numeric_limits<double>::max();
  int prediction, large;
  guided = arguments[GUIDANCE_SCALE] != Py_None;
  const bool read =
      read_number(arguments[ALPHA_T], 0, 1, step.alpha_t) &&
      read_number(arguments[ALPHA_PREV], 0, 1, step.alpha_prev) &&
      read_number(arguments[ETA], 0, MOST, step.eta) &&
      read_word(arguments[VARIANCE], connected.variances, large) &&
      read_word(arguments[PREDICTION], connected.predictions, prediction) &&
      (arguments[CLIP] == Py_None || read_number(arguments[CLIP], 0, MOST, step.clip)) &&
      read_bool(arguments[REDERIVE_EPS], step.rederive_eps) &&
      (!guided || read_number(arguments[GUIDANCE_SCALE], step.guidance_scale)) &&
      read_number(arguments[TEMPERATURE], 0, MOST, step.temperature);
  if (!read) return false;
  step.prediction = (Prediction)prediction;
  step.large = large;
  return step.clip > 0;
}

}  // namespace

PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count("connect", 11, count)) return nullptr;
  const auto* const exchange =
      (const DLPackExchangeAPI*)PyCapsule_GetPointer(arguments[10], DLPACK_EXCHANGE_API);
  if (!exchange) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION) {
    PyErr_Format(PyExc_RuntimeError, "torch: expected DLPack %d, got %d", (int)DLPACK_MAJOR_VERSION,
                 (int)exchange->header.version.major);
    return nullptr;
  }
  connected.read = exchange->dltensor_from_py_object_no_sync;
  PyObject** const kept[] = {&connected.tensor_class, &connected.is_neg,
                             &connected.empty_like,   &connected.watchers,
                             &connected.forward_ad,   &connected.written,
                             &connected.fresh_seed,   &connected.predictions,
                             &connected.variances,    &connected.implementations};
  for (size_t i = 0; i < std::size(kept); ++i) *kept[i] = Py_NewRef(arguments[i]);
  connected.level = PyUnicode_InternFromString("_current_level");
  connected.requires_grad = PyUnicode_InternFromString("requires_grad");
  if (!connected.level || !connected.requires_grad) return nullptr;
  Py_RETURN_NONE;
}

PyObject* direct_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count("step", 21, count)) return nullptr;
  enum { X, MODEL_OUTPUT, COEFFICIENTS, RESCALE = 11, RATIO, LIMIT, SEED, OFFSET, STEP };
  enum { NOISE = 17, OUT, RETURN_X0, IMPL };
  double rescale, exact[ROW_FIELDS];
  float rounded[ROW_FIELDS];
  StepNumbers step;
  bool guided;
  int unused;
  // Options that depend on the data of a step are not among its numbers.
  if (!read_number(arguments[RESCALE], 0, 0, rescale) || arguments[RATIO] != Py_None ||
      arguments[LIMIT] != Py_None ||
      !read_word(arguments[IMPL], connected.implementations, unused) ||
      !read_step(arguments + COEFFICIENTS, step, guided) || !coefficients(step, exact)) {
    return declined();
  }
  std::copy(std::begin(exact), std::end(exact), rounded);
  if (!in_range(exact, rounded)) return declined();
  return take({.x = arguments[X],
               .model_output = arguments[MODEL_OUTPUT],
               .noise = arguments[NOISE],
               .seed = arguments[SEED],
               .sample_offset = arguments[OFFSET],
               .step_index = arguments[STEP],
               .out = arguments[OUT],
               .return_x0 = arguments[RETURN_X0]},
              {exact, rounded, step.noisy(), guided});
}

PyObject* make_stepper(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_count("make_stepper", 3, count)) return nullptr;
  Plain rows;
  bool noisy, guided;
  if (!read_memory(arguments[0], rows) || rows.dtype != Dtype::float64 || rows.dims != 2 ||
      rows.sizes[0] == 0 || rows.sizes[1] != ROW_FIELDS || rows.strides[1] != 1 ||
      (rows.sizes[0] > 1 && rows.strides[0] != ROW_FIELDS) || !read_bool(arguments[1], noisy) ||
      !read_bool(arguments[2], guided)) {
    PyErr_SetString(PyExc_TypeError,
                    "make_stepper: expected contiguous float64 rows and two booleans");
    return nullptr;
  }
  auto* const stepper = new Stepper((const double*)rows.data, rows.sizes[0], noisy, guided);
  PyObject* const capsule = PyCapsule_New(stepper, STEPPER, free_stepper);
  if (!capsule) {
    delete stepper;
    return nullptr;
  }
  PyObject* const function = PyCFunction_NewEx(&stepper_call, capsule, nullptr);
  Py_DECREF(capsule);
  return function;
}

}  // namespace fastddim
