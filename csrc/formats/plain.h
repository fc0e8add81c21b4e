// fp32, bf16 and fp16, rounded to nearest: what torch has a dtype for.
#pragma once

#include "base/arithmetic.h"
#include "formats/storing.h"

namespace precond {
inline namespace PRECOND_ISA {

// Two formats of 16 bits also store two values at once, the first in the lower half: `stored_both`. GPUs convert both
// in one instruction since sm_80, but make 0x7fff of a NaN. No other result has all bits of the exponent and a
// mantissa, so as signed integers all others lie at or below infinity, and a minimum lowers the NaN to torch's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
PRECOND_INLINE uint32_t with_nan(uint32_t both, uint32_t nan) {
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ >= 12
  uint32_t mended;
  asm("min.s16x2 %0, %1, %2;" : "=r"(mended) : "r"(both), "r"(nan * 0x10001u));
  return mended;
#else
  // 1 more than 0x7fff has a sign, which the half itself had not. No half is 0xffff, so none carries into the other.
  const uint32_t is_nan = ((both + 0x10001u) & ~both & 0x80008000u) >> 15;
  return both - is_nan * (0x7fffu - nan);
#endif
}
#endif

struct Fp32 {
  static constexpr Storing kStoring = Storing::alone;
  static constexpr Storage kStorage = Storage::fp32;
  using Stored = float;
  PRECOND_INLINE static float value(Stored x) { return x; }
  PRECOND_INLINE static Stored stored(float x) { return x; }
};

struct Bf16 {
  static constexpr Storing kStoring = Storing::alone;
  static constexpr Storage kStorage = Storage::bf16;
  using Stored = uint16_t;
  PRECOND_INLINE static float value(Stored x) { return float_of(uint32_t(x) << 16); }
  // Round to nearest even in integers; every NaN becomes torch's 0x7fc0.
  PRECOND_INLINE static Stored stored(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return Stored(x != x ? 0x7fc0u : rounded);
  }
  PRECOND_INLINE static uint32_t stored_both(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return with_nan(both, 0x7fc0u);
#else
    return uint32_t(stored(low)) | uint32_t(stored(high)) << 16;
#endif
  }
};

// IEEE half precision. On the CPU in integers and one fp32 operation each: _Float16 stays scalar in GCC 12. Both equal
// the hardware's conversions for all 2^16 and 2^32 inputs, but for the payload of a NaN.
struct Fp16 {
  static constexpr Storing kStoring = Storing::alone;
  static constexpr Storage kStorage = Storage::fp16;
  using Stored = uint16_t;
#if defined(__CUDA_ARCH__)
  PRECOND_INLINE static float value(Stored x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
  }
  PRECOND_INLINE static Stored stored(float x) {
    Stored rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return x != x ? Stored(0x7e00u) : rounded;
  }
#else
  PRECOND_INLINE static float value(Stored x) {
    // As an fp32 number the shifted bits are 2^112 too small, denormals included.
    const uint32_t shifted = uint32_t(x & 0x7fffu) << 13;
    const uint32_t scaled = bits_of(float_of(shifted) * 0x1p112f);
    const uint32_t magnitude = shifted >= 0x0f800000u ? shifted | 0x7f800000u : scaled;
    return float_of(magnitude | uint32_t(x & 0x8000u) << 16);
  }
  // Round to nearest even; every NaN becomes 0x7e00.
  PRECOND_INLINE static Stored stored(float x) {
    const uint32_t u = bits_of(x) & 0x7fffffffu;
    // Adding 1/2 leaves a denormal result, rounded, in the last bits.
    const uint32_t denormal = bits_of(float_of(u) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
    uint32_t rounded = u < 0x38800000u ? denormal : normal;
    rounded = u >= 0x47800000u ? 0x7c00u : rounded;
    rounded |= bits_of(x) >> 16 & 0x8000u;
    return Stored(u > 0x7f800000u ? 0x7e00u : rounded);
  }
#endif
  PRECOND_INLINE static uint32_t stored_both(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return with_nan(both, 0x7e00u);
#else
    return uint32_t(stored(low)) | uint32_t(stored(high)) << 16;
#endif
  }
};

}  // namespace PRECOND_ISA
}  // namespace precond
