// Formats: how one logical fp32 value lives in memory. A rule never sees them. Each is a struct with a dense decode and
// a two-phase encode: `prepare` looks at the whole tile first (formats with a scale per group need its maximum), `encode`
// writes it with what `prepare` found.
#pragma once

#include "math.h"

namespace precond {

// Numbers are shared with Python through the module's `formats`.
enum class Format : int32_t { fp32 = 0, bf16 = 1 };

inline namespace PRECOND_ISA {

struct NothingToPrepare {};

struct Fp32 {
  using Stored = float;
  PRECOND_INLINE static void decode(const Stored* in, int64_t n, float* out) {
    std::memcpy(out, in, size_t(n) * sizeof(float));
  }
  PRECOND_INLINE static NothingToPrepare prepare(const float*, int64_t) { return {}; }
  PRECOND_INLINE static void encode(const float* in, int64_t n, NothingToPrepare, Stored* out) {
    std::memcpy(out, in, size_t(n) * sizeof(float));
  }
};

struct Bf16 {
  using Stored = uint16_t;
  PRECOND_INLINE static void decode(const Stored* __restrict in, int64_t n, float* __restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = float_of(uint32_t(in[i]) << 16);
  }
  PRECOND_INLINE static NothingToPrepare prepare(const float*, int64_t) { return {}; }
  // Round to nearest even in integers; every NaN becomes torch's 0x7fc0.
  PRECOND_INLINE static void encode(const float* __restrict in, int64_t n, NothingToPrepare, Stored* __restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t u = bits_of(in[i]);
      const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
      out[i] = Stored((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
  }
};

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
