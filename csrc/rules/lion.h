// Lion.
#pragma once

#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct LionHyper {
  double lr, weight_decay, l1_decay, beta1, beta2;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "beta1", "beta2"};
};

// Chen et al. 2023, arXiv 2302.06675, algorithm 2: the sign of an interpolated momentum.
template <class Decay>
struct Lion {
  using Hyper = LionHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr, one_minus_beta1, one_minus_beta2;
  Decay decay;

  PRECOND_INLINE Step operator()(float p, float g, float& m) const {
    const float d = decay.gradient(p, g);
    const float c = fma(one_minus_beta1, d - m, m);
    m = fma(one_minus_beta2, d - m, m);
    return {lr, sign(c)};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(Lion<Decay>& rule, const LionHyper& h, Now) {
  rule.lr = float(h.lr);
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  set_scalars(rule.decay, h, h.lr);
}

template <>
constexpr bool kOften<Lion<L2>> = true;

#define PRECOND_RULES_lion(RULE) PRECOND_INTRINSIC(RULE, "lion", "", Lion, PlainThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
