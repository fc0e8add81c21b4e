// Adamax, for Adamax and AdamaxW.
#pragma once

#include <type_traits>

#include "base/series.h"
#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct AdamaxHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"};
};

// Kingma and Ba 2015, arXiv 1412.6980, algorithm 2. u is the largest |d|, decayed. It has no square, but divides like
// one's root: in codes with a sign, small ones would be rounded to 0, and a step be 1e4 times too long.
template <class Decay>
struct Adamax {
  using Hyper = AdamaxHyper;
  static constexpr int kStates = 2, kSquares = 0b10, kScalarStates = 0;
  static constexpr bool kReadsStep = true;
  // torch keeps eps in u. Beside it where L1 asks u whether there ever was a gradient: formats of few bits round eps.
  static constexpr bool kEpsInside = std::is_same_v<Decay, Coupled>;
  float one_minus_beta1, beta2, eps, step_size;
  Decay decay;

  PRECOND_INLINE Step operator()(float p, float g, float& m, float& u) const {
    const float d = decay.gradient(p, g);
    m = fma(one_minus_beta1, d - m, m);
    u = maximum(beta2 * u, kEpsInside ? magnitude_of(d) + eps : magnitude_of(d));
    const float den = kEpsInside ? u : u + eps;
    return {step_size, m / den, den, u};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(Adamax<Decay>& rule, const AdamaxHyper& h, Counted now) {
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.beta2 = float(h.beta2);
  rule.eps = float(h.eps);
  rule.step_size = float(h.lr / (1.0 - integer_power(h.beta1, uint64_t(now.step))));
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_adamax(RULE) \
  RULE("adamax", Adamax<Coupled>)  \
  PRECOND_INTRINSIC(RULE, "adamaxw", "", Adamax, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
