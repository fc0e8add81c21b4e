// Logarithm and powers, since those of libraries differ in their last bits.
#pragma once

#include "base/arithmetic.h"

namespace precond {
inline namespace PRECOND_ISA {

// log(m) = 2 atanh(s) with s = (m - 1) / (m + 1), for m in [sqrt(1/2), sqrt(2)), where |s| < 0.1716: the series ends
// with an error of 2e-9.
PRECOND_INLINE float log_of_mantissa(float m) {
  const float f = m - 1.0f, s = f / (2.0f + f), z = s * s;
  const float series = z * fma(z, fma(z, fma(z, 1.0f / 9.0f, 1.0f / 7.0f), 1.0f / 5.0f), 1.0f / 3.0f);
  return fma(s + s, series, s + s);
}

// x = m 2^k for a normal x > 0, m in [sqrt(1/2), sqrt(2)).
PRECOND_INLINE float split_exponent(float x, float* k) {
  const uint32_t bits = bits_of(x), above = bits - 0x3f3504f3u;  // the bits of sqrt(1/2)
  const int32_t exponent = int32_t(above) >> 23;
  *k = float(exponent);
  return float_of(bits - (uint32_t(exponent) << 23));
}

// log(1 + x) for x >= 0: what rounding takes from 1 + x is put back.
PRECOND_INLINE float log1p_of(float x) {
  const float u = 1.0f + x;
  float k;
  const float m = split_exponent(u, &k);
  const float lost = (x - (u - 1.0f)) / u;
  const float result = fma(k, 0x1.62e430p-1f, log_of_mantissa(m) + lost);
  return x <= 0x1.fffffep127f ? result : x;
}

// The nearest integer, to even, for |x| < 2^22.
PRECOND_INLINE float nearest_integer(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// r^exponent for r >= 0 and 0 < exponent <= 16. The whole part of exponent log2(r) is split off before it is rounded.
PRECOND_INLINE float power_of(float r, float exponent) {
  const bool tiny = r < 0x1p-126f;
  float k;
  const float m = split_exponent(tiny ? r * 0x1p24f : r, &k);
  k = tiny ? k - 24.0f : k;
  const float whole = nearest_integer(exponent * k);
  const float y = fma(exponent, log_of_mantissa(m) * 0x1.715476p0f, fma(exponent, k, -whole));
  const float rounded = nearest_integer(y);
  const float x = (y - rounded) * 0x1.62e430p-1f;
  // e^x for |x| < 0.3466; the series ends with an error of 6e-9.
  float series = fma(x, 1.0f / 5040.0f, 1.0f / 720.0f);
  series = fma(x, series, 1.0f / 120.0f);
  series = fma(x, series, 1.0f / 24.0f);
  series = fma(x, series, 1.0f / 6.0f);
  series = fma(x, series, 0.5f);
  series = fma(x, series, 1.0f);
  series = fma(x, series, 1.0f);
  // By two powers of 2, since one alone may be out of range where the result is not.
  float scale = whole + rounded;
  scale = scale > 250.0f ? 250.0f : scale;
  scale = scale < -250.0f ? -250.0f : scale;
  const int32_t all = int32_t(scale), half = all >> 1;
  const float result = series * float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(all - half + 127) << 23);
  return r > 0.0f && r <= 0x1.fffffep127f ? result : r;
}

// base^n by repeated squaring.
PRECOND_INLINE double integer_power(double base, uint64_t n) {
  double result = 1.0;
  while (n != 0) {
    if (n & 1) result *= base;
    base *= base;
    n >>= 1;
  }
  return result;
}

}  // namespace PRECOND_ISA
}  // namespace precond
