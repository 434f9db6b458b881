// The factors that rows take from the data of their samples. Included inside the namespace of an
// instruction set.
//
// Nothing of the size of a sample is kept: each pass works the values out anew from x and the model
// output.

// Calls visit(x, m, conditional, count) for each tile of a sample, with m guided.
template <class T, class Visit>
FASTDDIM_FN void for_each_tile(const Job& job, int64_t sample, const Row<T>& row, Visit visit) {
  alignas(64) T buffers[operand::OF_UPDATE][TILE], m[TILE];
  for (int64_t first = 0; first < job.count; first += job.tile) {
    const Span span{job, sample, first};
    const T* x = input(span, operand::x, buffers);
    const T* unconditional = input(span, operand::unconditional, buffers);
    const T* conditional = input(span, operand::conditional, buffers);
    for (int64_t i = 0; i < span.count; ++i) {
      m[i] = conditional ? guided(row, unconditional[i], conditional[i]) : unconditional[i];
    }
    visit(x, m, conditional, span.count);
  }
}

// The sums over a sample of one kind of value, after the first value is subtracted from each.
struct Spread {
  double shift = 0;
  alignas(64) double sums[ACCUMULATORS] = {}, squares[ACCUMULATORS] = {};

  // Whole multiples of ACCUMULATORS, except for the last values.
  template <class T>
  FASTDDIM_FN void add(const T* values, int64_t count) {
    int64_t i = 0;
    for (; i + ACCUMULATORS <= count; i += ACCUMULATORS) take(values + i, ACCUMULATORS);
    take(values + i, count - i);
  }
  template <class T>
  FASTDDIM_FN void take(const T* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const double d = values[i] - shift;
      sums[i] += d;
      squares[i] += d * d;
    }
  }
  FASTDDIM_FN double squared_deviations(int64_t count) {
    for (int width = ACCUMULATORS / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width], squares[i] += squares[i + width];
    }
    return FASTDDIM_NAMESPACE::squared_deviations(sums[0], squares[0], count);
  }
};

template <class T>
FASTDDIM_FN T rescaling(const Job& job, int64_t sample, const Row<T>& row) {
  Spread of_conditional, of_guided;
  bool first = true;
  for_each_tile(job, sample, row, [&](const T*, const T* m, const T* conditional, int64_t count) {
    if (first) of_conditional.shift = conditional[0], of_guided.shift = m[0];
    first = false;
    of_conditional.add(conditional, count);
    of_guided.add(m, count);
  });
  return rescaling_factor<T>(of_conditional.squared_deviations(job.count),
                             of_guided.squared_deviations(job.count), job.rescale);
}

// Calls visit(word) with |x_0| of every element as its bits, which have the order of the values.
template <class T, class Visit>
FASTDDIM_FN void for_each_magnitude(const Job& job, int64_t sample, const Row<T>& row,
                                    Visit visit) {
  alignas(64) T x_0[TILE];
  for_each_tile(job, sample, row, [&](const T* x, const T* m, const T*, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x_0[i] = unclipped_x_0(row, x[i], m[i]);
    for (int64_t i = 0; i < count; ++i) visit(magnitude_of(x_0[i]));
  });
}

// Order statistic `rank` (from 0) of |x_0| and the next one, by radix selection: each pass counts
// the next digit of the values that share the digits found so far. False where any is NaN.
template <class T>
FASTDDIM_FN bool order_statistics(const Job& job, int64_t sample, const Row<T>& row, int64_t rank,
                                  T& low, T& high) {
  using Word = typename Magnitude<T>::Word;
  int64_t counts[1 << DIGIT];
  Word prefix = 0, largest = 0;
  int64_t equal = 0;
  for (int shift = Magnitude<T>::BITS; shift > 0;) {
    const int width = shift < DIGIT ? shift : DIGIT, known = shift;
    shift -= width;
    for (auto& count : counts) count = 0;
    for_each_magnitude(job, sample, row, [&](Word word) {
      largest = word > largest ? word : largest;
      if (word >> known == prefix) ++counts[word >> shift & (((Word)1 << width) - 1)];
    });
    if (largest > Magnitude<T>::INFINITE) return false;
    int64_t digit = 0;
    for (; rank >= counts[digit]; ++digit) rank -= counts[digit];
    prefix = prefix << width | (Word)digit;
    equal = counts[digit];
  }
  Word next = prefix;
  if (rank + 1 >= equal && largest > prefix) {
    next = largest;
    for_each_magnitude(job, sample, row, [&](Word word) {
      if (word > prefix && word < next) next = word;
    });
  }
  low = value_of<T>(prefix);
  high = value_of<T>(next);
  return true;
}

// NaN where any element is NaN.
template <class T>
FASTDDIM_FN T threshold(const Job& job, int64_t sample, const Row<T>& row) {
  if (job.count == 0) return 1;
  const Quantile quantile(job.ratio, job.count);
  T low, high;
  if (!order_statistics(job, sample, row, quantile.rank, low, high)) return __builtin_nan("");
  return threshold_between(low, high, quantile.fraction, job.limit);
}

template <class T>
void fit_samples(const Job& job, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    Row<T> row = row_of<T>(job, sample);
    if (job.rescale > 0) rescale_row(row, rescaling(job, sample, row));
    if (job.ratio > 0) threshold_row(row, threshold(job, sample, row));
    __builtin_memcpy((T*)job.fitted + sample * ROW_FIELDS, &row, sizeof row);
  }
}
