// RMSprop, plain or centered, with or without momentum, for RMSprop and RMSpropW.
#pragma once

#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct RMSpropHyper {
  double lr, weight_decay, l1_decay, l1_cap, alpha, eps, momentum;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "alpha", "eps", "momentum"};
};

// Tieleman and Hinton 2012, lecture 6.5, as torch.optim.RMSprop defines it: no bias correction, eps outside the root.
template <class Decay>
struct RMSprop {
  using Hyper = RMSpropHyper;
  static constexpr int kStates = 1, kSquares = 0b1, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr, alpha, one_minus_alpha, eps, momentum;
  Decay decay;

  PRECOND_INLINE void update_square(float d, float& v) const { v = fma(one_minus_alpha * d, d, alpha * v); }
  PRECOND_INLINE float den(float v) const { return sqrt(v) + eps; }
  // Graves 2013, arXiv 1308.0850, equation 39: the variance in place of the second moment. Rounding can make it
  // negative, where torch's step is NaN: with some constant gradients, after about 1200 steps.
  PRECOND_INLINE float centered_den(float d, float v, float& mean) const {
    mean = fma(one_minus_alpha, d - mean, mean);
    const float variance = fma(-mean, mean, v);
    return den(variance < 0.0f ? 0.0f : variance);
  }
  PRECOND_INLINE Step operator()(float p, float g, float& v) const {
    const float d = decay.gradient(p, g);
    update_square(d, v);
    const float den_v = den(v);
    return {lr, d / den_v, den_v, v};
  }
};

template <class Decay>
struct RMSpropCentered : RMSprop<Decay> {
  static constexpr int kStates = 2;
  PRECOND_INLINE Step operator()(float p, float g, float& v, float& mean) const {
    const float d = this->decay.gradient(p, g);
    this->update_square(d, v);
    const float den = this->centered_den(d, v, mean);
    return {this->lr, d / den, den, v};
  }
};

template <class Decay>
struct RMSpropMomentum : RMSprop<Decay> {
  static constexpr int kStates = 2;
  PRECOND_INLINE Step operator()(float p, float g, float& v, float& buf) const {
    const float d = this->decay.gradient(p, g);
    this->update_square(d, v);
    const float den = this->den(v);
    buf = fma(this->momentum, buf, d / den);
    return {this->lr, buf, den, v};
  }
};

template <class Decay>
struct RMSpropCenteredMomentum : RMSprop<Decay> {
  static constexpr int kStates = 3;
  PRECOND_INLINE Step operator()(float p, float g, float& v, float& buf, float& mean) const {
    const float d = this->decay.gradient(p, g);
    this->update_square(d, v);
    const float den = this->centered_den(d, v, mean);
    buf = fma(this->momentum, buf, d / den);
    return {this->lr, buf, den, v};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(RMSprop<Decay>& rule, const RMSpropHyper& h, Now) {
  rule.lr = float(h.lr);
  rule.alpha = float(h.alpha);
  rule.one_minus_alpha = float(1.0 - h.alpha);
  rule.eps = float(h.eps);
  rule.momentum = float(h.momentum);
  set_scalars(rule.decay, h, h.lr);
}

#define PRECOND_RULES_rmsprop(RULE)                                                    \
  RULE("rmsprop", RMSprop<Coupled>)                                                    \
  RULE("rmsprop_centered", RMSpropCentered<Coupled>)                                   \
  RULE("rmsprop_momentum", RMSpropMomentum<Coupled>)                                   \
  RULE("rmsprop_centered_momentum", RMSpropCenteredMomentum<Coupled>)                  \
  PRECOND_INTRINSIC(RULE, "rmspropw", "", RMSprop, AdaptiveThreshold)                  \
  PRECOND_INTRINSIC(RULE, "rmspropw", "_centered", RMSpropCentered, AdaptiveThreshold) \
  PRECOND_INTRINSIC(RULE, "rmspropw", "_momentum", RMSpropMomentum, AdaptiveThreshold) \
  PRECOND_INTRINSIC(RULE, "rmspropw", "_centered_momentum", RMSpropCenteredMomentum, AdaptiveThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
