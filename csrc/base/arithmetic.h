// fp32 arithmetic of the rules, spelled so that every backend gives the same bits. Included by host and device code.
#pragma once

#include <cstdint>
#include <cstring>

// Each instruction set compiles the rules in a namespace of its own: two weak copies of one symbol would let the
// linker keep the AVX-512 body for the baseline path.
#ifndef PRECOND_ISA
#define PRECOND_ISA portable
#endif

#if defined(__CUDACC__)
#define PRECOND_INLINE __host__ __device__ __forceinline__
#else
#define PRECOND_INLINE inline __attribute__((always_inline))
#endif

namespace precond {
inline namespace PRECOND_ISA {

#if defined(__CUDA_ARCH__)
PRECOND_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#if defined(PRECOND_APPROXIMATE)
PRECOND_INLINE float sqrt(float x) { return ::sqrtf(x); }
#else
PRECOND_INLINE float sqrt(float x) { return __fsqrt_rn(x); }
#endif
#else
PRECOND_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PRECOND_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
#endif

// Comparisons and selects, never fmin or fmax: languages disagree about those on NaN. Here a NaN on either side wins,
// as in torch.maximum.
PRECOND_INLINE float maximum(float a, float b) { return (a > b || a != a) ? a : b; }

// x - clamp(x, -t, t) for t >= 0: sign(x) max(|x| - t, 0), exactly 0 inside, and a NaN stays a NaN.
PRECOND_INLINE float soft_threshold(float x, float t) {
  float inside = x > t ? t : x;
  inside = inside < -t ? -t : inside;
  return x - inside;
}

// 1 or -1; 0, -0 and NaN stay what they are.
PRECOND_INLINE float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }

// g between -limit and limit; a NaN stays a NaN, and an infinite limit changes no bit.
PRECOND_INLINE float clamped(float g, float limit) {
  const float below = g > limit ? limit : g;
  return below < -limit ? -limit : below;
}

// What a rule sees of a stored gradient: unscaled, clipped, its sign turned where the objective is maximised.
struct Incoming {
  float coef, clip_value;
  PRECOND_INLINE float operator()(float g) const { return clamped(coef * g, clip_value); }
};

PRECOND_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
PRECOND_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

PRECOND_INLINE float magnitude_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// r >= 0 with the sign of x.
PRECOND_INLINE float with_sign_of(float r, float x) { return float_of(bits_of(r) | (bits_of(x) & 0x80000000u)); }

// Logarithm and power, since those of libraries differ in their last bits. log(m) = 2 atanh(s) with s = (m - 1) / (m +
// 1), for m in [sqrt(1/2), sqrt(2)), where |s| < 0.1716: the series ends with an error of 2e-9.
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

}  // namespace PRECOND_ISA
}  // namespace precond
