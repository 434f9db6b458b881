// Tiles moved in and out of memory: dtype conversion, gathering and scattering. Included inside the
// namespace of an instruction set.

// One tile of one sample: elements first … first + count − 1.
struct Span {
  const Job& job;
  int64_t sample, first, count;
  Span(const Job& job, int64_t sample, int64_t first)
      : job(job), sample(sample), first(first), count(least(job.tile, job.count - first)) {}
};

template <class S, class T>
FASTDDIM_FN void read_run(const S* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = (T)widened(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = (T)widened(from[i * stride]);
  }
}

template <class S, class T>
FASTDDIM_FN void write_run(S* to, int64_t stride, int64_t count, const T* from) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i * stride]);
  }
}

#if FASTDDIM_LANES > 1
FASTDDIM_FN void read_run(const Half* from, int64_t stride, int64_t count, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + LANES <= count; i += LANES) store(to + i, from_half((const uint16_t*)from + i));
  }
  for (; i < count; ++i) to[i] = widened(from[i * stride]);
}

FASTDDIM_FN void write_run(Half* to, int64_t stride, int64_t count, const float* from) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + LANES <= count; i += LANES) to_half((uint16_t*)to + i, load<Floats>(from + i));
  }
  for (; i < count; ++i) narrow(from[i], to[i * stride]);
}
#endif

// Calls visit(offset, stride, position, count) for each run of equally spaced elements in a span.
template <class Visit>
FASTDDIM_FN void for_each_run(const View& view, const Span& span, Visit visit) {
  const int64_t base = span.sample * view.sample_stride;
  if (view.contiguous) return visit(base + span.first, 1, 0, span.count);
  const int last = span.job.ndim - 1;
  const int64_t* sizes = span.job.sizes;
  int64_t position = 0;
  while (position < span.count) {
    int64_t rest = span.first + position, offset = base, column = 0;
    for (int d = last; d >= 0; --d) {
      int64_t index = rest % sizes[d];
      if (d == last) column = index;
      offset += index * view.strides[d];
      rest /= sizes[d];
    }
    int64_t count = least(sizes[last] - column, span.count - position);
    visit(offset, view.strides[last], position, count);
    position += count;
  }
}

template <class S, class T>
FASTDDIM_FN void read_as(const View& view, const Span& span, T* buffer) {
  for_each_run(view, span, [&](int64_t offset, int64_t stride, int64_t position, int64_t count) {
    read_run((const S*)view.data + offset, stride, count, buffer + position);
  });
}

template <class S, class T>
FASTDDIM_FN void write_as(const View& view, const Span& span, const T* buffer) {
  for_each_run(view, span, [&](int64_t offset, int64_t stride, int64_t position, int64_t count) {
    write_run((S*)view.data + offset, stride, count, buffer + position);
  });
}

FASTDDIM_FN bool same(Dtype dtype, float) { return dtype == Dtype::float32; }
FASTDDIM_FN bool same(Dtype dtype, double) { return dtype == Dtype::float64; }

// The address of the span in memory if it can be used there, else `buffer`; null for an absent
// tensor.
template <class T>
FASTDDIM_FN T* direct_or_buffer(const View& view, const Span& span, T* buffer) {
  if (!view.data) return nullptr;
  if (!view.contiguous || !same(view.dtype, T())) return buffer;
  return (T*)view.data + span.sample * view.sample_stride + span.first;
}

template <class T>
const T* read(const View& view, const Span& span, T* buffer) {
  T* at = direct_or_buffer(view, span, buffer);
  if (at != buffer) return at;
  switch (view.dtype) {
    case Dtype::float32:
      read_as<float>(view, span, buffer);
      break;
    case Dtype::float64:
      read_as<double>(view, span, buffer);
      break;
    case Dtype::float16:
      read_as<Half>(view, span, buffer);
      break;
    case Dtype::bfloat16:
      read_as<BFloat16>(view, span, buffer);
      break;
  }
  return buffer;
}

template <class T>
void write(const View& view, const Span& span, const T* from) {
  if (!view.data || direct_or_buffer(view, span, (T*)nullptr) == from) return;
  switch (view.dtype) {
    case Dtype::float32:
      write_as<float>(view, span, from);
      break;
    case Dtype::float64:
      write_as<double>(view, span, from);
      break;
    case Dtype::float16:
      write_as<Half>(view, span, from);
      break;
    case Dtype::bfloat16:
      write_as<BFloat16>(view, span, from);
      break;
  }
}

// An operand of a span to be read, in place or in its buffer.
template <class T, int COUNT>
FASTDDIM_FN const T* input(const Span& span, int v, T (&buffers)[COUNT][TILE]) {
  return read(span.job.views[v], span, buffers[v]);
}

// An operand of a span to be written, in place or in its buffer.
template <class T, int COUNT>
FASTDDIM_FN T* output(const Span& span, int v, T (&buffers)[COUNT][TILE]) {
  return direct_or_buffer(span.job.views[v], span, buffers[v]);
}

// The tile rounded to the state's dtype, like the values of a user who casts the new state for the
// model.
FASTDDIM_FN const float* rounded(Dtype dtype, int64_t count, float* tile) {
  for (int64_t i = 0; i < count; ++i) {
    Half half;
    BFloat16 bfloat16;
    if (dtype == Dtype::float16) narrow(tile[i], half), tile[i] = widened(half);
    if (dtype == Dtype::bfloat16) narrow(tile[i], bfloat16), tile[i] = widened(bfloat16);
  }
  return tile;
}
FASTDDIM_FN const double* rounded(Dtype, int64_t, double* tile) { return tile; }
