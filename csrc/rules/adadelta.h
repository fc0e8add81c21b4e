// Adadelta, for Adadelta and AdadeltaW.
#pragma once

#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct AdadeltaHyper {
  double lr, weight_decay, l1_decay, l1_cap, rho, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "rho", "eps"};
};

// Zeiler 2012, arXiv 1212.5701, algorithm 1. acc is the mean of u^2 before this step.
template <class Decay>
struct Adadelta {
  using Hyper = AdadeltaHyper;
  static constexpr int kStates = 2, kSquares = 0b11, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr, rho, one_minus_rho, eps;
  Decay decay;

  PRECOND_INLINE Step operator()(float p, float g, float& v, float& acc) const {
    const float d = decay.gradient(p, g);
    v = fma(one_minus_rho * d, d, rho * v);
    // One root, not one above and one below. The quotient is a normal number for |d| below 1e16.
    const float inv_den = sqrt((acc + eps) / (v + eps));
    const float u = inv_den * d;
    acc = fma(one_minus_rho * u, u, rho * acc);
    // Only a threshold asks for den: the other decays compile without this division.
    return {lr, u, 1.0f / inv_den, v};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(Adadelta<Decay>& rule, const AdadeltaHyper& h, Now) {
  rule.lr = float(h.lr);
  rule.rho = float(h.rho);
  rule.one_minus_rho = float(1.0 - h.rho);
  rule.eps = float(h.eps);
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_adadelta(RULE)  \
  RULE("adadelta", Adadelta<Coupled>) \
  PRECOND_INTRINSIC(RULE, "adadeltaw", "", Adadelta, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
