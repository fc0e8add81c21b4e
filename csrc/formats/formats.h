// Formats: how one logical fp32 value lives in memory. A rule never sees them. Each is a struct in a file beside this
// one, with the functions that its kStoring names; this is their list.
#pragma once

#include "base/random.h"
#include "formats/codes.h"
#include "formats/plain.h"
#include "formats/split.h"
#include "formats/stochastic.h"

namespace precond {

enum class Format : int32_t {
  fp32 = 0,
  bf16 = 1,
  fp16 = 2,
  bf16_stochastic = 3,
  fp16_stochastic = 4,
  bf16_split24 = 5,
  bf16_split32 = 6,
  fp16_split24 = 7,
  fp16_split32 = 8,
  int8 = 9,
  uint8 = 10,
  int4 = 11,
  uint4 = 12,
};
// The first ones stand alone; kernels for uniform and dense tensors are made of these.
constexpr int kPlainFormats = 3;
constexpr const char* kFormatNames[] = {
    "fp32",         "bf16",         "fp16",         "bf16_stochastic", "fp16_stochastic",
    "bf16_split24", "bf16_split32", "fp16_split24", "fp16_split32",    "int8",
    "uint8",        "int4",         "uint4"};
constexpr int kFormats = int(sizeof kFormatNames / sizeof kFormatNames[0]);

PRECOND_INLINE constexpr bool is_plain(Format format) { return int(format) < kPlainFormats; }
// Codes with a scale per group.
PRECOND_INLINE constexpr bool is_coded(Format format) { return format >= Format::int8; }
PRECOND_INLINE constexpr bool has_remainder(Format format) {
  return format >= Format::bf16_split24 && format <= Format::fp16_split32;
}
// Takes square roots of second moments.
PRECOND_INLINE constexpr bool is_root(Format format) { return format == Format::uint8 || format == Format::uint4; }

// Bits of an element itself, and of what lies beside it.
PRECOND_INLINE constexpr int item_bits(Format format) {
  if (format == Format::fp32) return 32;
  if (!is_coded(format)) return 16;
  return format == Format::int8 || format == Format::uint8 ? 8 : 4;
}
PRECOND_INLINE constexpr int remainder_bits(Format format) {
  if (!has_remainder(format)) return 0;
  return format == Format::bf16_split24 || format == Format::fp16_split24 ? 8 : 16;
}

inline namespace PRECOND_ISA {

// Calls f with the struct of a format. The only switch over formats. On a device f may be for the device alone.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F>
PRECOND_INLINE decltype(auto) with_format(Format format, F&& f) {
  switch (format) {
    case Format::bf16:
      return f(Bf16{});
    case Format::fp16:
      return f(Fp16{});
    case Format::bf16_stochastic:
      return f(Bf16Stochastic{});
    case Format::fp16_stochastic:
      return f(Fp16Stochastic{});
    case Format::bf16_split24:
      return f(Bf16Split24{});
    case Format::bf16_split32:
      return f(Bf16Split32{});
    case Format::fp16_split24:
      return f(Fp16Split24{});
    case Format::fp16_split32:
      return f(Fp16Split32{});
    case Format::int8:
      return f(Int8{});
    case Format::uint8:
      return f(Uint8{});
    case Format::int4:
      return f(Int4{});
    case Format::uint4:
      return f(Uint4{});
    case Format::fp32:
      break;
  }
  return f(Fp32{});
}
// The same for one that is plain.
template <class F>
PRECOND_INLINE decltype(auto) with_plain_format(Format format, F&& f) {
  if (format == Format::bf16) return f(Bf16{});
  if (format == Format::fp16) return f(Fp16{});
  return f(Fp32{});
}

}  // namespace PRECOND_ISA
}  // namespace precond
