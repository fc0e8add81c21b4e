// SGD, with momentum or Nesterov's, for SGD and SGDW.
#pragma once

#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct SGDHyper {
  double lr, weight_decay, l1_decay, momentum, dampening;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "momentum", "dampening"};
};

// Stochastic gradient descent.
template <class Decay>
struct SGD {
  using Hyper = SGDHyper;
  static constexpr int kStates = 0, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr;
  Decay decay;

  PRECOND_INLINE Step operator()(float p, float g) const { return {lr, decay.gradient(p, g)}; }
};

// Polyak 1964, momentum as torch.optim.SGD defines it. The buffer starts at zero; one_minus_dampening is 1 on a
// parameter's first step.
template <class Decay>
struct SGDMomentum {
  using Hyper = SGDHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr, momentum, one_minus_dampening;
  Decay decay;

  // Returns the decayed gradient.
  PRECOND_INLINE float update_buffer(float p, float g, float& buf) const {
    const float d = decay.gradient(p, g);
    buf = fma(momentum, buf, one_minus_dampening * d);
    return d;
  }
  PRECOND_INLINE Step operator()(float p, float g, float& buf) const {
    update_buffer(p, g, buf);
    return {lr, buf};
  }
};

// Nesterov momentum (Sutskever et al. 2013) as torch.optim.SGD defines it.
template <class Decay>
struct SGDNesterov : SGDMomentum<Decay> {
  PRECOND_INLINE Step operator()(float p, float g, float& buf) const {
    const float d = this->update_buffer(p, g, buf);
    return {this->lr, fma(this->momentum, buf, d)};
  }
};

template <class Decay>
PRECOND_INLINE void set_scalars(SGD<Decay>& rule, const SGDHyper& h, Now) {
  rule.lr = float(h.lr);
  set_scalars(rule.decay, h, h.lr);
}
template <class Decay>
PRECOND_INLINE void set_scalars(SGDMomentum<Decay>& rule, const SGDHyper& h, Now now) {
  rule.lr = float(h.lr);
  rule.momentum = float(h.momentum);
  rule.one_minus_dampening = now.fresh ? 1.0f : float(1.0 - h.dampening);
  set_scalars(rule.decay, h, h.lr);
}

template <>
constexpr bool kOften<SGDMomentum<Coupled>> = true;
template <>
constexpr bool kOften<SGDMomentum<L2>> = true;
template <>
constexpr bool kOftenMixed<SGD<L2>> = true;

#define PRECOND_RULES_sgd(RULE)                                             \
  RULE("sgd", SGD<Coupled>)                                                 \
  RULE("sgd_momentum", SGDMomentum<Coupled>)                                \
  RULE("sgd_nesterov", SGDNesterov<Coupled>)                                \
  PRECOND_INTRINSIC(RULE, "sgdw", "", SGD, PlainThreshold)                  \
  PRECOND_INTRINSIC(RULE, "sgdw", "_momentum", SGDMomentum, PlainThreshold) \
  PRECOND_INTRINSIC(RULE, "sgdw", "_nesterov", SGDNesterov, PlainThreshold)

}  // namespace PRECOND_ISA
}  // namespace precond
