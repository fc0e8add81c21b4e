// States in 8 or 4 bits: a code per element, a bf16 scale per group. A code is the upper bits of the float 2 + K y,
// where y is a magnitude over its group's scale: steps are even up to 2 / K and then double with every power of two
// (a mu-law), so that small values keep more of their digits, and no division, root or table is needed. Rounded
// stochastically: to nearest, a decaying mean would stop at a few codes and a second moment would never decay.
#pragma once

#include "base/arithmetic.h"
#include "base/limits.h"
#include "formats/storing.h"

namespace precond {
inline namespace PRECOND_ISA {

struct Group {
  uint32_t scale;   // bf16, its magnitude at least the largest one of the group
  float per_scale;  // from a magnitude to K y
  uint32_t mask;    // of an element's bits; 0 where the group has a number that is not finite: all codes are then 0
};

template <bool kSigned, int kBits>
struct Codes {
  static constexpr Storing kStoring = Storing::codes;
  // Two codes of 4 bits lie in a uint8.
  static constexpr Storage kStorage = kSigned && kBits == 8 ? Storage::int8 : Storage::uint8;
  static constexpr int kCodeBits = kBits;
  // Bits below a code: 5 of the float's mantissa are kept, in 4 bits 1. bench/NOTES.md has others.
  static constexpr int kBelow = kBits == 8 ? 18 : 22;
  // The sign takes the upper bit of a signed code.
  static constexpr uint32_t kSign = kSigned ? 1u << (kBits - 1) : 0u, kMost = (1u << (kSigned ? kBits - 1 : kBits)) - 1,
                            kAll = (1u << kBits) - 1;
  static constexpr uint32_t kTwo = 0x40000000u;  // the bits of 2
  // K: the largest code is 2 + K, which is what the scale itself has. Its inverse is rounded to 0, so that the largest
  // code is not decoded to more than the scale, which would creep up.
  static constexpr float kRange = kBits == 8 ? (kSigned ? 29.5f : 502.0f) : (kSigned ? 22.0f : 382.0f);
  static constexpr float kInverse =
      kBits == 8 ? (kSigned ? 0x1.15b1e4p-5f : 0x1.05197ep-9f) : (kSigned ? 0x1.745d16p-5f : 0x1.571ed2p-9f);

  // Scales are stored below 0. In version 0.1 they were above, and codes meant other values: the sign tells them
  // apart in every checkpoint. That of a new state is 0, and its unit too, not -0.
  PRECOND_INLINE static float unit(uint32_t scale) { return fma(float_of(scale << 16), -kInverse, 0.0f); }
  // Of the code in a word, from bit kAt on.
  template <int kAt = 0>
  PRECOND_INLINE static float value(uint32_t word, float unit) {
    constexpr int kUp = kBelow > kAt ? kBelow - kAt : 0, kDown = kBelow < kAt ? kAt - kBelow : 0;
    const uint32_t digits = word << kUp >> kDown;
    // (z - 2) unit, which this way too is rounded once.
    const float magnitude = fma(float_of(kTwo | (digits & kMost << kBelow)), unit, -2.0f * unit);
    return kSigned ? float_of(bits_of(magnitude) | (word << (32 - kBits - kAt) & 0x80000000u)) : magnitude;
  }

  // The magnitude of a scale, rounded up, from the largest bits of a magnitude in the group. Not below 2^-118, where K
  // over it would overflow: what is less than a step of such a group is rounded to 0 or that.
  PRECOND_INLINE static uint32_t scale_of(uint32_t top) {
    const uint32_t scale = (top + 0xffffu) >> 16;
    return scale < 0x0480u ? 0x0480u : scale;
  }
  // Above bf16's largest number, 3.39e38, a magnitude counts as infinite.
  PRECOND_INLINE static Group group(uint32_t top) {
    const uint32_t scale = scale_of(top);
    const bool finite = scale < 0x7f80u;
    Group group;
    group.scale = finite ? scale | 0x8000u : 0xffc0u;
    const float per_scale = kRange / float_of(scale << 16);
    group.per_scale = finite ? per_scale : 0.0f;
    group.mask = finite ? 0xffffffffu : 0u;
    return group;
  }
  // Zero is 0. Up or down so that the mean of what is decoded is exact: the draw is added below the code. No code comes
  // out too large: y is at most 1, 2 + K y at most an ulp too large, and a draw ends two or more bits above that. A
  // second moment that is not zero has a code of at least 1: a mean divided by eps alone would take its parameter away.
  // `placed`: the draw, in bits 8 to 23.
  PRECOND_INLINE static uint32_t code(float x, const Group& group, uint32_t placed) {
    return finite_code(float_of(bits_of(x) & group.mask), group.per_scale, placed);
  }
  // Of a group that is finite.
  PRECOND_INLINE static uint32_t finite_code(float x, float per_scale, uint32_t placed) {
    return raised_code(x, per_scale, placed) >> 24;
  }
  // The same from bit 24 on, above what is left of the draw; in 4 bits a sign is bit 27.
  PRECOND_INLINE static uint32_t raised_code(float x, float per_scale, uint32_t placed) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    const uint32_t z = (bits_of(fma(float_of(magnitude), per_scale, 2.0f)) << (24 - kBelow)) + placed;
    if (kSigned) return z | (bits_of(x) >> (8 - kBits) & kSign << 24);
    const uint32_t some = z > 1u << 24 ? z : 1u << 24;
    return magnitude != 0u ? some : z;
  }
};
using Int8 = Codes<true, 8>;
using Uint8 = Codes<false, 8>;
using Int4 = Codes<true, 4>;
using Uint4 = Codes<false, 4>;

}  // namespace PRECOND_ISA
}  // namespace precond
