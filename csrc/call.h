// A call of an operator, checked and turned into the plain data of job.h: the part that is the same
// on every device, on libtorch's stable ABI.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <utility>

#include "formula.h"
#include "job.h"

namespace fastddim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The stream of fastddim/philox.py that updates draw from.
constexpr uint32_t STEP_NOISE = 1;

constexpr int ROW_FIELDS = FASTDDIM_NAMESPACE::ROW_FIELDS;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
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

// The device that every tensor of a call must be on.
struct Place {
  bool cuda;
  int32_t index;

  explicit Place(const Tensor& tensor)
      : cuda(tensor.is_cuda()), index(cuda ? tensor.get_device_index() : 0) {}

  bool holds(const Tensor& tensor) const {
    return cuda ? tensor.is_cuda() && tensor.get_device_index() == index : tensor.is_cpu();
  }
  const char* name() const { return cuda ? "CUDA" : "CPU"; }
};

inline void check_place(const Tensor& tensor, const char* name, const Place& place) {
  STD_TORCH_CHECK(place.holds(tensor), "fastddim: ", name, ": expected a ", place.name(),
                  " tensor on the device of the state");
}

// The shape of a state `[B, …]`, which the other tensors of a call must fit.
struct Shape {
  const int64_t* sizes;
  int64_t dims;
  Place place;

  Shape(const Tensor& state, const char* name) : place(state) {
    const auto of = state.sizes();
    sizes = of.data();
    dims = (int64_t)of.size();
    STD_TORCH_CHECK(dims >= 1 && dims < MAX_DIMS, "fastddim: ", name, ": expected 1 to ",
                    MAX_DIMS - 1, " dimensions, got ", dims);
  }
};

// A view of one of `parts` equal stacks of B samples, which must have the state's shape. Twice the
// channels are taken where `wide` is allowed: the view then covers the first half.
inline View view_of(const Tensor& tensor, const char* name, const Shape& shape, int64_t parts = 1,
                    int64_t part = 0, bool wide = false) {
  check_place(tensor, name, shape.place);
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

inline View view_of(const Optional& tensor, const char* name, const Shape& shape) {
  return tensor ? view_of(*tensor, name, shape) : View();
}

// Sets the operand `first` to a tensor of B samples; or under guidance, `first` and the operand
// after it to the halves of one of 2B.
inline void set_halves(Job& job, operand::Operand first, const Tensor& tensor, const char* name,
                       const Shape& shape, bool wide) {
  const int64_t parts = tensor.size(0) == shape.sizes[0] ? 1 : 2;
  for (int64_t part = 0; part < parts; ++part) {
    job.views[first + part] = view_of(tensor, name, shape, parts, part, wide);
  }
}

inline const int64_t* integers_of(const Tensor& tensor, const char* name, const Place& place) {
  check_place(tensor, name, place);
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.is_contiguous(),
      "fastddim: ", name, ": expected a contiguous int64 tensor of one dimension");
  return (const int64_t*)tensor.data_ptr();
}

// Without row indices all samples have the first row of the table. The values of indices on a GPU
// are not checked, since reading them would wait for the device.
inline void set_rows(Job& job, const Tensor& table, const Optional& row, const Place& place) {
  check_place(table, "table", place);
  const ScalarType expected = job.float64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(table.scalar_type() == expected, "fastddim: table: expected dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(table.scalar_type()));
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == ROW_FIELDS && table.is_contiguous(),
                  "fastddim: table: expected a contiguous tensor [R, ", ROW_FIELDS, "]");
  job.table = table.data_ptr();
  const int64_t rows = table.size(0);
  if (!row) {
    STD_TORCH_CHECK(rows > 0, "fastddim: table: expected at least one row, got none");
    return;
  }
  job.row = integers_of(*row, "row", place);
  const int64_t count = row->size(0);
  STD_TORCH_CHECK(count == 1 || count == job.batch,
                  "fastddim: row: expected a contiguous int64 tensor [1] or [B], got [", count,
                  "]");
  job.row_stride = count > 1;
  for (int64_t i = 0; !place.cuda && i < count; ++i) {
    STD_TORCH_CHECK(job.row[i] >= 0 && job.row[i] < rows, "fastddim: row: expected values in [0, ",
                    rows, "), got ", job.row[i]);
  }
}

inline const int64_t* key_of(const Tensor& tensor, const char* name, int64_t batch,
                             const Place& place) {
  const int64_t* values = integers_of(tensor, name, place);
  STD_TORCH_CHECK(tensor.size(0) == batch, "fastddim: ", name, ": expected [B] = [", batch,
                  "], got [", tensor.size(0), "]");
  return values;
}

inline void set_keys(Job& job, const Optional& seed, const Optional& step, const Optional& sample,
                     uint32_t stream, const Shape& shape) {
  if (!seed) return;
  int64_t count = 1;
  for (int64_t d = 1; d < shape.dims; ++d) count *= shape.sizes[d];
  STD_TORCH_CHECK(count <= (int64_t)4 << 32,
                  "fastddim: x: expected at most 2**34 elements a sample, got ", count);
  job.stream = stream;
  STD_TORCH_CHECK(step && sample, "fastddim: step, sample: expected both beside seed");
  job.seed = key_of(*seed, "seed", job.batch, shape.place);
  job.step = key_of(*step, "step", job.batch, shape.place);
  job.sample = key_of(*sample, "sample", job.batch, shape.place);
}

inline Job job_of(const Tensor& x, const Shape& shape) {
  Job job{};
  job.tile = TILE;
  job.views[operand::x] = view_of(x, "x", shape);
  job.float64 = job.views[operand::x].dtype == Dtype::float64;
  job.batch = shape.sizes[0];
  return job;
}

