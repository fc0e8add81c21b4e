// NAdam, for NAdam and NAdamW.
#pragma once

#include "base/series.h"
#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct NAdamHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps, q;  // q = 0.96^momentum_decay
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps", "q"};

  PRECOND_INLINE double momentum(uint64_t step) const { return beta1 * (1.0 - 0.5 * integer_power(q, step)); }
};

// Dozat 2016, as torch.optim.NAdam defines it. The scalar state is the product of the momenta of all steps.
template <class Decay>
struct NAdam {
  using Hyper = NAdamHyper;
  static constexpr int kStates = 2, kSquares = 0b10, kScalarStates = 1;
  static constexpr bool kReadsStep = true;
  float one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias2, eps, lr, of_gradient, of_moment;
  Decay decay;

  // The momentum is rounded first, so that the product has the bits of torch's, a float32 tensor times a number.
  PRECOND_INLINE static double advance(const NAdamHyper& h, double step, double product) {
    return product * double(float(h.momentum(uint64_t(step))));
  }
  PRECOND_INLINE Step operator()(float p, float g, float& m, float& v) const {
    const float d = decay.gradient(p, g);
    m = fma(one_minus_beta1, d - m, m);
    v = fma(one_minus_beta2 * d, d, beta2 * v);
    const float den = fma(sqrt(v), inv_sqrt_bias2, eps);
    return {lr, fma(of_moment, m, of_gradient * d) / den, den, v};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(NAdam<Decay>& rule, const NAdamHyper& h, Carried now) {
  const uint64_t t = uint64_t(now.step);
  const double next = h.momentum(t + 1);
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.beta2 = float(h.beta2);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  rule.inv_sqrt_bias2 = float(1.0 / ::sqrt(1.0 - integer_power(h.beta2, t)));
  rule.eps = float(h.eps);
  rule.lr = float(h.lr);
  rule.of_gradient = float((1.0 - h.momentum(t)) / (1.0 - now.scalar));
  rule.of_moment = float(next / (1.0 - now.scalar * next));
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_nadam(RULE) \
  RULE("nadam", NAdam<Coupled>)   \
  PRECOND_INTRINSIC(RULE, "nadamw", "", NAdam, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
