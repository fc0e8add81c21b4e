// States in 8 or 4 bits: a code per element, a bf16 scale per group. Signed states (means) are companded by softsign,
// so that small ones keep more of their digits; second moments are stored as their square roots. Rounded
// stochastically: to nearest, a decaying mean would stop at a few codes and a second moment would never decay.
#pragma once

#include "base/arithmetic.h"
#include "base/limits.h"
#include "formats/storing.h"

namespace precond {
inline namespace PRECOND_ISA {

struct Group {
  uint32_t scale;   // bf16, at least the largest magnitude
  float per_scale;  // from a magnitude to what is encoded
  uint32_t mask;    // of a magnitude's bits; 0 where the group has a number that is not finite: all codes are then 0
};

template <bool kSigned, int kBits>
struct Codes {
  static constexpr Storing kStoring = Storing::codes;
  // Two codes of 4 bits lie in a uint8.
  static constexpr Storage kStorage = kSigned && kBits == 8 ? Storage::int8 : Storage::uint8;
  static constexpr bool kRoot = !kSigned;
  static constexpr int kCodeBits = kBits;
  static constexpr int32_t kLevels = kSigned ? (1 << (kBits - 1)) - 1 : (1 << kBits) - 1;

  PRECOND_INLINE static float unit(uint32_t scale) {
    return kSigned ? float_of(scale << 16) : float_of(scale << 16) * (1.0f / float(kLevels));
  }
  PRECOND_INLINE static float value(int32_t code, float unit) {
    if (!kSigned) {
      const float root = float(code) * unit;
      return root * root;
    }
    const float y = float(code) * (1.0f / float(kLevels));
    const float t = float_of(bits_of(y) & 0x7fffffffu);
    return float_of(bits_of(t / (2.0f - t) * unit) | (bits_of(y) & 0x80000000u));
  }

  // From the largest bits of a magnitude in the group. The scale is rounded up, but not for 16 ulp: a largest code that
  // is decoded, or the root of its square, may be a few above its scale, which would otherwise creep up. Not below
  // 2^-120, where its inverse would overflow: smaller groups still have codes down to 2^-128, and less is rounded to 0
  // or that. Above bf16's largest number, 3.39e38, a magnitude counts as infinite.
  PRECOND_INLINE static Group group(uint32_t top) {
    uint32_t scale = (top + 0xffefu) >> 16;
    scale = scale < 0x0380u ? 0x0380u : scale;
    const bool finite = scale < 0x7f80u;
    Group group;
    group.scale = finite ? scale : 0x7fc0u;
    const float per_scale = (kSigned ? 1.0f : float(kLevels)) / float_of(scale << 16);
    group.per_scale = finite ? per_scale : 0.0f;
    group.mask = finite ? 0x7fffffffu : 0u;
    return group;
  }
  // x: the value, or the root of a second moment. Zero is 0. Up or down so that the mean of what is decoded is exact:
  // of the companded value, and of the second moment itself, not its root. A second moment that is not zero has a code
  // of at least 1: a mean divided by eps alone would take its parameter away.
  PRECOND_INLINE static int32_t code(float x, const Group& group, uint32_t draw) {
    const uint32_t magnitude = bits_of(x) & group.mask;
    const float y = float_of(magnitude) * group.per_scale;
    const float part = float(int32_t(draw)) * 0x1p-16f;
    if (kSigned) {
      const int32_t code = int32_t(fma((y + y) / (1.0f + y), float(kLevels), part));
      const int32_t most = code > kLevels ? kLevels : code;
      const int32_t negative = int32_t(bits_of(x)) >> 31;
      return (most ^ negative) - negative;
    }
    const int32_t below = int32_t(y);
    const float whole = float(below), above = y - whole, twice = whole + whole;
    // y^2 lies (y^2 - whole^2) / ((whole + 1)^2 - whole^2) of the way.
    const int32_t code = below + (part * (twice + 1.0f) < above * (twice + above) ? 1 : 0);
    const int32_t least = magnitude < 1u ? 0 : 1;
    const int32_t most = code > kLevels ? kLevels : code;
    return most > least ? most : least;
  }
};
using Int8 = Codes<true, 8>;
using Uint8 = Codes<false, 8>;
using Int4 = Codes<true, 4>;
using Uint4 = Codes<false, 4>;

}  // namespace PRECOND_ISA
}  // namespace precond
