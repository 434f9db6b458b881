// The operators' CPU implementation on libtorch's stable ABI: checks, layout, threads.
//
// The schemas are in fastddim/ops.py; the arithmetic is in formula.h.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <optional>

#include "cpu/job.h"
#include "cpu/layout.h"
#include "cpu/select.h"
#include "formula.h"

namespace {

using fastddim::DIRECT_TILE;
using fastddim::Dtype;
using fastddim::Job;
using fastddim::Kernel;
using fastddim::Kernels;
using fastddim::Layout;
using fastddim::TILE;
using fastddim::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The stream of fastddim/philox.py that updates draw from.
constexpr uint32_t STEP_NOISE = 1;

constexpr int ROW_FIELDS = FASTDDIM_NAMESPACE::ROW_FIELDS;

// A second thread costs about as much as this many elements.
constexpr int64_t GRAIN = 32768, NOISY_GRAIN = 16384;

// Above this many bytes the output would only push the inputs out of the caches.
constexpr int64_t STREAMING_BYTES = 16 << 20;

std::atomic<const Kernels*> kernels{nullptr};

const Kernels& current_kernels() {
  const Kernels* chosen = kernels.load(std::memory_order_relaxed);
  if (!chosen) {
    chosen = fastddim::supported_kernels(nullptr);
    kernels.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "fastddim: ", name, ": expected a floating-point tensor, got dtype ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

struct Shape {
  const int64_t* sizes;
  int64_t dims;
};

// A view of one of `parts` equal stacks of B samples, which must have the state's shape. Twice the
// channels are taken where `wide` is allowed: the view then covers the first half.
View view_of(const Tensor& tensor, const char* name, const Shape& shape, int64_t parts = 1,
             int64_t part = 0, bool wide = false) {
  STD_TORCH_CHECK(tensor.is_cpu(), "fastddim: ", name, ": expected a CPU tensor");
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  STD_TORCH_CHECK((int64_t)sizes.size() == shape.dims, "fastddim: ", name, ": expected ",
                  shape.dims, " dimensions, got ", sizes.size());
  for (int64_t d = 0; d < shape.dims; ++d) {
    int64_t expected = (d == 0 ? parts : 1) * shape.sizes[d];
    STD_TORCH_CHECK(sizes[d] == expected || (wide && d == 1 && sizes[d] == 2 * expected),
                    "fastddim: ", name, ": expected size ", expected, " in dimension ", d, ", got ",
                    sizes[d]);
  }
  View view;
  view.dtype = dtype_of(tensor, name);
  view.sample_stride = strides[0];
  view.strides = strides.data() + 1;
  view.data =
      (char*)tensor.data_ptr() + part * shape.sizes[0] * view.sample_stride * size_of(view.dtype);
  return view;
}

View view_of(const Optional& tensor, const char* name, const Shape& shape) {
  return tensor ? view_of(*tensor, name, shape) : View();
}

// A model output, or its gradient: B samples, or under guidance B unconditional, then B
// conditional.
void set_halves(View& unconditional, View& conditional, const Tensor& tensor, const char* name,
                const Shape& shape) {
  const int64_t parts = tensor.size(0) == shape.sizes[0] ? 1 : 2;
  unconditional = view_of(tensor, name, shape, parts, 0, true);
  if (parts == 2) conditional = view_of(tensor, name, shape, 2, 1, true);
}

void set_rows(Job& job, const Tensor& table, const Tensor& row) {
  STD_TORCH_CHECK(table.is_cpu() && row.is_cpu(), "fastddim: table, row: expected CPU tensors");
  const ScalarType expected = job.float64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(table.scalar_type() == expected, "fastddim: table: expected dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(table.scalar_type()));
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == ROW_FIELDS && table.is_contiguous(),
                  "fastddim: table: expected a contiguous tensor [R, ", ROW_FIELDS, "]");
  STD_TORCH_CHECK(row.scalar_type() == ScalarType::Long && row.dim() == 1 && row.is_contiguous() &&
                      (row.size(0) == 1 || row.size(0) == job.batch),
                  "fastddim: row: expected a contiguous int64 tensor [1] or [B]");
  job.table = table.data_ptr();
  job.row = (const int64_t*)row.data_ptr();
  job.row_stride = row.size(0) > 1;
  const int64_t rows = table.size(0);
  for (int64_t i = 0; i < row.size(0); ++i) {
    STD_TORCH_CHECK(job.row[i] >= 0 && job.row[i] < rows, "fastddim: row: expected values in [0, ",
                    rows, "), got ", job.row[i]);
  }
}

const int64_t* key_of(const Tensor& tensor, const char* name, int64_t batch) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long &&
                      tensor.dim() == 1 && tensor.size(0) == batch && tensor.is_contiguous(),
                  "fastddim: ", name, ": expected a contiguous int64 CPU tensor [B]");
  return (const int64_t*)tensor.data_ptr();
}

void set_keys(Job& job, const Optional& seed, const Optional& step, const Optional& sample,
              uint32_t stream) {
  if (!seed) return;
  job.stream = stream;
  STD_TORCH_CHECK(step && sample, "fastddim: step, sample: expected both beside seed");
  job.seed = key_of(*seed, "seed", job.batch);
  job.step = key_of(*step, "step", job.batch);
  job.sample = key_of(*sample, "sample", job.batch);
}

void check_dims(const Shape& shape, const char* name) {
  STD_TORCH_CHECK(shape.dims >= 1 && shape.dims < fastddim::MAX_DIMS, "fastddim: ", name,
                  ": expected 1 to ", fastddim::MAX_DIMS - 1, " dimensions, got ", shape.dims);
}

void check_count(const Job& job) {
  STD_TORCH_CHECK(!job.seed || job.count <= (int64_t)4 << 32,
                  "fastddim: x: expected at most 2**34 elements a sample, got ", job.count);
}

Job job_of(const Tensor& x, const Shape& shape) {
  check_dims(shape, "x");
  Job job{};
  job.tile = TILE;
  job.x = view_of(x, "x", shape);
  job.float64 = job.x.dtype == Dtype::float64;
  job.batch = shape.sizes[0];
  return job;
}

void run(const Job& job, Kernel kernel, bool noisy) {
  const int64_t per_tile = std::max<int64_t>(std::min(job.count, job.tile), 1);
  const int64_t grain = std::max<int64_t>((noisy ? NOISY_GRAIN : GRAIN) / per_tile, 1);
  const int64_t tiles = job.batch * job.tiles_per_sample();
  if (tiles <= grain) return kernel(job, 0, tiles);
  torch::stable::parallel_for(0, tiles, grain,
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

void update_out(Tensor x, Tensor model_output, Tensor table, Tensor row, Optional noise,
                Optional seed, Optional step, Optional sample, Optional history, Optional mask,
                Optional known, Tensor out, Optional x_0, Optional model_input) {
  const auto sizes = x.sizes();
  const Shape shape{sizes.data(), (int64_t)sizes.size()};
  Job job = job_of(x, shape);
  set_halves(job.unconditional, job.conditional, model_output, "model_output", shape);
  job.noise = view_of(noise, "noise", shape);
  job.history = view_of(history, "history", shape);
  job.mask = view_of(mask, "mask", shape);
  job.known = view_of(known, "known", shape);
  STD_TORCH_CHECK(!job.mask.data == !job.known.data, "fastddim: mask, known: expected both");
  job.out = view_of(out, "out", shape);
  STD_TORCH_CHECK(job.out.dtype == job.x.dtype, "fastddim: out: expected the dtype of x");
  job.x_0 = view_of(x_0, "x_0", shape);
  if (model_input) {
    const int64_t parts = model_input->size(0) == shape.sizes[0] ? 1 : 2;
    for (int64_t part = 0; part < parts; ++part) {
      job.model_input[part] = view_of(*model_input, "model_input", shape, parts, part);
    }
  }
  set_rows(job, table, row);
  set_keys(job, seed, step, sample, STEP_NOISE);
  const Layout layout(job, shape.sizes, (int)shape.dims, job.seed != nullptr, job.row_stride == 0);
  check_count(job);
  const Dtype computed = job.float64 ? Dtype::float64 : Dtype::float32;
  if (!job.seed && layout.direct(computed)) job.tile = DIRECT_TILE;
  job.streaming = job.out.data != job.x.data && !model_input &&
                  job.batch * job.count * size_of(job.out.dtype) >= STREAMING_BYTES;
  run(job, current_kernels().update, job.seed != nullptr);
}

void backward_out(Optional grad_out, Optional grad_x_0, Tensor x, Tensor model_output, Tensor table,
                  Tensor row, Optional mask, Tensor grad_x, Tensor grad_model_output) {
  const auto sizes = x.sizes();
  const Shape shape{sizes.data(), (int64_t)sizes.size()};
  Job job = job_of(x, shape);
  set_halves(job.unconditional, job.conditional, model_output, "model_output", shape);
  job.mask = view_of(mask, "mask", shape);
  job.grad_out = view_of(grad_out, "grad_out", shape);
  job.grad_x_0 = view_of(grad_x_0, "grad_x_0", shape);
  job.grad_x = view_of(grad_x, "grad_x", shape);
  STD_TORCH_CHECK(grad_model_output.size(0) == model_output.size(0),
                  "fastddim: grad_model_output: expected the batch of model_output");
  set_halves(job.grad_unconditional, job.grad_conditional, grad_model_output, "grad_model_output",
             shape);
  set_rows(job, table, row);
  const Layout layout(job, shape.sizes, (int)shape.dims, false, job.row_stride == 0);
  run(job, current_kernels().backward, false);
}

void normal_out(Tensor seed, Tensor step, Tensor sample, int64_t stream, Tensor out) {
  const auto sizes = out.sizes();
  const Shape shape{sizes.data(), (int64_t)sizes.size()};
  check_dims(shape, "out");
  Job job{};
  job.tile = TILE;
  job.batch = shape.sizes[0];
  job.out = view_of(out, "out", shape);
  set_keys(job, seed, step, sample, (uint32_t)stream);
  const Layout layout(job, shape.sizes, (int)shape.dims, true, false);
  check_count(job);
  run(job, current_kernels().normal, true);
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastddim, CPU, m) {
  m.impl("update_out", TORCH_BOX(&update_out));
  m.impl("backward_out", TORCH_BOX(&backward_out));
  m.impl("normal_out", TORCH_BOX(&normal_out));
}

// For tests and bug reports, through ctypes: the instruction set in use, and another one to use
// from now on (0 where this CPU lacks it).
extern "C" __attribute__((visibility("default"))) const char* fastddim_instruction_set() {
  return current_kernels().name;
}
extern "C" __attribute__((visibility("default"))) int fastddim_use_instruction_set(
    const char* name) {
  const Kernels* chosen = fastddim::supported_kernels(name);
  if (chosen) kernels.store(chosen, std::memory_order_relaxed);
  return chosen != nullptr;
}

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
