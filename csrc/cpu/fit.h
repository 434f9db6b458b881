// The factors that rows take from the data of their samples, as rescaled_rows in
// fastddim/reference.py specifies them. Included inside the namespace of an instruction set.
//
// Nothing of the size of a sample is kept: each pass works the values out anew from x and the model
// output. Sums have a fixed order, so that the result depends on neither threads nor batch.

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

// Sum of squared deviations from the mean, of values near `shift`.
struct Spread {
  static constexpr int LANES_OF_SUM = 8;
  double shift = 0, sums[LANES_OF_SUM] = {}, squares[LANES_OF_SUM] = {};

  template <class T>
  FASTDDIM_FN void add(const T* values, int64_t count) {
    int64_t i = 0;
    for (; i + LANES_OF_SUM <= count; i += LANES_OF_SUM) {
      for (int lane = 0; lane < LANES_OF_SUM; ++lane) take(lane, values[i + lane]);
    }
    for (; i < count; ++i) take((int)(i % LANES_OF_SUM), values[i]);
  }
  FASTDDIM_FN void take(int lane, double value) {
    const double d = value - shift;
    sums[lane] += d;
    squares[lane] += d * d;
  }
  FASTDDIM_FN double total(int64_t count) const {
    double sum = 0, square = 0;
    for (int lane = 0; lane < LANES_OF_SUM; ++lane) sum += sums[lane], square += squares[lane];
    return square - sum * sum / (double)count;
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
  const double ratio = __builtin_sqrt(of_conditional.total(job.count) / of_guided.total(job.count));
  const bool finite = ratio - ratio == 0;
  return (T)(job.rescale * (finite ? ratio : 1) + (1 - job.rescale));
}

template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Word = uint32_t;
  static constexpr int BITS = 31;
  static constexpr Word INFINITE = 0x7F800000u;
};
template <>
struct Magnitude<double> {
  using Word = uint64_t;
  static constexpr int BITS = 63;
  static constexpr Word INFINITE = 0x7FF0000000000000u;
};

// Calls visit(word) with |x_0| of every element as its bits, which have the order of the values.
template <class T, class Visit>
FASTDDIM_FN void for_each_magnitude(const Job& job, int64_t sample, const Row<T>& row,
                                    Visit visit) {
  using Word = typename Magnitude<T>::Word;
  alignas(64) T x_0[TILE];
  for_each_tile(job, sample, row, [&](const T* x, const T* m, const T*, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x_0[i] = unclipped_x_0(row, x[i], m[i]);
    for (int64_t i = 0; i < count; ++i) {
      Word word;
      __builtin_memcpy(&word, x_0 + i, sizeof word);
      visit((Word)(word & ~((Word)1 << Magnitude<T>::BITS)));
    }
  });
}

// Order statistic `rank` (from 0) of |x_0| and the next one, by radix selection: each pass counts
// the next digit of the values that share the digits found so far. False where any is NaN.
template <class T>
FASTDDIM_FN bool order_statistics(const Job& job, int64_t sample, const Row<T>& row, int64_t rank,
                                  T& low, T& high) {
  using Word = typename Magnitude<T>::Word;
  constexpr int DIGIT = 11;
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
  __builtin_memcpy(&low, &prefix, sizeof low);
  __builtin_memcpy(&high, &next, sizeof high);
  return true;
}

// The quantile of |x_0|, between 1 and the limit; NaN where any element is.
template <class T>
FASTDDIM_FN T threshold(const Job& job, int64_t sample, const Row<T>& row) {
  if (job.count == 0) return 1;
  const double position = job.ratio * (double)(job.count - 1);
  const int64_t rank = (int64_t)position;
  T low, high;
  if (!order_statistics(job, sample, row, rank, low, high)) return __builtin_nan("");
  const T s = low + (high - low) * (T)(position - (double)rank);
  const T floored = s < 1 ? (T)1 : s;
  return floored > job.limit ? (T)job.limit : floored;
}

template <class T>
void fit_samples(const Job& job, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    Row<T> row = row_of<T>(job, sample);
    if (job.rescale > 0) {
      const T factor = rescaling(job, sample, row);
      row.cm *= factor;
      row.km *= factor;
      row.em *= factor;
    }
    if (job.ratio > 0) {
      const T s = threshold(job, sample, row);
      row.cx /= s;
      row.cm /= s;
      row.r = 1;
    }
    __builtin_memcpy((T*)job.fitted + sample * ROW_FIELDS, &row, sizeof row);
  }
}
