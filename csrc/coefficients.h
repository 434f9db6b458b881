// The coefficients of a step of plain numbers: `coefficient_row` of fastddim/plan/rows.py,
// operation by operation, for the same bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

namespace fastddim {

// In the order of PREDICTIONS in fastddim/choices.py.
enum class Prediction : int { epsilon, sample, v_prediction, score };

// The arguments of a step of the same names, each within its own range.
struct StepNumbers {
  double alpha_t, alpha_prev, eta, temperature;
  double clip = std::numeric_limits<double>::infinity();
  double guidance_scale = 1;
  Prediction prediction;
  bool large, rederive_eps;

  bool noisy() const { return eta > 0; }
};

// The fields of a row in the order of `Row`. False for a step that is refused, also where a
// difference is further below 0 than rounding alone takes it: Python then names the argument.
inline bool coefficients(const StepNumbers& step, double (&row)[12]) {
  constexpr double ROUNDING = 1e-14;
  const double a = step.alpha_t, p = step.alpha_prev;
  const bool of_sample = step.prediction == Prediction::sample;
  const bool of_score = step.prediction == Prediction::score;
  if (a == 0 && (step.prediction == Prediction::epsilon || of_score)) return false;
  if (a == 1 && (step.noisy() || step.rederive_eps || of_sample || of_score)) return false;

  double direction = std::sqrt(1 - p), noise = 0;
  if (step.noisy()) {
    const double larger = std::max(1 - a / (p == 0 ? 1 : p), 0.0);
    const double small = (1 - p) / (1 - a) * larger;
    const double square = 1 - p - step.eta * step.eta * small;
    if (p < a || !(square >= -ROUNDING)) return false;
    direction = std::sqrt(std::max(square, 0.0));
    noise = step.eta * std::sqrt(step.large ? larger * (p < 1 ? 1.0 : 0.0) : small);
  }

  const double signal = std::sqrt(a), sigma = std::sqrt(1 - a);
  double cx, cm, e0 = 0, ex, em;
  switch (step.prediction) {
    case Prediction::epsilon:
      cx = 1 / signal, cm = -sigma / signal, ex = 0, em = 1;
      break;
    case Prediction::sample:
      cx = 0, cm = 1, ex = 1 / sigma, em = -signal / sigma;
      break;
    case Prediction::score:
      cx = 1 / signal, cm = sigma * sigma / signal, ex = 0, em = -sigma;
      break;
    default:
      cx = signal, cm = -sigma, ex = sigma, em = signal;
  }
  if (step.rederive_eps) e0 = -signal / sigma, ex = 1 / sigma, em = 0;
  // Without history: the sum of no weights, and its negative.
  const double pe = direction + 0.0, ph = -0.0;
  const double fields[] = {cx,
                           cm,
                           step.clip,
                           std::sqrt(p) + pe * e0,
                           pe * ex,
                           pe * em,
                           noise * step.temperature,
                           step.guidance_scale,
                           ph,
                           e0,
                           ex,
                           em};
  std::copy(std::begin(fields), std::end(fields), row);
  return true;
}

}  // namespace fastddim
