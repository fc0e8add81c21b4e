// Split weights: a 16-bit parameter, rounded to nearest, and beside it what that lacks of a 24- or 32-bit master.
#pragma once

#include "formats/stochastic.h"

namespace precond {
inline namespace PRECOND_ISA {

// A parameter and its remainder.
template <class RemainderT>
struct Split {
  uint16_t stored;
  RemainderT remainder;
};

// bf16 is the upper half of fp32, and the remainder a difference of bits. One that is not the parameter's, which
// somebody wrote, leaves an infinite parameter infinite, and does not take a 0 below 0, where the bits are a NaN's. One
// comparison finds both: the master of a finite parameter is at most 0x7f7f7fff, that of another at least 0x7f7f8000.
PRECOND_INLINE float master_of(uint16_t stored, uint32_t remainder) {
  const uint32_t u = uint32_t(stored) << 16;
  return float_of(u + (is_within(float_of(u + remainder), 0x1.ffp127f) ? remainder : 0u));
}

// The master is every fp32 number whose bf16 is finite.
struct Bf16Split32 {
  static constexpr Storing kStoring = Storing::remainder;
  static constexpr Storage kStorage = Storage::bf16;
  using Stored = uint16_t;
  using Remainder = int16_t;
  PRECOND_INLINE static float value(Stored x, Remainder remainder) {
    return master_of(x, uint32_t(int32_t(remainder)));
  }
  PRECOND_INLINE static Split<Remainder> split(float x, uint32_t) {
    const uint32_t u = x != x ? 0x7fc00000u : bits_of(x);
    const uint32_t rounded = (u + 0x8000u) >> 16;
    return {Stored(rounded), Remainder(u - (rounded << 16))};
  }
};

// The master has 24 bits, the last rounded stochastically: within one part in 2^15 of fp32, and its mean exact.
struct Bf16Split24 {
  static constexpr Storing kStoring = Storing::remainder;
  static constexpr Storage kStorage = Storage::bf16;
  using Stored = uint16_t;
  using Remainder = int8_t;
  PRECOND_INLINE static float value(Stored x, Remainder remainder) {
    return master_of(x, uint32_t(int32_t(remainder) * 256));
  }
  PRECOND_INLINE static Split<Remainder> split(float x, uint32_t draw) {
    const uint32_t u = x != x ? 0x7fc00000u : bits_of(x);
    const uint32_t master = u + (draw >> 8);  // its upper 24 bits
    return {Stored((master + 0x8000u) >> 16), Remainder(master >> 8)};
  }
};

// fp16 has other exponents than fp32, so the remainder counts parts of the distance between fp16 numbers: 2^-14 of it
// holds every fp32 number between fp16's smallest and largest normal ones, 2^-8 of it has 19 bits. Below, the absolute
// error is that at 2^-14; what rounds to an infinite fp16 is infinite.
template <class RemainderT, int kBits>
struct Fp16Split {
  static constexpr Storing kStoring = Storing::remainder;
  static constexpr Storage kStorage = Storage::fp16;
  using Stored = uint16_t;
  using Remainder = RemainderT;
  static constexpr float kParts = float(1 << kBits), kHalf = kParts / 2;
  static constexpr int kDraw = kBits > 8 ? 10 : 15;  // bits that leave the sum below exact
  PRECOND_INLINE static float value(Stored x, Remainder remainder) {
    const float h = Fp16::value(x);
    return h + float(int32_t(remainder)) * (float_of(fp16_step(bits_of(h))) * (1.0f / kParts));
  }
  PRECOND_INLINE static Split<Remainder> split(float x, uint32_t draw) {
    const Stored rounded = Fp16::stored(x);
    const float h = Fp16::value(rounded);
    const uint32_t u = bits_of(h) & 0x7fffffffu;
    const float lacking = u < 0x7f800000u ? x - h : 0.0f;
    const float parts = lacking * inverse_power(fp16_step(u)) * kParts + kHalf;
    const float least = float(int32_t(draw >> (16 - kDraw))) * (1.0f / float(1 << kDraw));
    const int32_t whole = int32_t(parts + least) - int32_t(kHalf);
    constexpr int32_t kLargest = int32_t((1u << (8 * sizeof(Remainder) - 1)) - 1);
    return {rounded, Remainder(whole > kLargest ? kLargest : whole)};
  }
};
using Fp16Split32 = Fp16Split<int16_t, 14>;
using Fp16Split24 = Fp16Split<int8_t, 8>;

}  // namespace PRECOND_ISA
}  // namespace precond