// The arguments of `fastddim::update_out`, in the order of its schema. Hidden like torch's Tensor.
struct __attribute__((visibility("hidden"))) UpdateArguments {
  Tensor x, model_output, table;
  Optional row = {}, noise = {}, seed = {}, step = {}, sample = {}, history = {}, mask = {},
           known = {};
  Tensor out;
  Optional x_0 = {}, model_input = {}, epsilon = {};
};

// UPDATE as a function of single operands, the form that TORCH_BOX takes.
template <void (*UPDATE)(const UpdateArguments&)>
void update_operator(Tensor x, Tensor model_output, Tensor table, Optional row, Optional noise,
                     Optional seed, Optional step, Optional sample, Optional history, Optional mask,
                     Optional known, Tensor out, Optional x_0, Optional model_input,
                     Optional epsilon) {
  UPDATE({std::move(x), std::move(model_output), std::move(table), std::move(row), std::move(noise),
          std::move(seed), std::move(step), std::move(sample), std::move(history), std::move(mask),
          std::move(known), std::move(out), std::move(x_0), std::move(model_input),
          std::move(epsilon)});
}

inline Job update_job(const Shape& shape, const UpdateArguments& given) {
  Job job = job_of(given.x, shape);
  View* const views = job.views;
  set_halves(job, operand::unconditional, given.model_output, "model_output", shape, true);
  views[operand::noise] = view_of(given.noise, "noise", shape);
  views[operand::history] = view_of(given.history, "history", shape);
  views[operand::mask] = view_of(given.mask, "mask", shape);
  views[operand::known] = view_of(given.known, "known", shape);
  STD_TORCH_CHECK(!given.mask == !given.known, "fastddim: mask, known: expected both");
  views[operand::out] = view_of(given.out, "out", shape);
  STD_TORCH_CHECK(views[operand::out].dtype == views[operand::x].dtype,
                  "fastddim: out: expected the dtype of x");
  views[operand::x_0] = view_of(given.x_0, "x_0", shape);
  views[operand::epsilon] = view_of(given.epsilon, "epsilon", shape);
  if (given.model_input) {
    set_halves(job, operand::model_input, *given.model_input, "model_input", shape, false);
  }
  set_rows(job, given.table, given.row, shape.place);
  set_keys(job, given.seed, given.step, given.sample, STEP_NOISE, shape);
  return job;
}

// The job that writes rows into `out` as the update reads them.
inline Job fit_job(const Shape& shape, const Tensor& x, const Tensor& model_output,
                   const Tensor& table, const Optional& row, double rescale, double ratio,
                   double limit, const Tensor& out) {
  Job job = job_of(x, shape);
  set_halves(job, operand::unconditional, model_output, "model_output", shape, true);
  set_rows(job, table, row, shape.place);
  check_place(out, "out", shape.place);
  STD_TORCH_CHECK(out.scalar_type() == table.scalar_type() && out.is_contiguous() &&
                      out.dim() == 2 && out.size(0) == job.batch && out.size(1) == ROW_FIELDS,
                  "fastddim: out: expected a contiguous tensor [B, ", ROW_FIELDS,
                  "] in the dtype of table");
  STD_TORCH_CHECK(!(rescale > 0) || job.views[operand::conditional].data || job.batch == 0,
                  "fastddim: rescale: expected 0 where the model output is not guided");
  job.rescale = rescale;
  job.ratio = ratio;
  job.limit = limit;
  job.fitted = out.data_ptr();
  return job;
}

// The gradients of x and of the model output. Channels that are not read have no gradient and are
// not written.
inline Job backward_job(const Shape& shape, const Optional& grad_out, const Optional& grad_x_0,
                        const Tensor& x, const Tensor& model_output, const Tensor& table,
                        const Optional& row, const Optional& mask, const Tensor& grad_x,
                        const Tensor& grad_model_output) {
  Job job = job_of(x, shape);
  View* const views = job.views;
  set_halves(job, operand::unconditional, model_output, "model_output", shape, true);
  views[operand::mask] = view_of(mask, "mask", shape);
  views[operand::grad_out] = view_of(grad_out, "grad_out", shape);
  views[operand::grad_x_0] = view_of(grad_x_0, "grad_x_0", shape);
  views[operand::grad_x] = view_of(grad_x, "grad_x", shape);
  STD_TORCH_CHECK(grad_model_output.size(0) == model_output.size(0),
                  "fastddim: grad_model_output: expected the batch of model_output");
  set_halves(job, operand::grad_unconditional, grad_model_output, "grad_model_output", shape, true);
  set_rows(job, table, row, shape.place);
  return job;
}

inline Job normal_job(const Shape& shape, const Tensor& seed, const Tensor& step,
                      const Tensor& sample, int64_t stream, const Tensor& out) {
  Job job{};
  job.tile = TILE;
  job.batch = shape.sizes[0];
  job.views[operand::out] = view_of(out, "out", shape);
  set_keys(job, seed, step, sample, (uint32_t)stream, shape);
  return job;
}

// The counters of a loop: see `advance` in fastddim/ops.py.
struct Advance {
  int64_t *counters, *t;
  const int64_t* timesteps;
  int64_t count, t_count, timesteps_count;

  Advance(const Tensor& counters, const Tensor& timesteps, const Tensor& t) {
    const Place place(counters);
    this->counters = (int64_t*)integers_of(counters, "counters", place);
    this->timesteps = integers_of(timesteps, "timesteps", place);
    this->t = (int64_t*)integers_of(t, "t", place);
    count = counters.size(0);
    t_count = t.size(0);
    timesteps_count = timesteps.size(0);
    STD_TORCH_CHECK(t_count <= count, "fastddim: t: expected at most one value a counter, ", count,
                    ", got ", t_count);
  }
};

}  // namespace fastddim
