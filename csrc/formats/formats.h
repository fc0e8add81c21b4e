// Formats: how one logical fp32 value lives in memory. A rule never sees them. Each is a struct in a file beside this
// one, with the functions that its kStoring names. PRECOND_FORMATS is their list; all that is known of a format follows
// from it and from the structs.
#pragma once

#include <type_traits>

#include "base/random.h"
#include "formats/codes.h"
#include "formats/plain.h"
#include "formats/split.h"
#include "formats/stochastic.h"

namespace precond {

// FORMAT(name, struct), in the order of their numbers. Those that stand alone come first: kernels for uniform and dense
// tensors are made of these. Then those that draw, those with remainders, and codes.
#define PRECOND_FORMATS(FORMAT)           \
  FORMAT(fp32, Fp32)                      \
  FORMAT(bf16, Bf16)                      \
  FORMAT(fp16, Fp16)                      \
  FORMAT(bf16_stochastic, Bf16Stochastic) \
  FORMAT(fp16_stochastic, Fp16Stochastic) \
  FORMAT(bf16_split24, Bf16Split24)       \
  FORMAT(bf16_split32, Bf16Split32)       \
  FORMAT(fp16_split24, Fp16Split24)       \
  FORMAT(fp16_split32, Fp16Split32)       \
  FORMAT(int8, Int8)                      \
  FORMAT(uint8, Uint8)                    \
  FORMAT(int4, Int4)                      \
  FORMAT(uint4, Uint4)

#define PRECOND_NUMBER(name, Struct) name,
enum class Format : int32_t { PRECOND_FORMATS(PRECOND_NUMBER) };
#undef PRECOND_NUMBER

// Formats that training uses most among those with codes: of p, g, means and second moments. Where a rule is taken
// often too (kOften), they have kernels of their own.
#define PRECOND_OFTEN_CODED(OFTEN)         \
  OFTEN(Bf16Split24, Bf16, Int8, Uint8)    \
  OFTEN(Bf16Stochastic, Bf16, Int8, Uint8) \
  OFTEN(Fp32, Fp32, Int8, Uint8)           \
  OFTEN(Bf16Split24, Bf16, Int4, Uint4)    \
  OFTEN(Bf16Stochastic, Bf16, Int4, Uint4)

// What the host knows of a format.
struct FormatInfo {
  const char* name;
  Storage storage;     // of the elements themselves
  int item_bits;       // of an element
  int remainder_bits;  // of what lies beside an element
  bool plain;          // stands alone, and is rounded to nearest
  bool coded;          // codes, and beside them a scale per group
};

template <class F>
constexpr FormatInfo format_info(const char* name) {
  FormatInfo info{name, F::kStorage, 0, 0, F::kStoring == Storing::alone, F::kStoring == Storing::codes};
  if constexpr (F::kStoring == Storing::codes) {
    info.item_bits = F::kCodeBits;
  } else {
    info.item_bits = 8 * int(sizeof(typename F::Stored));
  }
  if constexpr (F::kStoring == Storing::remainder) info.remainder_bits = 8 * int(sizeof(typename F::Remainder));
  return info;
}

template <class F>
constexpr Format format_of() {
#define PRECOND_IS(name, Struct) \
  if constexpr (std::is_same_v<F, Struct>) return Format::name;
  PRECOND_FORMATS(PRECOND_IS)
#undef PRECOND_IS
}

#define PRECOND_INFO(name, Struct) format_info<Struct>(#name),
constexpr FormatInfo kFormats[] = {PRECOND_FORMATS(PRECOND_INFO)};
#undef PRECOND_INFO
constexpr int kFormatCount = int(sizeof kFormats / sizeof kFormats[0]);
constexpr int kPlainFormats = 3;

constexpr const FormatInfo& info_of(Format format) { return kFormats[int(format)]; }
// What a tensor of this dtype is without any other format.
constexpr Format plain_format(Storage storage) {
  return storage == Storage::bf16 ? Format::bf16 : storage == Storage::fp16 ? Format::fp16 : Format::fp32;
}

// The same for kernels, which have no tables: comparisons of numbers.
PRECOND_INLINE constexpr bool is_plain(Format format) { return int(format) < kPlainFormats; }
PRECOND_INLINE constexpr bool is_coded(Format format) { return format >= Format::int8; }
PRECOND_INLINE constexpr bool has_remainder(Format format) {
  return format >= Format::bf16_split24 && format <= Format::fp16_split32;
}
PRECOND_INLINE constexpr int item_bits(Format format) {
  if (format == Format::fp32) return 32;
  if (!is_coded(format)) return 16;
  return format == Format::int8 || format == Format::uint8 ? 8 : 4;
}
PRECOND_INLINE constexpr int remainder_bits(Format format) {
  if (!has_remainder(format)) return 0;
  return format == Format::bf16_split24 || format == Format::fp16_split24 ? 8 : 16;
}
constexpr bool comparisons_agree_with_the_table() {
  for (int k = 0; k < kFormatCount; ++k) {
    const FormatInfo& info = kFormats[k];
    const Format format = Format(k);
    if (is_plain(format) != info.plain || is_coded(format) != info.coded ||
        has_remainder(format) != (info.remainder_bits != 0) || item_bits(format) != info.item_bits ||
        remainder_bits(format) != info.remainder_bits)
      return false;
  }
  return true;
}
static_assert(comparisons_agree_with_the_table(), "a format's comparisons above must say what its struct says");

inline namespace PRECOND_ISA {

// Calls f with the struct of a format. On a device f may be for the device alone.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F>
PRECOND_INLINE decltype(auto) with_format(Format format, F&& f) {
#define PRECOND_CASE(name, Struct)                     \
  case Format::name:                                   \
    if constexpr (Format::name == Format::fp32) break; \
    return f(Struct{});
  switch (format) { PRECOND_FORMATS(PRECOND_CASE) }
#undef PRECOND_CASE
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
