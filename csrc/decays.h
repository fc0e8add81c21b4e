// Intrinsic decays: a penalty on z in p = P z, brought back to p (Ye, arXiv 2410.00232; METHODS A.2). A decay takes the
// old p, the step to subtract, den = 1 / P^2 and the statistic v behind it, and returns the new p.
#pragma once

#include "math.h"

namespace precond {
inline namespace PRECOND_ISA {

// R(z) = |z|^2 / 2: p - lr wd p - step, which is AdamW's decay. Subtracted, not multiplied: 1 - lr wd rounded to fp32
// is 19 % too strong at lr wd = 1e-7 and absent at 2e-8.
struct L2 {
  float lr_wd;
  PRECOND_INLINE float operator()(float p, float step, float, float) const { return p - fma(lr_wd, p, step); }
};

// lr min(l1 / sqrt(den), cap). A coordinate that never saw a gradient (v == 0) has no threshold: den = eps would
// otherwise zero it at once.
struct L1Threshold {
  float lr_l1, lr_l1_cap;
  PRECOND_INLINE float operator()(float den, float v) const {
    float t = lr_l1 / sqrt(den);
    t = t > lr_l1_cap ? lr_l1_cap : t;
    return v > 0.0f ? t : 0.0f;
  }
};

// R(z) = l1 |z|_1 as a proximal step: exact zeros.
struct L1Proximal {
  float lr_wd;
  L1Threshold threshold;
  PRECOND_INLINE float operator()(float p, float step, float den, float v) const {
    return soft_threshold(p - fma(lr_wd, p, step), threshold(den, v));
  }
};

// The same penalty as a subgradient step.
struct L1Subgradient {
  float lr_wd;
  L1Threshold threshold;
  PRECOND_INLINE float operator()(float p, float step, float den, float v) const {
    float t = threshold(den, v);
    t = p > 0.0f ? t : (p < 0.0f ? -t : 0.0f);
    return p - fma(lr_wd, p, step + t);
  }
};

}  // namespace PRECOND_ISA
}  // namespace precond
