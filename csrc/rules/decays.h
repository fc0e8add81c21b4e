// Decays: a penalty on p or on z in p = P z, brought back to p (Ye, arXiv 2410.00232). A decay has two parts:
// `gradient` returns what the moments see, and the call takes the old p and a rule's step and returns the new p.
// `taken` returns what that takes from p before the new p is rounded. `leave_out` makes it none, unless it is in the
// gradient.
#pragma once

#include "base/arithmetic.h"

namespace precond {
inline namespace PRECOND_ISA {

// What a rule takes from p, which is rate times direction; and for a threshold den = 1 / P^2 and the statistic v behind
// it.
struct Step {
  float rate, direction, den = 1.0f, v = 1.0f;
};

// A penalty |p|^2 / 2 on p itself, added to the gradient: torch's weight_decay of Adam, SGD, Adagrad and RMSprop.
// Without one the gradient has nothing of p, not 0 times an infinite p.
struct Coupled {
  float weight_decay;
  PRECOND_INLINE float gradient(float p, float g) const { return weight_decay != 0.0f ? fma(weight_decay, p, g) : g; }
  PRECOND_INLINE float taken(float, Step step) const { return step.rate * step.direction; }
  PRECOND_INLINE void leave_out() {}
  PRECOND_INLINE float operator()(float p, Step step) const { return fma(-step.rate, step.direction, p); }
};

// Penalties on z leave the gradient alone.
struct Intrinsic {
  float lr_wd;
  PRECOND_INLINE float gradient(float, float g) const { return g; }
  PRECOND_INLINE void leave_out() { lr_wd = 0.0f; }
  // What the L2 decay and a step take from p. An infinite p stays what it is, as where torch multiplies it: inf - inf
  // is NaN.
  PRECOND_INLINE float with_l2(float p, float step) const { return fma(lr_wd, is_finite(p) ? p : 0.0f, step); }
};

// R(z) = |z|^2 / 2: p - lr wd p - step, which is AdamW's decay. Subtracted, not multiplied: 1 - lr wd rounded to fp32
// is 19 % too strong at lr wd = 1e-7 and absent at 2e-8.
struct L2 : Intrinsic {
  PRECOND_INLINE float taken(float p, Step step) const { return with_l2(p, step.rate * step.direction); }
  PRECOND_INLINE float operator()(float p, Step step) const { return p - taken(p, step); }
};

// lr min(l1 / sqrt(den), cap). A coordinate that never saw a gradient (v == 0) has no threshold: den = eps would
// otherwise zero it at once.
struct AdaptiveThreshold {
  float lr_l1, lr_l1_cap;
  PRECOND_INLINE float operator()(float den, float v) const {
    float t = lr_l1 / sqrt(den);
    t = t > lr_l1_cap ? lr_l1_cap : t;
    return v > 0.0f ? t : 0.0f;
  }
};

// The same where den = 1.
struct PlainThreshold {
  float lr_l1;
  PRECOND_INLINE float operator()(float, float) const { return lr_l1; }
};

// R(z) = l1 |z|_1 as a proximal step: exact zeros.
template <class Threshold>
struct L1Proximal : Intrinsic {
  Threshold threshold;
  PRECOND_INLINE void leave_out() { lr_wd = threshold.lr_l1 = 0.0f; }
  // What the threshold takes is what is left, where that is less.
  PRECOND_INLINE float taken(float p, Step step) const {
    const float smooth = with_l2(p, step.rate * step.direction), left = p - smooth;
    const float t = threshold(step.den, step.v);
    return smooth + (left > t ? t : (left < -t ? -t : left));
  }
  PRECOND_INLINE float operator()(float p, Step step) const {
    return soft_threshold(p - with_l2(p, step.rate * step.direction), threshold(step.den, step.v));
  }
};

// The same penalty as a subgradient step.
template <class Threshold>
struct L1Subgradient : Intrinsic {
  Threshold threshold;
  PRECOND_INLINE void leave_out() { lr_wd = threshold.lr_l1 = 0.0f; }
  PRECOND_INLINE float taken(float p, Step step) const {
    float t = threshold(step.den, step.v);
    t = p > 0.0f ? t : (p < 0.0f ? -t : 0.0f);
    return with_l2(p, step.rate * step.direction + t);
  }
  PRECOND_INLINE float operator()(float p, Step step) const { return p - taken(p, step); }
};

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

// A rule with each intrinsic decay: name + "", "_l1", "_l1_subgradient" + suffix.
#define PRECOND_INTRINSIC(RULE, name, suffix, Template, Threshold) \
  RULE(name suffix, Template<L2>)                                  \
  RULE(name "_l1" suffix, Template<L1Proximal<Threshold>>)         \
  RULE(name "_l1_subgradient" suffix, Template<L1Subgradient<Threshold>>)

}  // namespace PRECOND_ISA
}  // namespace precond
