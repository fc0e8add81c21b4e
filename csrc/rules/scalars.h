// What depends on the step but not on the element: from the hyper-parameters of a group and a parameter's step counter
// to the fields of a rule, in fp64, with operations that give the same bits everywhere. Host and device.
#pragma once

#include <cmath>

#include "rules/rules.h"

namespace precond {
inline namespace PRECOND_ISA {

// base^n by repeated squaring; pow() differs between libraries.
PRECOND_INLINE double integer_power(double base, uint64_t n) {
  double result = 1.0;
  while (n != 0) {
    if (n & 1) result *= base;
    base *= base;
    n >>= 1;
  }
  return result;
}

// `lr` is the step's, which Adagrad makes smaller with every step; its decays shrink with it.
template <class Hyper>
PRECOND_INLINE void set_scalars(Coupled& decay, const Hyper& h, double) {
  decay.weight_decay = float(h.weight_decay);
}
template <class Hyper>
PRECOND_INLINE void set_scalars(L2& decay, const Hyper& h, double lr) {
  decay.lr_wd = float(lr * h.weight_decay);
}
template <class Hyper>
PRECOND_INLINE void set_scalars(PlainThreshold& threshold, const Hyper& h, double lr) {
  threshold.lr_l1 = float(lr * h.l1_decay);
}
template <class Hyper>
PRECOND_INLINE void set_scalars(AdaptiveThreshold& threshold, const Hyper& h, double lr) {
  threshold.lr_l1 = float(lr * h.l1_decay);
  threshold.lr_l1_cap = float(lr * h.l1_cap);
}
template <class L1, class Hyper>
PRECOND_INLINE void set_scalars(L1& decay, const Hyper& h, double lr) {
  decay.lr_wd = float(lr * h.weight_decay);
  set_scalars(decay.threshold, h, lr);
}

// `step` counts from 1; `fresh` is true on the step that created the parameter's state.
template <class Decay>
PRECOND_INLINE void set_scalars(SGD<Decay>& rule, const SGDHyper& h, double, bool) {
  rule.lr = float(h.lr);
  set_scalars(rule.decay, h, h.lr);
}
template <class Decay>
PRECOND_INLINE void set_scalars(SGDMomentum<Decay>& rule, const SGDHyper& h, double, bool fresh) {
  rule.lr = float(h.lr);
  rule.momentum = float(h.momentum);
  rule.one_minus_dampening = fresh ? 1.0f : float(1.0 - h.dampening);
  set_scalars(rule.decay, h, h.lr);
}
template <class Decay>
PRECOND_INLINE void set_scalars(Adam<Decay>& rule, const AdamHyper& h, double step, bool) {
  const uint64_t t = uint64_t(step);
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.beta2 = float(h.beta2);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  rule.inv_sqrt_bias2 = float(1.0 / ::sqrt(1.0 - integer_power(h.beta2, t)));
  rule.eps = float(h.eps);
  rule.step_size = float(h.lr / (1.0 - integer_power(h.beta1, t)));
  set_scalars(rule.decay, h, h.lr);
}
template <class Decay>
PRECOND_INLINE void set_scalars(Adagrad<Decay>& rule, const AdagradHyper& h, double step, bool) {
  const double lr = h.lr / (1.0 + (step - 1.0) * h.lr_decay);
  rule.lr = float(lr);
  rule.eps = float(h.eps);
  set_scalars(rule.decay, h, lr);
}
template <class Decay>
PRECOND_INLINE void set_scalars(RMSprop<Decay>& rule, const RMSpropHyper& h, double, bool) {
  rule.lr = float(h.lr);
  rule.alpha = float(h.alpha);
  rule.one_minus_alpha = float(1.0 - h.alpha);
  rule.eps = float(h.eps);
  rule.momentum = float(h.momentum);
  set_scalars(rule.decay, h, h.lr);
}

template <class Decay>
PRECOND_INLINE void set_scalars(Lion<Decay>& rule, const LionHyper& h, double, bool) {
  rule.lr = float(h.lr);
  rule.one_minus_beta1 = float(1.0 - h.beta1);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  set_scalars(rule.decay, h, h.lr);
}

PRECOND_INLINE void set_kernel(RatioKernel& kernel, const DualHyper& h) {
  kernel.offset = float(h.offset);
  kernel.slope = float(h.slope);
}
PRECOND_INLINE void set_kernel(SmoothedKernel& kernel, const DualHyper& h) {
  kernel.scale_squared = float(h.scale * h.scale);
}
PRECOND_INLINE void set_kernel(PowerKernel& kernel, const DualHyper& h) {
  kernel.scale = float(h.scale);
  kernel.exponent = float(h.exponent);
}
template <class Kernel>
PRECOND_INLINE void set_kernel(Kernel& kernel, const DualHyper& h) {
  kernel.scale = float(h.scale);
}
template <class Hyper>
PRECOND_INLINE void set_average(Averaging& average, const Hyper& h) {
  average.one_minus_momentum = float(1.0 - h.momentum);
  average.lookahead = float(h.lookahead);
}
template <class Kernel, class Decay>
PRECOND_INLINE void set_scalars(Dual<Kernel, Decay>& rule, const DualHyper& h, double, bool) {
  rule.lr = float(h.lr);
  set_kernel(rule.kernel, h);
  set_scalars(rule.decay, h, h.lr);
}
template <class Kernel, class Decay>
PRECOND_INLINE void set_scalars(DualMomentum<Kernel, Decay>& rule, const DualHyper& h, double, bool) {
  rule.lr = float(h.lr);
  set_average(rule.average, h);
  set_kernel(rule.kernel, h);
  set_scalars(rule.decay, h, h.lr);
}
PRECOND_INLINE void set_scalars(Average& rule, const AverageHyper& h, double, bool) { set_average(rule.average, h); }

// Where the mean of gradients is corrected for its start at 0, so is what bounds it; the curvature only where the rule
// makes it.
template <class Decay, bool kRoot, bool kOwn>
PRECOND_INLINE void set_scalars(GaussNewton<Decay, kRoot, kOwn>& rule, const GaussNewtonHyper& h, double step, bool) {
  const uint64_t t = uint64_t(step);
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
PRECOND_INLINE void set_scalars(Perturb& rule, const PerturbHyper& h, double, bool) { rule.radius = float(h.radius); }
PRECOND_INLINE void set_scalars(PerturbAdaptive& rule, const PerturbHyper& h, double, bool) {
  rule.radius = float(h.radius);
  rule.root_scale = float(::sqrt(h.scale));
  rule.eps = float(h.eps);
}

// Fills a row of the plan.
template <class Rule>
PRECOND_INLINE void fill_row(const double* hyper, double step, bool fresh, float* row) {
  static_assert(sizeof(Rule) <= (kRowFloats - 2) * sizeof(float), "a rule must fit into a row, before a seed");
  static_assert(Rule::kStates <= kMaxStates, "raise kMaxStates");
  typename Rule::Hyper h;
  std::memcpy(&h, hyper, sizeof h);
  Rule rule;
  set_scalars(rule, h, step, fresh);
  std::memcpy(row, &rule, sizeof rule);
}

}  // namespace PRECOND_ISA
}  // namespace precond
