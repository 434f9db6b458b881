// The operators on the CPU, and the functions of the module.
//
// The schemas are in fastddim/ops.py, the checks in call.h; the arithmetic is in formula.h.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "call.h"
#include "cpu/run.h"
#include "cpu/select.h"
#include "direct.h"
#include "layout.h"

namespace {

using namespace fastddim;

// The passes over a sample that fitting its row takes.
constexpr int64_t FIT_PASSES = 4;

std::atomic<const Kernels*> kernels{nullptr};

void update_out(const UpdateArguments& given) {
  const Shape shape(given.x, "x");
  Job job = update_job(shape, given);
  const JobLayout layout(job, shape.sizes, (int)shape.dims, job.seed != nullptr,
                         job.row_stride == 0);
  set_tiles(job, layout);
  run(job, current_kernels().update, job.seed != nullptr);
}

// An uninitialised tensor with the layout that torch.empty_like gives it.
Tensor new_like(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return torch::stable::empty_like(tensor);
  AtenTensorHandle made;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(tensor.dim(), tensor.sizes().data(),
                                                  tensor.strides().data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A step outside a loop. Python makes two tensors fewer and passes ten arguments fewer than for
// `update_out`, which halves the time of a small step.
std::tuple<Tensor, Tensor> step(Tensor x, Tensor model_output, Tensor table, Optional row,
                                Optional noise) {
  Tensor x_prev = new_like(x), x_0 = new_like(x);
  update_out({.x = x,
              .model_output = model_output,
              .table = table,
              .row = row,
              .noise = noise,
              .out = x_prev,
              .x_0 = x_0});
  return {x_prev, x_0};
}

void fit_rows(Tensor x, Tensor model_output, Tensor table, Optional row, double rescale,
              double ratio, double limit, Tensor out) {
  const Shape shape(x, "x");
  Job job = fit_job(shape, x, model_output, table, row, rescale, ratio, limit, out);
  const JobLayout layout(job, shape.sizes, (int)shape.dims, true, false, Interleaved::as_any);
  const Kernel kernel = current_kernels().fit;
  const int64_t grain = GRAIN / (FIT_PASSES * std::max<int64_t>(job.count, 1)) + 1;
  if (job.batch <= grain) return kernel(job, 0, job.batch);
  torch::stable::parallel_for(0, job.batch, grain,
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

void backward_out(Optional grad_out, Optional grad_x_0, Tensor x, Tensor model_output, Tensor table,
                  Optional row, Optional mask, Tensor grad_x, Tensor grad_model_output) {
  const Shape shape(x, "x");
  Job job = backward_job(shape, grad_out, grad_x_0, x, model_output, table, row, mask, grad_x,
                         grad_model_output);
  const JobLayout layout(job, shape.sizes, (int)shape.dims, false, job.row_stride == 0);
  run(job, current_kernels().backward, false);
}

void normal_out(Tensor seed, Tensor step, Tensor sample, int64_t stream, Tensor out) {
  const Shape shape(out, "out");
  Job job = normal_job(shape, seed, step, sample, stream, out);
  const JobLayout layout(job, shape.sizes, (int)shape.dims, true, false);
  run(job, current_kernels().normal, true);
}

void run(const Advance& call) {
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t next = call.counters[i] + 1;
    if (i < call.t_count) {
      STD_TORCH_CHECK(next >= 0 && next < call.timesteps_count,
                      "fastddim: counters: expected values in [-1, ", call.timesteps_count - 1,
                      "), got ", next - 1);
      call.t[i] = call.timesteps[next];
    }
    call.counters[i] = next;
  }
}

void advance(Tensor counters, Tensor timesteps, Tensor t) { run(Advance(counters, timesteps, t)); }

// An update that is prepared once. It keeps the tensors that it reads and writes.
class HeldUpdate {
 public:
  explicit HeldUpdate(UpdateArguments given)
      : kept_(std::move(given)),
        shape_(kept_.x, "state"),
        job_(update_job(shape_, kept_)),
        layout_(job_, shape_.sizes, (int)shape_.dims, job_.seed != nullptr, job_.row_stride == 0) {
    set_tiles(job_, layout_);
    const View& second = job_.views[operand::conditional];
    guided_ = second.data != nullptr;
    conditional_ = second.data - job_.views[operand::unconditional].data;
  }

  // Let go of the model's output, for which `read_output_at` gives another before the next run.
  void release_output() { kept_.model_output = kept_.x; }

  // Read the model's output from this address, where one like the first lies. It is not kept.
  void read_output_at(char* model_output) {
    job_.views[operand::unconditional].data = model_output;
    if (guided_) job_.views[operand::conditional].data = model_output + conditional_;
  }

  void operator()() const { run(job_, current_kernels().update, job_.seed != nullptr); }

 private:
  UpdateArguments kept_;
  Shape shape_;
  Job job_;
  JobLayout layout_;
  bool guided_;
  ptrdiff_t conditional_;
};

// A loop's step, prepared except for the address of the model's output: it mixes known data, if
// there are any, updates the state and advances the counters.
class LoopStep {
 public:
  LoopStep(UpdateArguments update, Tensor counters, Tensor timesteps, Tensor t)
      : update_(std::move(update)),
        kept_{std::move(counters), std::move(timesteps), std::move(t)},
        advance_(kept_[0], kept_[1], kept_[2]) {
    update_.release_output();
  }

  // Take another update before each step's own, which writes the known data that it reads.
  void mix_by(UpdateArguments mixing) { mixing_.emplace(std::move(mixing)); }

  void operator()(char* model_output) {
    if (mixing_) (*mixing_)();
    update_.read_output_at(model_output);
    update_();
    run(advance_);
  }

 private:
  std::optional<HeldUpdate> mixing_;
  HeldUpdate update_;
  Tensor kept_[3];
  Advance advance_;
};

// Makes a step for `take_loop_step`, which then owns it. Masked steps get the last six tensors, of
// which `data` and `x_T` are mixed into `known`.
int64_t make_loop_step(Tensor state, Tensor model_output, Tensor table, Tensor row, Optional seed,
                       Optional step, Optional sample, Optional history, Optional model_input,
                       Tensor counters, Tensor timesteps, Tensor t, Optional mask, Optional known,
                       Optional data, Optional x_T, Optional known_table, Optional known_row) {
  auto made = std::make_unique<LoopStep>(UpdateArguments{.x = state,
                                                         .model_output = model_output,
                                                         .table = table,
                                                         .row = row,
                                                         .seed = seed,
                                                         .step = step,
                                                         .sample = sample,
                                                         .history = history,
                                                         .mask = mask,
                                                         .known = known,
                                                         .out = state,
                                                         .model_input = model_input,
                                                         .epsilon = history},
                                         counters, timesteps, t);
  if (known) {
    STD_TORCH_CHECK(data && x_T && known_table && known_row,
                    "fastddim: data, x_T, known_table, known_row: expected all beside known");
    made->mix_by({.x = *data,
                  .model_output = *x_T,
                  .table = *known_table,
                  .row = *known_row,
                  .out = *known});
  }
  return (int64_t)made.release();
}

constexpr const char* LOOP_STEP = "fastddim.LoopStep";

void free_loop_step(PyObject* capsule) {
  delete (LoopStep*)PyCapsule_GetPointer(capsule, LOOP_STEP);
}

PyObject* call_loop_step(PyObject* capsule, PyObject* address) {
  auto* const step = (LoopStep*)PyCapsule_GetPointer(capsule, LOOP_STEP);
  char* const model_output = (char*)PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  std::string failure;
  Py_BEGIN_ALLOW_THREADS;
  try {
    (*step)(model_output);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  Py_END_ALLOW_THREADS;
  if (failure.empty()) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, failure.c_str());
  return nullptr;
}

PyMethodDef loop_step = {"loop_step", call_loop_step, METH_O,
                         "Take the step; the argument is the address of the model's output."};

PyObject* take_loop_step(PyObject*, PyObject* made) {
  void* const step = PyLong_AsVoidPtr(made);
  if (PyErr_Occurred()) return nullptr;
  PyObject* const capsule = PyCapsule_New(step, LOOP_STEP, free_loop_step);
  if (!capsule) return nullptr;
  PyObject* const function = PyCFunction_NewEx(&loop_step, capsule, nullptr);
  Py_DECREF(capsule);
  return function;
}

PyMethodDef methods[] = {
    {"take_loop_step", take_loop_step, METH_O,
     "What calls and owns the result of fastddim::make_loop_step."},
    {"connect", (PyCFunction)(void*)connect, METH_FASTCALL,
     "Hand over what `step` and steppers ask Python for."},
    {"step", (PyCFunction)(void*)direct_step, METH_FASTCALL,
     "The result of a step of numbers; None where only the operators can take it."},
    {"make_stepper", (PyCFunction)(void*)make_stepper, METH_FASTCALL,
     "A function that takes the steps of a table of rows."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const Kernels& fastddim::current_kernels() {
  const Kernels* chosen = kernels.load(std::memory_order_relaxed);
  if (!chosen) {
    chosen = supported_kernels(nullptr);
    kernels.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

STABLE_TORCH_LIBRARY_IMPL(fastddim, CPU, m) {
  m.impl("update_out", TORCH_BOX(&update_operator<update_out>));
  m.impl("backward_out", TORCH_BOX(&backward_out));
  m.impl("step", TORCH_BOX(&step));
  m.impl("fit_rows", TORCH_BOX(&fit_rows));
  m.impl("normal_out", TORCH_BOX(&normal_out));
  m.impl("advance", TORCH_BOX(&advance));
  m.impl("make_loop_step", TORCH_BOX(&make_loop_step));
}

// For tests and bug reports, through ctypes: the instruction set in use, and a function that sets
// another one (0 where this CPU lacks it).
extern "C" __attribute__((visibility("default"))) const char* fastddim_instruction_set() {
  return current_kernels().name;
}
extern "C" __attribute__((visibility("default"))) int fastddim_use_instruction_set(
    const char* name) {
  const fastddim::Kernels* chosen = fastddim::supported_kernels(name);
  if (chosen) kernels.store(chosen, std::memory_order_relaxed);
  return chosen != nullptr;
}

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
