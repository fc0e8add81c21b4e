// RAdam, for RAdam and RAdamW.
#pragma once

#include "base/series.h"
#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct RAdamHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"};
};

// Liu et al. 2020, arXiv 1908.03265, algorithm 2, as torch.optim.RAdam defines it: until v is a mean of enough squares,
// den = 1.
template <class Decay>
struct RAdam {
  using Hyper = RAdamHyper;
  static constexpr int kStates = 2, kSquares = 0b10, kScalarStates = 0;
  static constexpr bool kReadsStep = true;
  float one_minus_beta1, beta2, one_minus_beta2, of_root, of_one, step_size;
  Decay decay;

  PRECOND_INLINE Step operator()(float p, float g, float& m, float& v) const {
    const float d = decay.gradient(p, g);
    m = fma(one_minus_beta1, d - m, m);
    v = fma(one_minus_beta2 * d, d, beta2 * v);
    // Not by a factor 0 of the root: v may be infinite.
    const float den = of_root > 0.0f ? fma(sqrt(v), of_root, of_one) : 1.0f;
    return {step_size, m / den, den, v};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(RAdam<Decay>& rule, const RAdamHyper& h, Counted now) {
  const uint64_t t = uint64_t(now.step);
  const double power = integer_power(h.beta2, t), bias2 = 1.0 - power;
  double longest = 2.0 / (1.0 - h.beta2) - 1.0, length = longest - 2.0 * now.step * power / bias2;
  const bool rectified = length > 5.0;
  longest = rectified ? longest : 6.0;
  length = rectified ? length : 6.0;
  const double variance = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length);
  const double of_root = 1.0 / ::sqrt(variance * bias2);
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.beta2 = float(h.beta2);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  rule.of_root = rectified ? float(of_root) : 0.0f;
  rule.of_one = float(h.eps * of_root);
  rule.step_size = float(h.lr / (1.0 - integer_power(h.beta1, t)));
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_radam(RULE) \
  RULE("radam", RAdam<Coupled>)   \
  PRECOND_INTRINSIC(RULE, "radamw", "", RAdam, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
