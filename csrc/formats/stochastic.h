// bf16 and fp16, rounded up or down with probabilities that make the mean exact: small changes are not lost, on
// average. A value that the format has stays as it is.
#pragma once

#include "formats/plain.h"

namespace precond {
inline namespace PRECOND_ISA {

struct Bf16Stochastic {
  static constexpr Storing kStoring = Storing::drawn;
  static constexpr Storage kStorage = Storage::bf16;
  using Stored = uint16_t;
  PRECOND_INLINE static float value(Stored x) { return Bf16::value(x); }
  // On bits, which are the magnitude: what is cut off is the probability of a carry.
  PRECOND_INLINE static Stored stored(float x, uint32_t draw) {
    const uint32_t u = x != x ? 0x7fc00000u : bits_of(x);
    return Stored((u + draw) >> 16);
  }
};

// The distance of fp16 numbers around one of these bits, as fp32 bits; that of the largest denormal below 2^-14.
PRECOND_INLINE uint32_t fp16_step(uint32_t u) {
  const uint32_t exponent = u & 0x7f800000u;
  return (exponent < 0x38800000u ? 0x38800000u : exponent) - (10u << 23);
}
// 1 / x for the bits of a power of two.
PRECOND_INLINE float inverse_power(uint32_t u) { return float_of(0x7f000000u - u); }

struct Fp16Stochastic {
  static constexpr Storing kStoring = Storing::drawn;
  static constexpr Storage kStorage = Storage::fp16;
  using Stored = uint16_t;
  PRECOND_INLINE static float value(Stored x) { return Fp16::value(x); }
  PRECOND_INLINE static Stored stored(float x, uint32_t draw) {
    const uint32_t u = bits_of(x) & 0x7fffffffu;
    const uint32_t step = fp16_step(u);
    // In steps: at most 11 bits before the point, so 13 behind it leave the sum exact where the format has x.
    const float steps = float_of(u < 0x7f800000u ? u : 0u) * inverse_power(step);
    const float whole = float(int32_t(steps + float(int32_t(draw >> 3)) * 0x1p-13f)) * float_of(step);
    const uint32_t rounded = u < 0x7f800000u ? bits_of(whole) : u;
    return Fp16::stored(float_of(rounded | (bits_of(x) & 0x80000000u)));
  }
};

}  // namespace PRECOND_ISA
}  // namespace precond
