// Noise of a tile, in the order elements are counted. Included inside the namespace of an instruction set.

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

// One batch of LANES quads: 4·LANES normals.
FASTDDIM_FN void normals_of_batch(const Key& key, const Words (&multipliers)[2], Words quads_even,
                                  Words quads_odd, float* out) {
  Words even[4] = {quads_even, words(key.step), words(key.sample), words(STEP_NOISE)};
  Words odd[4] = {quads_odd, even[1], even[2], even[3]};
  uint32_t k_0 = (uint32_t)key.seed, k_1 = (uint32_t)(key.seed >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    philox_round(multipliers, words(k_0), words(k_1), even);
    philox_round(multipliers, words(k_0), words(k_1), odd);
    k_0 += PHILOX_WEYL[0];
    k_1 += PHILOX_WEYL[1];
  }
  Floats z[4];
  box_muller(merged(even[0], odd[0]), merged(even[1], odd[1]), z[0], z[1]);
  box_muller(merged(even[2], odd[2]), merged(even[3], odd[3]), z[2], z[3]);
  store_quads(out, z[0], z[1], z[2], z[3]);
}

// The order that store_quads undoes.
FASTDDIM_FN int64_t quad_of_lane(int lane) { return lane % 4 * (LANES / 4) + lane / 4; }

// Normals from `first_quad` on; whole batches, so `out` holds `count` rounded up to 4·LANES.
FASTDDIM_FN void normals(const Key& key, uint32_t first_quad, int64_t count, float* out) {
  int64_t even[LANES / 2], odd[LANES / 2];
  for (int i = 0; i < LANES / 2; ++i) {
    even[i] = quad_of_lane(2 * i);
    odd[i] = quad_of_lane(2 * i + 1);
  }
  const Words multipliers[2] = {words(PHILOX_MULTIPLIERS[0]), words(PHILOX_MULTIPLIERS[1])};
  for (int64_t i = 0; i < count; i += 4 * LANES) {
    const Words quad = words(first_quad + (uint32_t)(i / 4));
    normals_of_batch(key, multipliers, plus(words(even), quad), plus(words(odd), quad), out + i);
  }
}

#else

FASTDDIM_FN void normals(const Key& key, uint32_t first_quad, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 4) {
    float z[4];
    normals_of_quad(key, first_quad + (uint32_t)(i / 4), z);
    for (int k = 0; k < 4; ++k) out[i + k] = z[k];
  }
}

#endif

FASTDDIM_FN Key key_of(const Job& job, int64_t sample) {
  return {(uint64_t)job.seed[sample], (uint32_t)job.step[sample], (uint32_t)job.sample[sample]};
}

FASTDDIM_FN const float* draw(const Job& job, const Span& span, float* buffer) {
  normals(key_of(job, span.sample), (uint32_t)(span.first / 4), span.count, buffer);
  return buffer;
}

FASTDDIM_FN const double* draw(const Job& job, const Span& span, double* buffer) {
  alignas(64) float narrow[TILE];
  draw(job, span, narrow);
  for (int64_t i = 0; i < span.count; ++i) buffer[i] = narrow[i];
  return buffer;
}
