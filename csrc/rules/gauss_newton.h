// A mean of gradients over a diagonal curvature, for GaussNewton and Sophia.
#pragma once

#include "base/series.h"
#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct GaussNewtonHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps, scale, clip, corrected;
  static constexpr const char* names[] = {"lr",    "weight_decay", "l1_decay", "l1_cap", "beta1",
                                          "beta2", "eps",          "scale",    "clip",   "corrected"};
};

// Liu et al., arXiv 2510.13680: a mean of gradients over a curvature, or over its root. kOwn: the curvature is a mean
// of squared gradients. Sophia (arXiv 2305.14342) is the first with a clip of 1.
template <class Decay, bool kRoot, bool kOwn>
struct GaussNewton {
  using Hyper = GaussNewtonHyper;
  static constexpr int kStates = 2, kSquares = 0b10, kScalarStates = 0;
  static constexpr bool kReadsStep = true;
  float one_minus_beta1, beta2, one_minus_beta2, scale, eps, clip, step_size;
  Decay decay;

  PRECOND_INLINE Step operator()(float, float g, float& m, float& h) const {
    m = fma(one_minus_beta1, g - m, m);
    if (kOwn) h = fma(one_minus_beta2 * g, g, beta2 * h);
    const float damped = fma(scale, h < 0.0f ? 0.0f : h, eps);
    const float den = kRoot ? sqrt(damped) : damped;
    return {step_size, clamped(m / den, clip), den, h};
  }
};
template <class Decay>
struct GaussNewtonInverse : GaussNewton<Decay, false, false> {};
template <class Decay>
struct GaussNewtonRoot : GaussNewton<Decay, true, false> {};
template <class Decay>
struct GaussNewtonOwn : GaussNewton<Decay, false, true> {};
template <class Decay>
struct GaussNewtonOwnRoot : GaussNewton<Decay, true, true> {};

// Where the mean of gradients is corrected for its start at 0, so is what bounds it; the curvature only where the rule
// makes it.
template <class Decay, bool kRoot, bool kOwn>
PRECOND_INLINE void set_scalars(GaussNewton<Decay, kRoot, kOwn>& rule, const GaussNewtonHyper& h, Counted now) {
  const uint64_t t = uint64_t(now.step);
  const double bias1 = h.corrected != 0.0 ? 1.0 - integer_power(h.beta1, t) : 1.0;
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.beta2 = float(h.beta2);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  rule.scale = float(kOwn ? h.scale / (1.0 - integer_power(h.beta2, t)) : h.scale);
  rule.eps = float(h.eps);
  rule.clip = float(h.clip * bias1);
  rule.step_size = float(h.lr / bias1);
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_gauss_newton(RULE)                                               \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "", GaussNewtonInverse, AdaptiveThreshold)   \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "_root", GaussNewtonRoot, AdaptiveThreshold) \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "_own", GaussNewtonOwn, AdaptiveThreshold)   \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "_own_root", GaussNewtonOwnRoot, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
