// Compiled once per instruction set, with PRECOND_ISA naming it: between memory and tiles, in every format and layout.
// No STL containers here, so that no symbol is shared between instruction sets.
#include <type_traits>

#include "cpu/tile.h"

namespace precond {
inline namespace PRECOND_ISA {

void fill_random(Seed seed, uint64_t index, int64_t n, RandomTile& random) {
  const uint32_t low = uint32_t(index), high = uint32_t(index >> 32);
  // Elements before the low half overflows.
  const int64_t left = int64_t(0x100000000u - low), first = n < left ? n : left;
#pragma omp simd
  for (int64_t i = 0; i < first; ++i) random.word[i] = random_word(seed, low + uint32_t(i), high);
  for (int64_t i = first; i < n; ++i) random.word[i] = random_word(seed, low + uint32_t(i), high + 1);
}

// Codes of a group's elements, in one byte or two to a byte, the first in the lower half.
template <class F>
PRECOND_INLINE void decode_codes(const char* codes, float unit, int64_t n, float* __restrict out) {
  using Byte = std::conditional_t<F::kRoot, uint8_t, int8_t>;
  const Byte* __restrict bytes = reinterpret_cast<const Byte*>(codes);
  if constexpr (F::kCodeBits == 8) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::value(bytes[i], unit);
  } else {
    Byte halves[kGroup + 1];  // each code in the upper half of a byte
#pragma omp simd
    for (int64_t i = 0; i < (n + 1) / 2; ++i) {
      halves[2 * i] = Byte(uint8_t(bytes[i]) << 4);
      halves[2 * i + 1] = Byte(bytes[i] & 0xf0);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::value(halves[i] >> 4, unit);
  }
}

template <class F>
PRECOND_INLINE void encode_codes(const float* __restrict x, const Group group, const uint32_t* __restrict word,
                                 int shift, int64_t n, uint8_t* __restrict bytes) {
  if constexpr (F::kCodeBits == 8) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) bytes[i] = uint8_t(F::code(x[i], group, draw_of(word[i], shift)));
  } else {
    uint8_t codes[kGroup + 1];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(F::code(x[i], group, draw_of(word[i], shift))) & 15u;
    if (n % 2 != 0) codes[n] = 0;
#pragma omp simd
    for (int64_t i = 0; i < (n + 1) / 2; ++i) bytes[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

PRECOND_INLINE uint32_t top_of(const float* x) {
  uint32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int k = 0; k < kGroup; ++k) {
    const uint32_t magnitude = bits_of(x[k]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  return top;
}

// Calls f(group, first element, elements) for the groups of a tile, full ones with a constant.
template <class F>
PRECOND_INLINE void for_groups(int64_t n, F&& f) {
  const int64_t full = n / kGroup;
  for (int64_t g = 0; g < full; ++g) f(g, g * kGroup, std::integral_constant<int64_t, kGroup>{});
  if (n % kGroup != 0) f(full, full * kGroup, n % kGroup);
}

template <class F>
PRECOND_INLINE void decode_tile(const Operand& operand, int64_t begin, int64_t n, float* out) {
  const char* codes = operand.data + begin * F::kCodeBits / 8;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(operand.beside) + begin / kGroup;
  for_groups(n, [&](int64_t g, int64_t first, auto count) __attribute__((always_inline)) {
    decode_codes<F>(codes + first * F::kCodeBits / 8, F::unit(scales[g]), count, out + first);
  });
}

// In two phases, over all groups each: one group after the other waits for its maximum, 0.89 -> 0.66 ns per element.
template <class F>
PRECOND_INLINE void encode_tile(const Operand& operand, int64_t begin, int64_t n, Tile& tile, bool is_root,
                                const RandomTile& random, int shift) {
  float* x = tile.value;
  if (F::kRoot && !is_root) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = sqrt(x[i]);
  }
  const int64_t groups = (n + kGroup - 1) / kGroup;
  for (int64_t i = n; i < groups * kGroup; ++i) x[i] = 0.0f;
  uint32_t tops[kTileGroups];
  Group found[kTileGroups];
  for (int64_t g = 0; g < groups; ++g) tops[g] = top_of(x + g * kGroup);
  for (int64_t g = 0; g < groups; ++g) found[g] = F::group(tops[g]);

  uint8_t* codes = reinterpret_cast<uint8_t*>(operand.data) + begin * F::kCodeBits / 8;
  uint16_t* scales = reinterpret_cast<uint16_t*>(operand.beside) + begin / kGroup;
  for_groups(n, [&](int64_t g, int64_t first, auto count) __attribute__((always_inline)) {
    scales[g] = uint16_t(found[g].scale);
    encode_codes<F>(x + first, found[g], random.word + first, shift, count, codes + first * F::kCodeBits / 8);
  });
}

// Formats whose elements stand alone. Functions of their own, since what a lambda captures may alias bytes and keeps
// loops scalar.
template <class F>
PRECOND_INLINE void decode_elements(const typename F::Stored* __restrict in, const char* beside, int64_t begin,
                                    int64_t n, float* __restrict out) {
  if constexpr (F::kStoring == Storing::remainder) {
    const auto* __restrict remainder = reinterpret_cast<const typename F::Remainder*>(beside) + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::value(in[i], remainder[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::value(in[i]);
  }
}

template <class F>
PRECOND_INLINE void encode_elements(const float* __restrict x, const uint32_t* __restrict word, int shift, int64_t n,
                                    typename F::Stored* __restrict out, char* beside, int64_t begin) {
  if constexpr (F::kStoring == Storing::remainder) {
    auto* __restrict remainder = reinterpret_cast<typename F::Remainder*>(beside) + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const auto split = F::split(x[i], draw_of(word[i], shift));
      out[i] = split.stored;
      remainder[i] = split.remainder;
    }
  } else if constexpr (F::kStoring == Storing::drawn) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::stored(x[i], draw_of(word[i], shift));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::stored(x[i]);
  }
}

void load(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile) {
  with_format(operand.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (F::kStoring == Storing::codes) {
      decode_tile<F>(operand, begin, n, tile.value);
    } else {
      using Stored = typename F::Stored;
      Stored* data = reinterpret_cast<Stored*>(operand.data);
      if (operand.strides == kDense) {
        decode_elements<F>(data + begin, operand.beside, begin, n, tile.value);
      } else {
        Stored gathered[kTile];
        copy_strided<true>(strides[operand.strides], data, begin, n, gathered);
        decode_elements<F>(gathered, operand.beside, begin, n, tile.value);
      }
    }
  });
}

void store(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile, bool is_root,
           const RandomTile& random, int shift) {
  with_format(operand.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (F::kStoring == Storing::codes) {
      encode_tile<F>(operand, begin, n, tile, is_root, random, shift);
    } else {
      using Stored = typename F::Stored;
      Stored* data = reinterpret_cast<Stored*>(operand.data);
      if (operand.strides == kDense) {
        encode_elements<F>(tile.value, random.word, shift, n, data + begin, operand.beside, begin);
      } else {
        Stored encoded[kTile];
        encode_elements<F>(tile.value, random.word, shift, n, encoded, operand.beside, begin);
        copy_strided<false>(strides[operand.strides], data, begin, n, encoded);
      }
    }
  });
}

// A loop of its own: two compares and selects per vector cost 2 to 14 % of a step in cache, also where they clip
// nothing.
void clamp_tile(Incoming incoming, int64_t n, Tile& tile) {
  float* __restrict g = tile.value;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = incoming(g[i]);
}

}  // namespace PRECOND_ISA
}  // namespace precond
