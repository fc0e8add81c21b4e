// Formats: how one logical fp32 value lives in memory. A rule never sees them. Each has a dense `decode` and a
// two-phase encode: `prepare` looks at the whole tile first (formats with a scale per group need its maximum), `encode`
// writes it with what `prepare` found. A format whose elements stand alone only spells `value` and `stored`.
#pragma once

#include "math.h"

namespace precond {

// Numbers are shared with Python through the module's `formats`.
enum class Format : int32_t { fp32 = 0, bf16 = 1 };

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
    case Format::fp32:
      break;
  }
  return f(Fp32{});
}

}  // namespace PRECOND_ISA
}  // namespace precond
