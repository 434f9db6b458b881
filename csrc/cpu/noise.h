// Noise of a tile, in the order elements are counted. Included inside the namespace of an
// instruction set.

#if FASTDDIM_LANES > 1

FASTDDIM_FN void philox_round(const Words (&multipliers)[2], Words key_0, Words key_1,
                              Words (&counter)[4]) {
  Words product_0 = product(multipliers[0], counter[0]);
  Words product_1 = product(multipliers[1], counter[2]);
  counter[0] = mixed(product_1, counter[1], key_0);
  counter[1] = product_1;
  counter[2] = mixed(product_0, counter[3], key_1);
  counter[3] = product_0;
}

// The keys of all rounds, in every lane.
struct RoundKeys {
  Words keys[PHILOX_ROUNDS][2];
  FASTDDIM_FN explicit RoundKeys(uint64_t seed) {
    uint32_t k_0 = (uint32_t)seed, k_1 = (uint32_t)(seed >> 32);
    for (auto& key : keys) {
      key[0] = words(k_0);
      key[1] = words(k_1);
      k_0 += PHILOX_WEYL_0;
      k_1 += PHILOX_WEYL_1;
    }
  }
};

// Two batches of LANES quads: 8·LANES normals, given to `sink(i, z)` from element `at` on. A batch
// is two halves of the words' lanes.
constexpr int64_t BATCH = 8 * LANES;

template <class Sink>
FASTDDIM_FN void normals_of_batches(const Key& key, const RoundKeys& rounds,
                                    const Words (&multipliers)[2], const Words (&quads)[PARTS],
                                    int64_t at, Sink sink) {
  Words counters[PARTS][4];
  for (int i = 0; i < PARTS; ++i) {
    counters[i][0] = quads[i];
    counters[i][1] = words(key.step);
    counters[i][2] = words(key.sample);
    counters[i][3] = words(key.stream);
  }
  for (const auto& round : rounds.keys) {
    for (auto& counter : counters) philox_round(multipliers, round[0], round[1], counter);
  }
  // Parts: the first and the second pair of words of one batch, then of the other.
  const FloatParts radii = FASTDDIM_EACH(
      Floats, merged(counters[i / 2 * 2][i % 2 * 2], counters[i / 2 * 2 + 1][i % 2 * 2]));
  const FloatParts angles = FASTDDIM_EACH(
      Floats, merged(counters[i / 2 * 2][i % 2 * 2 + 1], counters[i / 2 * 2 + 1][i % 2 * 2 + 1]));
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
  int64_t lanes[PARTS][LANES / 2];
  for (int part = 0; part < PARTS; ++part) {
    for (int i = 0; i < LANES / 2; ++i) {
      lanes[part][i] = part / 2 * LANES + quad_of_lane(2 * i + part % 2);
    }
  }
  const Words multipliers[2] = {words(PHILOX_MULTIPLIER_0), words(PHILOX_MULTIPLIER_1)};
  const RoundKeys rounds(key.seed);
  for (int64_t i = 0; i < count; i += BATCH) {
    const Words first = words(first_quad + (uint32_t)(i / 4));
    Words quads[PARTS];
    for (int part = 0; part < PARTS; ++part) quads[part] = plus(words(lanes[part]), first);
    normals_of_batches(key, rounds, multipliers, quads, i, sink);
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
