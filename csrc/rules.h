// The formulas: one functor per rule, called by the CPU loop and by the CUDA kernel. A rule knows no addresses and not
// how a value is stored; its fields are the scalars of one step (scalars.h), in the order of a row of the plan.
#pragma once

#include "decays.h"
#include "hyper.h"

namespace precond {
inline namespace PRECOND_ISA {

// Stochastic gradient descent with torch's coupled weight decay.
struct SGD {
  using Hyper = SGDHyper;
  static constexpr int kStates = 0;
  float lr, weight_decay;

  PRECOND_INLINE void operator()(float& p, float g) const {
    const float d = fma(weight_decay, p, g);
    p = fma(-lr, d, p);
  }
};

// Polyak 1964, momentum as torch.optim.SGD defines it. The buffer starts at zero; one_minus_dampening is 1 on a
// parameter's first step.
struct SGDMomentum {
  using Hyper = SGDHyper;
  static constexpr int kStates = 1;
  float lr, weight_decay, momentum, one_minus_dampening;

  // Returns the decayed gradient.
  PRECOND_INLINE float update_buffer(float p, float g, float& buf) const {
    const float d = fma(weight_decay, p, g);
    buf = fma(momentum, buf, one_minus_dampening * d);
    return d;
  }
  PRECOND_INLINE void operator()(float& p, float g, float& buf) const {
    update_buffer(p, g, buf);
    p = fma(-lr, buf, p);
  }
};

// Nesterov momentum (Sutskever et al. 2013) as torch.optim.SGD defines it.
struct SGDNesterov : SGDMomentum {
  PRECOND_INLINE void operator()(float& p, float g, float& buf) const {
    const float d = update_buffer(p, g, buf);
    p = fma(-lr, fma(momentum, buf, d), p);
  }
};

// Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, with the decay as a part of its own.
template <class Decay>
struct AdamW {
  using Hyper = AdamWHyper;
  static constexpr int kStates = 2;
  float one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias2, eps, step_size;
  Decay decay;

  PRECOND_INLINE void update_moments(float g, float& m, float& v) const {
    m = fma(one_minus_beta1, g - m, m);
    v = fma(one_minus_beta2 * g, g, beta2 * v);
  }
  PRECOND_INLINE float stepped(float p, float m, float v) const {
    const float den = fma(sqrt(v), inv_sqrt_bias2, eps);
    return decay(p, step_size * (m / den), den, v);
  }
  PRECOND_INLINE void operator()(float& p, float g, float& m, float& v) const {
    update_moments(g, m, v);
    p = stepped(p, m, v);
  }
};

// Reddi et al. 2018, arXiv 1904.09237: den from the largest v so far.
template <class Decay>
struct AdamWAmsgrad : AdamW<Decay> {
  static constexpr int kStates = 3;

  PRECOND_INLINE void operator()(float& p, float g, float& m, float& v, float& v_max) const {
    this->update_moments(g, m, v);
    v_max = maximum(v_max, v);
    p = this->stepped(p, m, v_max);
  }
};

// Every rule and its name. The position is the rule's number in a plan.
#define PRECOND_ALL_RULES(RULE)                      \
  RULE("sgd", SGD)                                   \
  RULE("sgd_momentum", SGDMomentum)                  \
  RULE("sgd_nesterov", SGDNesterov)                  \
  RULE("adamw", AdamW<L2>)                           \
  RULE("adamw_amsgrad", AdamWAmsgrad<L2>)            \
  RULE("adamw_l1", AdamW<L1Proximal>)                \
  RULE("adamw_l1_amsgrad", AdamWAmsgrad<L1Proximal>) \
  RULE("adamw_l1_subgradient", AdamW<L1Subgradient>) \
  RULE("adamw_l1_subgradient_amsgrad", AdamWAmsgrad<L1Subgradient>)

constexpr int kMaxStates = 3;
constexpr int kRowFloats = 16;
constexpr int kMaxHyper = 8;

}  // namespace PRECOND_ISA
}  // namespace precond
