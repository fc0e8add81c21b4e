// A family for sanitized builds, which look at where operands lie: a rule of each number of states, since all of them,
// instrumented, take minutes to compile; and a rule with a scalar state.
#pragma once

#include "base/series.h"
#include "rules/adam.h"
#include "rules/sgd.h"

namespace precond {
inline namespace PRECOND_ISA {

struct CarryingHyper {
  double lr, weight_decay, momentum;
  static constexpr const char* names[] = {"lr", "weight_decay", "momentum"};
};

// Steps by a mean over what its weights sum to; what is missing from 1 is the scalar state, a product over all steps.
struct Carrying {
  using Hyper = CarryingHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 1;
  static constexpr bool kReadsStep = true;
  float lr, one_minus_weight, inverse;
  L2 decay;

  PRECOND_INLINE static double weight(const CarryingHyper& h, double step) {
    return h.momentum * (1.0 - 0.5 * integer_power(0.96, uint64_t(step)));
  }
  PRECOND_INLINE static double advance(const CarryingHyper& h, double step, double product) {
    return product * weight(h, step);
  }
  PRECOND_INLINE Step operator()(float, float g, float& m) const {
    m = fma(one_minus_weight, g - m, m);
    return {lr, m * inverse};
  }
};
PRECOND_INLINE void set_scalars(Carrying& rule, const CarryingHyper& h, Carried now) {
  rule.lr = float(h.lr);
  rule.one_minus_weight = float(1.0 - Carrying::weight(h, now.step));
  rule.inverse = float(1.0 / (1.0 - now.scalar));
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_few(RULE)                         \
  RULE("sgd", SGD<Coupled>)                             \
  RULE("sgd_momentum", SGDMomentum<Coupled>)            \
  RULE("adamw", Adam<L2>)                               \
  RULE("adamw_l1", Adam<L1Proximal<AdaptiveThreshold>>) \
  RULE("adamw_amsgrad", AdamAmsgrad<L2>)                \
  RULE("carrying", Carrying)

}  // namespace PRECOND_ISA
}  // namespace precond
