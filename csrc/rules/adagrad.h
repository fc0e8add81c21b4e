// Adagrad, for Adagrad and AdagradW.
#pragma once

#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct AdagradHyper {
  double lr, weight_decay, l1_decay, l1_cap, lr_decay, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "lr_decay", "eps"};
};

// Duchi, Hazan and Singer 2011, JMLR 12, the diagonal case. lr already has its decay over the steps.
template <class Decay>
struct Adagrad {
  using Hyper = AdagradHyper;
  static constexpr int kStates = 1, kSquares = 0b1, kScalarStates = 0;
  static constexpr bool kReadsStep = true;
  float lr, eps;
  Decay decay;

  PRECOND_INLINE Step operator()(float p, float g, float& s) const {
    const float d = decay.gradient(p, g);
    s = fma(d, d, s);
    const float den = sqrt(s) + eps;
    return {lr, d / den, den, s};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(Adagrad<Decay>& rule, const AdagradHyper& h, Counted now) {
  const double lr = h.lr / (1.0 + (now.step - 1.0) * h.lr_decay);
  rule.lr = float(lr);
  rule.eps = float(h.eps);
  set_scalars(rule.decay, h, lr);
}

#define PRECOND_RULES_adagrad(RULE) \
  RULE("adagrad", Adagrad<Coupled>) \
  PRECOND_INTRINSIC(RULE, "adagradw", "", Adagrad, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
