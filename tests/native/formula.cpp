// What csrc/formula.h and csrc/scalar.h rest on, for every input that occurs.

#include "../../csrc/formula.h"

#include <cmath>
#include <cstdio>

namespace {

using namespace fastddim_default;

constexpr float LN[] = {-0x1.fffffap-2f, 0x1.5556f6p-2f, -0x1.0004cap-2f, 0x1.98d22cp-3f,
                        -0x1.53522ap-3f, 0x1.3174c8p-3f, -0x1.25183ap-3f, 0x1.6607fep-4f};

// As fastddim/philox.py has it.
float plain_ln(float u) {
  const int32_t word = bits(u), exponent = (word - 0x3F3504F3) >> 23;
  const float f = from_bits(word - (exponent << 23)) - 1.0f;
  return fma((float)exponent, 0x1.62e430p-1f, fma(f * f, polynomial(LN, f), f));
}

void sine_and_cosine(float u, float& sine, float& cosine) {
  constexpr float odd[] = {-0x1.a32bd0p-23f, -0x1.4abbbap+5f, 0x1.465eeap+6f, -0x1.2da156p+6f};
  constexpr float even[] = {1.0f, -0x1.3bd3ccp+4f, 0x1.03c1aep+6f, -0x1.55b146p+6f, 0x1.d47d48p+5f};
  const int quarter = (int)fma(u, 4.0f, 0.5f);
  const float r = fma((float)quarter, -0.25f, u), square = r * r;
  const float s = fma(r, 0x1.921fb6p+2f, r * polynomial(odd, square)), c = polynomial(even, square);
  const float sines[] = {s, c, -s, -c}, cosines[] = {c, -s, -c, s};
  sine = sines[quarter % 4], cosine = cosines[quarter % 4];
}

// Floats that words of 32 bits round to.
template <class Check>
void for_words(Check check) {
  for (uint32_t i = 0; i < 1u << 24; ++i) check((float)i);
  for (int shift = 1; shift <= 8; ++shift) {
    for (uint32_t i = 1u << 23; i <= 1u << 24; ++i) check(std::ldexp((float)i, shift));
  }
}

long wrong_formulas() {
  long wrong = 0;
  for_words([&](float word) {
    const float u = uniform(word);
    wrong += bits(ln(u)) != bits(plain_ln(u));
    float sine, cosine, right_sine, right_cosine;
    const int32_t sign = sincos_2pi(u, sine, cosine);
    sine_and_cosine(u, right_sine, right_cosine);
    wrong += (bits(sine) ^ sign) != bits(right_sine) || (bits(cosine) ^ sign) != bits(right_cosine);
  });
  return wrong;
}

// Pairs of a number and an approximation of the reciprocal of its root, as close as NVIDIA promises
// of rsqrt.approx.ftz.f32, from which one step gives another number than the root. All significands
// with both parities of the exponent stand for all numbers.
long wrong_roots(long& tried) {
  const double error = std::exp2(-22.9);
  long wrong = 0;
  for (int32_t word = bits(1.0f); word < bits(4.0f); ++word) {
    const float a = from_bits(word), right = std::sqrt(a);
    const double exact = 1 / std::sqrt((double)a);
    for (int32_t near = -4; near <= 4; ++near) {
      const float reciprocal = from_bits(bits((float)exact) + near);
      if (std::fabs(reciprocal / exact - 1) > error) continue;
      const float approximate = a * reciprocal;
      ++tried;
      wrong += fma(fma(-approximate, approximate, a), 0.5f * reciprocal, approximate) != right;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  long tried = 0;
  const long formulas = wrong_formulas(), roots = wrong_roots(tried);
  std::printf("%ld %ld %ld\n", formulas, tried, roots);
}
