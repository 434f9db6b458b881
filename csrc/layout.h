// The order in which a job goes over its tensors: dimensions are reordered and merged until as many
// tensors as possible are one run of memory.

#pragma once

#include <stdint.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>

#include "job.h"

namespace fastddim {

// The order of elements where few channels, each a plane, are interleaved in memory: pixel by
// pixel, or as in any other layout.
enum class Interleaved { by_pixel, as_any };

// A job together with the sizes and strides that it points to.
class JobLayout {
 public:
  // `shape` is that of the state, batch first; each view has the strides of one sample, in the
  // same dimensions. `ordered`: elements must be counted in row-major order, since noise is keyed
  // by it. `one_row`: all samples share one row.
  JobLayout(Job& job, const int64_t* shape, int dims, bool ordered, bool one_row,
            Interleaved interleaved = Interleaved::by_pixel)
      : job_(job) {
    job.batch = shape[0];
    job.count = 1;
    for (int d = 1; d < dims; ++d) job.count *= shape[d];
    collect(shape + 1, dims - 1);
    const View& out = job.views[operand::out];
    if (!ordered) sort_by(out.data ? out : job.views[operand::grad_x]);
    merge();
    if (ordered && interleaved == Interleaved::by_pixel) turn_channels_last();
    mark_contiguous();
    if (!ordered && one_row) absorb_batch();
    job.ndim = ndim_;
    job.sizes = sizes_.data();
  }
  // True if every tensor can be read and written where it lies, in the order elements are counted.
  bool direct(Dtype computed) const {
    bool all = true;
    for (int v = 0; v < views_; ++v) all &= view_[v]->contiguous && view_[v]->dtype == computed;
    return all;
  }
  JobLayout(const JobLayout&) = delete;
  JobLayout& operator=(const JobLayout&) = delete;

 private:
  // With more channels than these the runs of noise in a tile are too short to be worth it.
  static constexpr int64_t MAX_CHANNELS = 8;

  void collect(const int64_t* sizes, int dims) {
    for (View& view : job_.views) add(view, sizes, dims);
    for (int d = 0; d < dims; ++d) {
      if (sizes[d] != 1) sizes_[ndim_++] = sizes[d];
    }
  }

  void add(View& view, const int64_t* sizes, int dims) {
    if (!view.data) return;
    int64_t* strides = strides_[views_];
    for (int d = 0, kept = 0; d < dims; ++d) {
      if (sizes[d] != 1) strides[kept++] = view.strides[d];
    }
    view.strides = strides;
    view_[views_++] = &view;
  }

  // Sorts dimensions by the strides of `like`, the largest first.
  void sort_by(const View& like) {
    if (!like.data) return;
    std::array<int, MAX_DIMS> order;
    for (int d = 0; d < ndim_; ++d) order[d] = d;
    std::stable_sort(order.begin(), order.begin() + ndim_, [&](int a, int b) {
      return std::abs(like.strides[a]) > std::abs(like.strides[b]);
    });
    permute(sizes_.data(), order);
    for (int v = 0; v < views_; ++v) permute(strides_[v], order);
  }

  void permute(int64_t* values, const std::array<int, MAX_DIMS>& order) {
    std::array<int64_t, MAX_DIMS> old;
    for (int d = 0; d < ndim_; ++d) old[d] = values[d];
    for (int d = 0; d < ndim_; ++d) values[d] = old[order[d]];
  }

  // Merges neighbouring dimensions that are one run in every view.
  void merge() {
    int kept = 0;
    for (int d = 1; d < ndim_; ++d) {
      bool run = true;
      for (int v = 0; v < views_; ++v) run &= strides_[v][kept] == strides_[v][d] * sizes_[d];
      if (!run) ++kept;
      sizes_[kept] = run ? sizes_[kept] * sizes_[d] : sizes_[d];
      for (int v = 0; v < views_; ++v) strides_[v][kept] = strides_[v][d];
    }
    if (ndim_ > 0) ndim_ = kept + 1;
  }

  void turn_channels_last() {
    const View& out = job_.views[operand::out];
    if (ndim_ != 2 || sizes_[0] > MAX_CHANNELS || out.strides[0] != 1) return;
    if (out.strides[1] != sizes_[0]) return;
    job_.channels = sizes_[0];
    std::swap(sizes_[0], sizes_[1]);
    for (int v = 0; v < views_; ++v) std::swap(strides_[v][0], strides_[v][1]);
  }

  void mark_contiguous() {
    for (int v = 0; v < views_; ++v) {
      int64_t expected = 1;
      view_[v]->contiguous = true;
      for (int d = ndim_ - 1; d >= 0; --d) {
        view_[v]->contiguous &= strides_[v][d] == expected;
        expected *= sizes_[d];
      }
    }
  }

  // Makes many small samples that follow each other in every view one large sample.
  void absorb_batch() {
    for (int v = 0; v < views_; ++v) {
      if (!view_[v]->contiguous) return;
      if (job_.batch > 1 && view_[v]->sample_stride != job_.count) return;
    }
    job_.count *= job_.batch;
    job_.batch = job_.count > 0;
    ndim_ = 1;
    sizes_[0] = job_.count;
    for (int v = 0; v < views_; ++v) strides_[v][0] = 1;
  }

  Job& job_;
  int ndim_ = 0, views_ = 0;
  std::array<int64_t, MAX_DIMS> sizes_;
  View* view_[operand::COUNT];
  int64_t strides_[operand::COUNT][MAX_DIMS];
};

}  // namespace fastddim
