// fp32 arithmetic of the rules, spelled so that every backend gives the same bits. Included by host and device code.
#pragma once

#include <cmath>
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

// What rules divide and take roots by, where a kernel may know better.
struct Ieee {
  PRECOND_INLINE static float quotient(float a, float b) { return a / b; }
  PRECOND_INLINE static float root(float v) { return sqrt(v); }
};

// A comparison of |x|, which GPUs take in one instruction; of masked bits it would be two.
#if defined(__CUDA_ARCH__)
PRECOND_INLINE bool is_within(float x, float limit) { return ::fabsf(x) < limit; }
#else
PRECOND_INLINE bool is_within(float x, float limit) { return __builtin_fabsf(x) < limit; }
#endif
PRECOND_INLINE bool is_finite(float x) { return is_within(x, HUGE_VALF); }

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

// g between -limit and limit; a NaN stays a NaN, and a limit that is infinite, or a NaN, changes no bit. Since sm_80
// there are min and max that keep a NaN: one instruction each, where a comparison and a select are two. They tell -0
// from 0, and give the same bits for every limit but -0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
PRECOND_INLINE float clamped(float g, float limit) {
  const float most = limit < HUGE_VALF ? limit : HUGE_VALF;  // the same for all elements: outside their loop
  float below, result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(below) : "f"(g), "f"(most));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(below), "f"(-most));
  return result;
}
#else
PRECOND_INLINE float clamped(float g, float limit) {
  const float below = g > limit ? limit : g;
  return below < -limit ? -limit : below;
}
#endif

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

// The number of a step, so that it can be made an integer: no counter comes to 2^62 by counting.
PRECOND_INLINE double countable(double step) {
  if (!(step < 0x1p62)) return 0x1p62;  // a NaN too
  return step > 0.0 ? step : 0.0;
}

PRECOND_INLINE float magnitude_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// r >= 0 with the sign of x.
PRECOND_INLINE float with_sign_of(float r, float x) { return float_of(bits_of(r) | (bits_of(x) & 0x80000000u)); }

}  // namespace PRECOND_ISA
}  // namespace precond
