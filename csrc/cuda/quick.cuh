// Quick forms of what a step does to ordinary numbers: the bits of IEEE arithmetic and of formats/, without the range
// checks and branches that nvcc puts into each division and root. Whoever uses them checks once for many elements that
// numbers are ordinary. On the host they are what they stand for.
#pragma once

#include "cuda/tensors.cuh"
#include "rules/decays.h"

namespace precond {
inline namespace PRECOND_ISA {

// The larger of a and |b|; a NaN on either side wins.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ float max_magnitude(float a, float b) {
  float r;
  asm("{.reg .f32 t; abs.f32 t, %2; max.NaN.f32 %0, %1, t;}" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
#else
__device__ __forceinline__ float max_magnitude(float a, float b) { return maximum(a, magnitude_of(b)); }
#endif
#if defined(__CUDA_ARCH__)
// Bytes of a and b by the nibbles of `selector`. Not __byte_perm, which drops the bit that replicates a sign.
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
#else
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t nibble = selector >> 4 * k & 15u, byte = uint32_t(both >> 8 * (nibble & 7u)) & 0xffu;
    r |= (nibble < 8 ? byte : byte >> 7 != 0 ? 0xffu : 0u) << 8 * k;
  }
  return r;
}
#endif
// min(a + b, least), an instruction of sm_90.
__device__ __forceinline__ uint32_t least_sum(uint32_t a, uint32_t b, uint32_t least) {
#if defined(__CUDA_ARCH__) && __CUDACC_VER_MAJOR__ >= 12
  return __viaddmin_u32(a, b, least);
#else
  return a + b < least ? a + b : least;
#endif
}

__device__ __forceinline__ float magnitude(float x) { return ::fabsf(x); }  // a modifier of what uses it
// So that a select for an infinite number is left out.
__device__ __forceinline__ void assume_finite([[maybe_unused]] float x) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(is_finite(x));
#endif
}
// The NaN that formats store, for any NaN: on a GPU arithmetic makes 0x7fffffff.
__device__ __forceinline__ float with_one_nan(float x) { return x != x ? float_of(0x7fc00000u) : x; }

// The upper halves of two words; the upper and the second bytes of four.
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) { return permuted(a, b, 0x7632); }
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) { return permuted(a, b, 0x5410); }
__device__ __forceinline__ uint32_t upper_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return permuted(permuted(a, b, 0x0073), permuted(c, d, 0x0073), 0x5410);
}
__device__ __forceinline__ uint32_t signs_of(float a, float b, float c, float d) {
  return upper_bytes(bits_of(a), bits_of(b), bits_of(c), bits_of(d));
}
__device__ __forceinline__ uint32_t second_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return permuted(permuted(a, b, 0x0051), permuted(c, d, 0x0051), 0x5410);
}

// Arithmetic as Ieee of base/arithmetic.h, for numbers that are ordinary.
struct Quick {
#if defined(__CUDA_ARCH__) && !defined(PRECOND_APPROXIMATE)
  // For b > 0, where quotient and remainder are normal, or a = +-0: nvcc's sequence, 1 / b refined once and the
  // quotient once. The remainder is computed with the other sign, so that -0 / b stays -0.
  __device__ __forceinline__ static float quotient(float a, float b) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    r = fma(r, fma(-b, r, 1.0f), r);
    const float q = a * r;
    return fma(-fma(b, q, -a), r, q);
  }
  // For v = 0 and 2^-100 <= v < infinity: nvcc's sequence. Of these numbers 2^-126 changes 0 alone, whose inverse root
  // it makes finite.
  __device__ __forceinline__ static float root(float v) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v + 0x1p-126f));
    const float s = v * r;
    return fma(fma(-s, s, v), 0.5f * r, s);
  }
#else
  __device__ __forceinline__ static float quotient(float a, float b) { return a / b; }
  __device__ __forceinline__ static float root(float v) { return sqrt(v); }
#endif
};

// Whether scalars leave the new p of `stepped` finite or infinite, but no NaN, from a finite p and a direction below
// 2^120.
__device__ __forceinline__ bool keep_numbers(const Coupled&) { return true; }
__device__ __forceinline__ bool keep_numbers(const L2& decay) { return magnitude_of(decay.lr_wd) <= 1.0f; }

// What of a rule may be done by Quick: nothing, unless it is said here.
template <class Rule>
struct QuickRule {
  static constexpr bool kThere = false;
};
// Quotient and root are right for 2^-112 <= |m| < 2^60 and 2^-97 <= v < 2^60, or 0, by scalars that `fit`.
template <class Decay>
struct Adam;
template <class Decay>
struct QuickRule<Adam<Decay>> {
  static constexpr bool kThere = true;
  __device__ __forceinline__ static bool fit(const Adam<Decay>& rule) {
    return rule.eps >= 0x1p-60f && rule.eps < 0x1p60f && rule.inv_sqrt_bias2 >= 0x1p-20f &&
           rule.inv_sqrt_bias2 < 0x1p20f && magnitude_of(rule.step_size) <= 1.0f && keep_numbers(rule.decay);
  }
};
constexpr uint32_t kQuickLeast = 0x0f000000u;  // of 2 bits(m) - 1 and of bits(v) - 1, which are largest of 0
constexpr uint32_t kQuickMost = 0x5d800000u;   // the bits of 2^60

}  // namespace PRECOND_ISA
}  // namespace precond
