// The formulas: one functor per rule, called by the CPU loop and by the CUDA kernel. A rule knows no addresses and not
// how a value is stored; its fields are the scalars of one step (scalars.h), in the order of a row of the plan.
// kSquares has a bit for each state that is a second moment: formats of few bits keep its root.
#pragma once

#include "rules/decays.h"
#include "rules/hyper.h"
#include "rules/dual_maps.h"

namespace precond {
inline namespace PRECOND_ISA {

// Stochastic gradient descent.
template <class Decay>
struct SGD {
  using Hyper = SGDHyper;
  static constexpr int kStates = 0, kSquares = 0;
  float lr;
  Decay decay;

  PRECOND_INLINE void operator()(float& p, float g) const { p = decay(p, lr, decay.gradient(p, g), 1.0f, 1.0f); }
};

// Polyak 1964, momentum as torch.optim.SGD defines it. The buffer starts at zero; one_minus_dampening is 1 on a
// parameter's first step.
template <class Decay>
struct SGDMomentum {
  using Hyper = SGDHyper;
  static constexpr int kStates = 1, kSquares = 0;
  float lr, momentum, one_minus_dampening;
  Decay decay;

  // Returns the decayed gradient.
  PRECOND_INLINE float update_buffer(float p, float g, float& buf) const {
    const float d = decay.gradient(p, g);
    buf = fma(momentum, buf, one_minus_dampening * d);
    return d;
  }
  PRECOND_INLINE void operator()(float& p, float g, float& buf) const {
    update_buffer(p, g, buf);
    p = decay(p, lr, buf, 1.0f, 1.0f);
  }
};

// Nesterov momentum (Sutskever et al. 2013) as torch.optim.SGD defines it.
template <class Decay>
struct SGDNesterov : SGDMomentum<Decay> {
  PRECOND_INLINE void operator()(float& p, float g, float& buf) const {
    const float d = this->update_buffer(p, g, buf);
    p = this->decay(p, this->lr, fma(this->momentum, buf, d), 1.0f, 1.0f);
  }
};

// Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; with an intrinsic L2 Loshchilov and Hutter 2019, arXiv 1711.05101,
// algorithm 2.
template <class Decay>
struct Adam {
  using Hyper = AdamHyper;
  static constexpr int kStates = 2, kSquares = 0b10;
  float one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias2, eps, step_size;
  Decay decay;

  PRECOND_INLINE void update_moments(float p, float g, float& m, float& v) const {
    const float d = decay.gradient(p, g);
    m = fma(one_minus_beta1, d - m, m);
    v = fma(one_minus_beta2 * d, d, beta2 * v);
  }
  PRECOND_INLINE float stepped(float p, float m, float v) const {
    const float den = fma(sqrt(v), inv_sqrt_bias2, eps);
    return decay(p, step_size, m / den, den, v);
  }
  PRECOND_INLINE void operator()(float& p, float g, float& m, float& v) const {
    update_moments(p, g, m, v);
    p = stepped(p, m, v);
  }
};

// Reddi et al. 2018, arXiv 1904.09237: den from the largest v so far.
template <class Decay>
struct AdamAmsgrad : Adam<Decay> {
  static constexpr int kStates = 3, kSquares = 0b110;

  PRECOND_INLINE void operator()(float& p, float g, float& m, float& v, float& v_max) const {
    this->update_moments(p, g, m, v);
    v_max = maximum(v_max, v);
    p = this->stepped(p, m, v_max);
  }
};

// Duchi, Hazan and Singer 2011, JMLR 12, the diagonal case. lr already has its decay over the steps.
template <class Decay>
struct Adagrad {
  using Hyper = AdagradHyper;
  static constexpr int kStates = 1, kSquares = 0b1;
  float lr, eps;
  Decay decay;

  PRECOND_INLINE void operator()(float& p, float g, float& s) const {
    const float d = decay.gradient(p, g);
    s = fma(d, d, s);
    const float den = sqrt(s) + eps;
    p = decay(p, lr, d / den, den, s);
  }
};

// Tieleman and Hinton 2012, lecture 6.5, as torch.optim.RMSprop defines it: no bias correction, eps outside the root.
template <class Decay>
struct RMSprop {
  using Hyper = RMSpropHyper;
  static constexpr int kStates = 1, kSquares = 0b1;
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
  PRECOND_INLINE void operator()(float& p, float g, float& v) const {
    const float d = decay.gradient(p, g);
    update_square(d, v);
    const float den_v = den(v);
    p = decay(p, lr, d / den_v, den_v, v);
  }
};

template <class Decay>
struct RMSpropCentered : RMSprop<Decay> {
  static constexpr int kStates = 2;
  PRECOND_INLINE void operator()(float& p, float g, float& v, float& mean) const {
    const float d = this->decay.gradient(p, g);
    this->update_square(d, v);
    const float den = this->centered_den(d, v, mean);
    p = this->decay(p, this->lr, d / den, den, v);
  }
};

template <class Decay>
struct RMSpropMomentum : RMSprop<Decay> {
  static constexpr int kStates = 2;
  PRECOND_INLINE void operator()(float& p, float g, float& v, float& buf) const {
    const float d = this->decay.gradient(p, g);
    this->update_square(d, v);
    const float den = this->den(v);
    buf = fma(this->momentum, buf, d / den);
    p = this->decay(p, this->lr, buf, den, v);
  }
};

template <class Decay>
struct RMSpropCenteredMomentum : RMSprop<Decay> {
  static constexpr int kStates = 3;
  PRECOND_INLINE void operator()(float& p, float g, float& v, float& buf, float& mean) const {
    const float d = this->decay.gradient(p, g);
    this->update_square(d, v);
    const float den = this->centered_den(d, v, mean);
    buf = fma(this->momentum, buf, d / den);
    p = this->decay(p, this->lr, buf, den, v);
  }
};

// Chen et al. 2023, arXiv 2302.06675, algorithm 2: the sign of an interpolated momentum.
template <class Decay>
struct Lion {
  using Hyper = LionHyper;
  static constexpr int kStates = 1, kSquares = 0;
  float lr, one_minus_beta1, one_minus_beta2;
  Decay decay;

  PRECOND_INLINE void operator()(float& p, float g, float& m) const {
    const float d = decay.gradient(p, g);
    const float c = fma(one_minus_beta1, d - m, m);
    m = fma(one_minus_beta2, d - m, m);
    p = decay(p, lr, sign(c), 1.0f, 1.0f);
  }
};

// An average of gradients, and a point between it and the last one: 1 - momentum from it, or none.
struct Averaging {
  float one_minus_momentum, lookahead;
  PRECOND_INLINE float operator()(float g, float& m) const {
    m = fma(one_minus_momentum, g - m, m);
    return fma(lookahead, g - m, m);
  }
};

// Maddison et al., arXiv 1902.02257: the gradient of a convex function, per entry. Kernels: dual_maps.h.
template <class Kernel, class Decay>
struct Dual {
  using Hyper = DualHyper;
  static constexpr int kStates = 0, kSquares = 0;
  float lr;
  Kernel kernel;
  Decay decay;

  PRECOND_INLINE void operator()(float& p, float g) const { p = decay(p, lr, kernel(g), 1.0f, 1.0f); }
};

template <class Kernel, class Decay>
struct DualMomentum {
  using Hyper = DualHyper;
  static constexpr int kStates = 1, kSquares = 0;
  float lr;
  Averaging average;
  Kernel kernel;
  Decay decay;

  PRECOND_INLINE void operator()(float& p, float g, float& m) const {
    p = decay(p, lr, kernel(average(g, m)), 1.0f, 1.0f);
  }
};

// What a later pass maps as a whole: p is overwritten with it.
struct Average {
  using Hyper = AverageHyper;
  static constexpr int kStates = 1, kSquares = 0;
  Averaging average;

  PRECOND_INLINE void operator()(float& p, float g, float& m) const { p = average(g, m); }
};

// Liu et al., arXiv 2510.13680: a mean of gradients over a curvature, or over its root. kOwn: the curvature is a mean
// of squared gradients. Sophia (arXiv 2306.14342) is the first with a clip of 1.
template <class Decay, bool kRoot, bool kOwn>
struct GaussNewton {
  using Hyper = GaussNewtonHyper;
  static constexpr int kStates = 2, kSquares = 0b10;
  float one_minus_beta1, beta2, one_minus_beta2, scale, eps, clip, step_size;
  Decay decay;

  PRECOND_INLINE void operator()(float& p, float g, float& m, float& h) const {
    m = fma(one_minus_beta1, g - m, m);
    if (kOwn) h = fma(one_minus_beta2 * g, g, beta2 * h);
    const float damped = fma(scale, h < 0.0f ? 0.0f : h, eps);
    const float den = kRoot ? sqrt(damped) : damped;
    p = decay(p, step_size, clamped(m / den, clip), den, h);
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

// The point where a two-gradient step takes the second one; the parameter waits in a state (METHODS A.2.3).
struct Perturb {
  using Hyper = PerturbHyper;
  static constexpr int kStates = 1, kSquares = 0;
  float radius;

  PRECOND_INLINE void operator()(float& p, float g, float& backup) const {
    backup = p;
    p = fma(radius, g, p);
  }
};

// The same along P P^T g = g / (sqrt(scale v) + eps). A coordinate that never had a gradient (v == 0) stays: eps alone
// would divide its first one.
struct PerturbAdaptive {
  using Hyper = PerturbHyper;
  static constexpr int kStates = 2, kSquares = 0b10;
  float radius, root_scale, eps;

  PRECOND_INLINE void operator()(float& p, float g, float& backup, float& v) const {
    backup = p;
    const float moved = fma(radius, g / fma(sqrt(v), root_scale, eps), p);
    p = v > 0.0f ? moved : p;
  }
};

// A rule with each intrinsic decay: name + "", "_l1", "_l1_subgradient" + suffix.
#define PRECOND_INTRINSIC(RULE, name, suffix, Template, Threshold) \
  RULE(name suffix, Template<L2>)                                  \
  RULE(name "_l1" suffix, Template<L1Proximal<Threshold>>)         \
  RULE(name "_l1_subgradient" suffix, Template<L1Subgradient<Threshold>>)

// A kernel without a momentum and with one.
#define PRECOND_DUAL(RULE, name, Kernel) \
  RULE(name, Dual<Kernel, L2>)           \
  RULE(name "_momentum", DualMomentum<Kernel, L2>)

// Every rule and its name. The position is the rule's number in a plan.
#if defined(PRECOND_FEW_RULES)
// For sanitizers, which look at where operands lie: that depends on the number of states alone, and all kernels,
// instrumented, take minutes to compile.
#define PRECOND_ALL_RULES(RULE)                         \
  RULE("sgd", SGD<Coupled>)                             \
  RULE("sgd_momentum", SGDMomentum<Coupled>)            \
  RULE("adamw", Adam<L2>)                               \
  RULE("adamw_l1", Adam<L1Proximal<AdaptiveThreshold>>) \
  RULE("adamw_amsgrad", AdamAmsgrad<L2>)
#else
#define PRECOND_ALL_RULES(RULE)                                                                         \
  RULE("sgd", SGD<Coupled>)                                                                             \
  RULE("sgd_momentum", SGDMomentum<Coupled>)                                                            \
  RULE("sgd_nesterov", SGDNesterov<Coupled>)                                                            \
  PRECOND_INTRINSIC(RULE, "sgdw", "", SGD, PlainThreshold)                                              \
  PRECOND_INTRINSIC(RULE, "sgdw", "_momentum", SGDMomentum, PlainThreshold)                             \
  PRECOND_INTRINSIC(RULE, "sgdw", "_nesterov", SGDNesterov, PlainThreshold)                             \
  RULE("adam", Adam<Coupled>)                                                                           \
  RULE("adam_amsgrad", AdamAmsgrad<Coupled>)                                                            \
  PRECOND_INTRINSIC(RULE, "adamw", "", Adam, AdaptiveThreshold)                                         \
  PRECOND_INTRINSIC(RULE, "adamw", "_amsgrad", AdamAmsgrad, AdaptiveThreshold)                          \
  RULE("adagrad", Adagrad<Coupled>)                                                                     \
  PRECOND_INTRINSIC(RULE, "adagradw", "", Adagrad, AdaptiveThreshold)                                   \
  RULE("rmsprop", RMSprop<Coupled>)                                                                     \
  RULE("rmsprop_centered", RMSpropCentered<Coupled>)                                                    \
  RULE("rmsprop_momentum", RMSpropMomentum<Coupled>)                                                    \
  RULE("rmsprop_centered_momentum", RMSpropCenteredMomentum<Coupled>)                                   \
  PRECOND_INTRINSIC(RULE, "rmspropw", "", RMSprop, AdaptiveThreshold)                                   \
  PRECOND_INTRINSIC(RULE, "rmspropw", "_centered", RMSpropCentered, AdaptiveThreshold)                  \
  PRECOND_INTRINSIC(RULE, "rmspropw", "_momentum", RMSpropMomentum, AdaptiveThreshold)                  \
  PRECOND_INTRINSIC(RULE, "rmspropw", "_centered_momentum", RMSpropCenteredMomentum, AdaptiveThreshold) \
  PRECOND_INTRINSIC(RULE, "lion", "", Lion, PlainThreshold)                                             \
  PRECOND_DUAL(RULE, "dual_ratio", RatioKernel)                                                         \
  PRECOND_DUAL(RULE, "dual_smoothed", SmoothedKernel)                                                   \
  PRECOND_DUAL(RULE, "dual_clip", ClipKernel)                                                           \
  PRECOND_DUAL(RULE, "dual_asinh", AsinhKernel)                                                         \
  PRECOND_DUAL(RULE, "dual_log", LogKernel)                                                             \
  PRECOND_DUAL(RULE, "dual_power", PowerKernel)                                                         \
  RULE("average", Average)                                                                              \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "", GaussNewtonInverse, AdaptiveThreshold)                    \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "_root", GaussNewtonRoot, AdaptiveThreshold)                  \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "_own", GaussNewtonOwn, AdaptiveThreshold)                    \
  PRECOND_INTRINSIC(RULE, "gauss_newton", "_own_root", GaussNewtonOwnRoot, AdaptiveThreshold)           \
  RULE("perturb", Perturb)                                                                              \
  RULE("perturb_adaptive", PerturbAdaptive)
#endif

constexpr int kMaxStates = 3;
constexpr int kRowFloats = 16;
constexpr int kMaxHyper = 10;

}  // namespace PRECOND_ISA
}  // namespace precond
