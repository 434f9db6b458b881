// Noise of a tile, in the order in which elements are counted. Included inside the namespace of an
// instruction set.

#if FASTDDIM_LANES > 1

FASTDDIM_FN void philox_round(const Words (&multipliers)[2], const Words (&keys)[2],
                              Words (&counter)[4]) {
  Words product_0 = product(multipliers[0], counter[0]);
  Words product_1 = product(multipliers[1], counter[2]);
  counter[0] = mixed(product_1, counter[1], keys[0]);
  counter[1] = product_1;
  counter[2] = mixed(product_0, counter[3], keys[1]);
  counter[3] = product_0;
}

// The last round of two counters, whose words alternate from then on.
FASTDDIM_FN void merging_round(const Words (&multipliers)[2], const Words (&keys)[2],
                               const Words (&even)[4], const Words (&odd)[4], Words (&result)[4]) {
  Words even_0 = product(multipliers[0], even[0]), odd_0 = product(multipliers[0], odd[0]);
  Words even_1 = product(multipliers[1], even[2]), odd_1 = product(multipliers[1], odd[2]);
  result[0] = merged_high(even_1, odd_1) ^ merged(even[1], odd[1]) ^ keys[0];
  result[1] = merged(even_1, odd_1);
  result[2] = merged_high(even_0, odd_0) ^ merged(even[3], odd[3]) ^ keys[1];
  result[3] = merged(even_0, odd_0);
}

// The part that the quads of a sample share: all products of the first round except one, and the
// keys.
struct Rounds {
  Words multipliers[2], keys[PHILOX_ROUNDS][2];
  Words stream, first_0, first_1;  // of the first round, and two of its words

  FASTDDIM_FN explicit Rounds(const Key& key) {
    const uint64_t product_1 = (uint64_t)PHILOX_MULTIPLIER_1 * key.sample;
    multipliers[0] = words(PHILOX_MULTIPLIER_0);
    multipliers[1] = words(PHILOX_MULTIPLIER_1);
    stream = words(key.stream);
    first_0 = words((uint32_t)(product_1 >> 32) ^ key.step ^ (uint32_t)key.seed);
    first_1 = words((uint32_t)product_1);
    uint32_t k_0 = (uint32_t)key.seed, k_1 = (uint32_t)(key.seed >> 32);
    for (auto& round : keys) {
      round[0] = words(k_0);
      round[1] = words(k_1);
      k_0 += PHILOX_WEYL_0;
      k_1 += PHILOX_WEYL_1;
    }
  }
};

// Two batches of LANES quads: 8·LANES normals, given to `sink(i, z)` from element `at` on. A batch
// is two halves of the words' lanes. `products` are those of the first multiplier and the quads.
constexpr int64_t BATCH = 8 * LANES;

template <class Sink>
FASTDDIM_FN void normals_of_batches(const Rounds& rounds, const Words (&products)[PARTS],
                                    int64_t at, Sink sink) {
  Words counters[PARTS][4];
  for (int i = 0; i < PARTS; ++i) {
    counters[i][0] = rounds.first_0;
    counters[i][1] = rounds.first_1;
    counters[i][2] = mixed(products[i], rounds.stream, rounds.keys[0][1]);
    counters[i][3] = products[i];
  }
  constexpr int LAST = PHILOX_ROUNDS - 1, APART = LAST_ROUND_MERGES ? LAST : PHILOX_ROUNDS;
  for (int round = 1; round < APART; ++round) {
    for (auto& counter : counters) philox_round(rounds.multipliers, rounds.keys[round], counter);
  }
  // Parts: the first and the second pair of words of one batch, then of the other.
  Words batches[PARTS / 2][4];
  for (int i = 0; i < PARTS; i += 2) {
    if constexpr (LAST_ROUND_MERGES) {
      merging_round(rounds.multipliers, rounds.keys[LAST], counters[i], counters[i + 1],
                    batches[i / 2]);
    } else {
      for (int j = 0; j < 4; ++j) batches[i / 2][j] = merged(counters[i][j], counters[i + 1][j]);
    }
  }
  const FloatParts radii = FASTDDIM_EACH(Floats, floats_of(batches[i / 2][i % 2 * 2]));
  const FloatParts angles = FASTDDIM_EACH(Floats, floats_of(batches[i / 2][i % 2 * 2 + 1]));
  FloatParts cosines, sines;
  box_muller(radii, angles, cosines, sines);
  for (int i = 0; i < PARTS; i += 2) {
    Floats ordered[4];
    order_quads(cosines.part[i], sines.part[i], cosines.part[i + 1], sines.part[i + 1], ordered);
    for (int j = 0; j < 4; ++j) sink(at + (2 * i + j) * LANES, ordered[j]);
  }
}

