// Formats: how one logical fp32 value lives in memory. A rule never sees them. Each has a dense `decode` and a
// two-phase encode: `prepare` looks at the whole tile first (formats with a scale per group need its maximum), `encode`
// writes it with what `prepare` found. A format whose elements stand alone only spells `value` and `stored`.
#pragma once

#include "math.h"

namespace precond {

enum class Format : int32_t { fp32 = 0, bf16 = 1, fp16 = 2 };
constexpr int kFormats = 3;

inline namespace PRECOND_ISA {

struct NothingToPrepare {};

struct Fp32 {
  using Stored = float;
  PRECOND_INLINE static float value(Stored x) { return x; }
  PRECOND_INLINE static Stored stored(float x) { return x; }
};

struct Bf16 {
  using Stored = uint16_t;
  PRECOND_INLINE static float value(Stored x) { return float_of(uint32_t(x) << 16); }
  // Round to nearest even in integers; every NaN becomes torch's 0x7fc0.
  PRECOND_INLINE static Stored stored(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return Stored(x != x ? 0x7fc0u : rounded);
  }
};

// IEEE half precision. On the CPU in integers and one fp32 operation each: _Float16 stays scalar in GCC 12. Both equal
// the hardware's conversions for all 2^16 and 2^32 inputs, but for the payload of a NaN.
struct Fp16 {
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
};

// Decode and encode for formats that store each value on its own.
template <class Format>
PRECOND_INLINE void decode(Format, const typename Format::Stored* __restrict in, int64_t n, float* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = Format::value(in[i]);
}
template <class Format>
PRECOND_INLINE NothingToPrepare prepare(Format, const float*, int64_t) {
  return {};
}
template <class Format>
PRECOND_INLINE void encode(Format, const float* __restrict in, int64_t n, NothingToPrepare,
                           typename Format::Stored* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = Format::stored(in[i]);
}

// Calls f with the struct of a format. The only switch over formats.
template <class F>
PRECOND_INLINE decltype(auto) with_format(Format format, F&& f) {
  switch (format) {
    case Format::bf16:
      return f(Bf16{});
    case Format::fp16:
      return f(Fp16{});
    case Format::fp32:
      break;
  }
  return f(Fp32{});
}

}  // namespace PRECOND_ISA
}  // namespace precond
