// Adam and AMSGrad, for Adam and AdamW, and rotated for SOAP.
#pragma once

#include "base/series.h"
#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct AdamHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"};
};

// Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; with an intrinsic L2 Loshchilov and Hutter 2019, arXiv 1711.05101,
// algorithm 2.
template <class Decay>
struct Adam {
  using Hyper = AdamHyper;
  static constexpr int kStates = 2, kSquares = 0b10, kScalarStates = 0;
  static constexpr bool kReadsStep = true;
  float one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias2, eps, step_size;
  Decay decay;

  PRECOND_INLINE void update_moments(float p, float g, float& m, float& v) const {
    const float d = decay.gradient(p, g);
    m = fma(one_minus_beta1, d - m, m);
    v = fma(one_minus_beta2 * d, d, beta2 * v);
  }
  template <class Arithmetic = Ieee>
  PRECOND_INLINE Step step(float m, float v) const {
    const float den = fma(Arithmetic::root(v), inv_sqrt_bias2, eps);
    return {step_size, Arithmetic::quotient(m, den), den, v};
  }
  PRECOND_INLINE Step operator()(float p, float g, float& m, float& v) const {
    update_moments(p, g, m, v);
    return step(m, v);
  }
};

// Reddi et al. 2018, arXiv 1904.09237: den from the largest v so far.
template <class Decay>
struct AdamAmsgrad : Adam<Decay> {
  static constexpr int kStates = 3, kSquares = 0b110;

  PRECOND_INLINE Step operator()(float p, float g, float& m, float& v, float& v_max) const {
    this->update_moments(p, g, m, v);
    v_max = maximum(v_max, v);
    return this->step(m, v_max);
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(Adam<Decay>& rule, const AdamHyper& h, Counted now) {
  const uint64_t t = uint64_t(now.step);
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.beta2 = float(h.beta2);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  rule.inv_sqrt_bias2 = float(1.0 / ::sqrt(1.0 - integer_power(h.beta2, t)));
  rule.eps = float(h.eps);
  rule.step_size = float(h.lr / (1.0 - integer_power(h.beta1, t)));
  set_scalars(rule.decay, h, h.lr);
}

template <>
constexpr bool kOften<Adam<Coupled>> = true;
template <>
constexpr bool kOften<Adam<L2>> = true;

#define PRECOND_RULES_adam(RULE)                                \
  RULE("adam", Adam<Coupled>)                                   \
  RULE("adam_amsgrad", AdamAmsgrad<Coupled>)                    \
  PRECOND_INTRINSIC(RULE, "adamw", "", Adam, AdaptiveThreshold) \
  PRECOND_INTRINSIC(RULE, "adamw", "_amsgrad", AdamAmsgrad, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