// The order that order_quads undoes.
FASTDDIM_FN int64_t quad_of_lane(int lane) { return lane % 4 * (LANES / 4) + lane / 4; }

// Normals from `first_quad` on, given to `sink(i, z)` a vector at a time: elements i … i + LANES −
// 1, in whole batches up to `count` or beyond it.
template <class Sink>
FASTDDIM_FN void for_normals(const Key& key, uint32_t first_quad, int64_t count, Sink sink) {
  int64_t products_of_lanes[PARTS][LANES / 2];
  for (int part = 0; part < PARTS; ++part) {
    for (int i = 0; i < LANES / 2; ++i) {
      products_of_lanes[part][i] =
          PHILOX_MULTIPLIER_0 * (part / 2 * LANES + quad_of_lane(2 * i + part % 2));
    }
  }
  const Rounds rounds(key);
  for (int64_t i = 0; i < count; i += BATCH) {
    const uint64_t product = PHILOX_MULTIPLIER_0 * (uint64_t)(first_quad + i / 4);
    Words products[PARTS];
    for (int part = 0; part < PARTS; ++part)
      products[part] = sums(products_of_lanes[part], product);
    normals_of_batches(rounds, products, i, sink);
  }
}

// Normals from `first_quad` on; `out` holds `count` rounded up to whole batches.
FASTDDIM_FN void normals(const Key& key, uint32_t first_quad, int64_t count, float* out) {
  const auto keep = [&](int64_t i, Floats z) __attribute__((always_inline)) { store(out + i, z); };
  for_normals(key, first_quad, count, keep);
}

#else

constexpr int64_t BATCH = 4;

FASTDDIM_FN void normals(const Key& key, uint32_t first_quad, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 4) {
    float z[4];
    normals_of_quad(key, first_quad + (uint32_t)(i / 4), z);
    for (int k = 0; k < 4; ++k) out[i + k] = z[k];
  }
}

#endif

FASTDDIM_FN Key key_of(const Job& job, int64_t sample) {
  return {(uint64_t)job.seed[sample], (uint32_t)job.step[sample], (uint32_t)job.sample[sample],
          job.stream};
}

// Noise keyed plane by plane, into elements counted pixel by pixel.
FASTDDIM_FN void draw_channels(const Job& job, const Span& span, const Key& key, float* buffer) {
  alignas(64) float plane[TILE + BATCH];
  const int64_t channels = job.channels, pixels = job.count / channels;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t begin = (span.first - c + channels - 1) / channels;
    const int64_t end = (span.first + span.count - c + channels - 1) / channels;
    const int64_t element = c * pixels + begin, lead = element % 4;
    normals(key, (uint32_t)(element / 4), lead + end - begin, plane);
    float* to = buffer + begin * channels + c - span.first;
    for (int64_t i = 0; i < end - begin; ++i) to[i * channels] = plane[lead + i];
  }
}

FASTDDIM_FN const float* draw(const Job& job, const Span& span, float* buffer) {
  const Key key = key_of(job, span.sample);
  if (job.channels) {
    draw_channels(job, span, key, buffer);
  } else {
    normals(key, (uint32_t)(span.first / 4), span.count, buffer);
  }
  return buffer;
}

FASTDDIM_FN const double* draw(const Job& job, const Span& span, double* buffer) {
  alignas(64) float narrow[TILE];
  draw(job, span, narrow);
  for (int64_t i = 0; i < span.count; ++i) buffer[i] = narrow[i];
  return buffer;
}
