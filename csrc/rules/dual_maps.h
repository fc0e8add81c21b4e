// Maps of dual space preconditioning: h'(|x|) sign(x) of an entry x, for a convex h. Odd; 0 stays 0,
// inf and NaN stay what h' makes of them.
#pragma once

#include "base/series.h"

namespace precond {
inline namespace PRECOND_ISA {

// x / (offset + slope |x|): the identity (1, 0), the sign (0, 1), Adam without its means (eps, 1), x / (1 + |x| / c).
struct RatioMap {
  float offset, slope;
  PRECOND_INLINE float operator()(float x) const {
    const float quotient = x / fma(slope, magnitude_of(x), offset);
    return x == 0.0f ? x : quotient;
  }
};

// x / sqrt(x^2 + c^2); beyond 2^60 the root is |x|, whose square would overflow.
struct SmoothedMap {
  float scale_squared;
  PRECOND_INLINE float operator()(float x) const {
    const float r = magnitude_of(x);
    return x / (r > 0x1p60f ? r : sqrt(fma(x, x, scale_squared)));
  }
};

struct ClipMap {
  float scale;
  PRECOND_INLINE float operator()(float x) const { return clamped(x, scale); }
};

// c asinh(x / c) = c log1p(r + r^2 / (1 + sqrt(1 + r^2))) with r = |x| / c.
struct AsinhMap {
  float scale;
  PRECOND_INLINE float operator()(float x) const {
    const float r = magnitude_of(x) / scale;
    const float root = r > 0x1p30f ? r : sqrt(fma(r, r, 1.0f));
    return with_sign_of(scale * log1p_of(fma(r, r / (1.0f + root), r)), x);
  }
};

struct LogMap {
  float scale;
  PRECOND_INLINE float operator()(float x) const { return with_sign_of(scale * log1p_of(magnitude_of(x) / scale), x); }
};

// c (|x| / c)^exponent.
struct PowerMap {
  float scale, exponent;
  PRECOND_INLINE float operator()(float x) const {
    return with_sign_of(scale * power_of(magnitude_of(x) / scale, exponent), x);
  }
};

}  // namespace PRECOND_ISA
}  // namespace precond
