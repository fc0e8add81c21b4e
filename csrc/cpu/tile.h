// Tiles: fp32 copies of a stretch of each operand, for formats and layouts that the rules' loops do not read
// themselves.
#pragma once

#include <cstring>
#include <type_traits>

#include "plan/plan.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

// Elements of a tile: the fp32 copies of five operands then take 10 KB of L1. 256 and 1024 time alike where every
// element stands alone; with codes 256 takes 1.2 times as long.
constexpr int64_t kTile = 512;
constexpr int64_t kTileGroups = kTile / kGroup;

struct alignas(64) Tile {
  float value[kTile];
};
// The word of each element, from `first` on.
struct alignas(64) RandomTile {
  uint32_t word[kTile + kRun];
  int first;
};

// Functions, not parts of each rule: five operands times formats times strides made 60 KB of code of every rule, and a
// call per tile costs nothing.

// The operand's values as dense fp32.
void load(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile);
// `draws`: this operand's.
void store(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile,
           const RandomTile& random, Draws draws);
// From a run on.
void fill_hashes(Seed seed, uint64_t run, int64_t runs, uint32_t* hash);
void fill_random(Seed seed, uint64_t index, int64_t n, RandomTile& random);
void clamp_tile(Incoming incoming, int64_t n, Tile& tile);

// Of so many elements. Not a division, of which GCC 12 makes an instruction of 40 to 95 cycles where it takes a branch
// for a rare one: 4M bf16 elements, stochastic + int8, ns each on one thread of a Xeon: 3.3 -> 1.7.
PRECOND_INLINE constexpr int64_t bytes_of(int64_t elements, int64_t bits) { return (elements * bits) >> 3; }
// The same for whole groups.
PRECOND_INLINE constexpr int64_t groups_of(int64_t elements) { return int64_t(uint64_t(elements) / kGroup); }

// The lines of the next elements: the hardware's prefetchers start anew in each stretch of a tile, and memory would
// rest while a tile is decoded and encoded. 4M elements, split32 + fp32, ns each: 1.38 -> 0.82.
PRECOND_INLINE void prefetch(const Operand& operand, int64_t begin, int64_t count, int64_t end) {
  const int64_t last = begin + count < end ? begin + count : end;
  // Inlined, or GCC takes it for a function without effect and leaves it out.
  const auto fetch = [begin, last](const char* data, int64_t bits) __attribute__((always_inline)) {
    for (const char* line = data + bytes_of(begin, bits); line < data + bytes_of(last, bits); line += 64)
      __builtin_prefetch(line, 1);
  };
  if (operand.strides == kDense) fetch(operand.data, item_bits(operand.format));
  if (has_remainder(operand.format)) fetch(operand.beside, remainder_bits(operand.format));
}

// One tile.
template <class Rule, class... States>
PRECOND_INLINE void apply_tile(const Rule rule, float coef, int64_t n, float* __restrict p, const float* __restrict g,
                               States* __restrict... s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float p_value = p[i];
    [&](auto... s_value) __attribute__((always_inline)) {
      update(rule, p_value, coef * g[i], s_value...);
      ((s[i] = s_value), ...);
    }(float(s[i])...);
    p[i] = p_value;
  }
}

// Two codes of 4 bits to a byte, the first in the lower half; in a byte each while they are worked on. As pairs, which
// vectorise, on machines that have the lower byte first.
PRECOND_INLINE void unpack(const uint8_t* __restrict bytes, int64_t n, uint16_t* __restrict pairs) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) pairs[i] = uint16_t((bytes[i] | bytes[i] << 4) & 0x0f0f);
}
PRECOND_INLINE void pack(const uint16_t* __restrict pairs, int64_t n, uint8_t* __restrict bytes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bytes[i] = uint8_t(pairs[i] | pairs[i] >> 4);
}

// Of a group's elements.
template <class F>
PRECOND_INLINE void decode_codes(const uint8_t* __restrict codes, float unit, int64_t n, float* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = F::value(codes[i], unit);
}
template <class F>
PRECOND_INLINE void encode_codes(const float* __restrict x, float per_scale, const uint32_t* __restrict word,
                                 Draws draws, int64_t n, uint8_t* __restrict codes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(F::finite_code(x[i], per_scale, draws.placed(word[i])));
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

// A group's scale and factor, for all groups that a tile may have: a loop of a constant length has no remainder to do
// number by number.
struct alignas(32) Groups {
  uint16_t scale[kTileGroups];
  float per_scale[kTileGroups];
  uint32_t mask[kTileGroups];
};

// Out of line: a division of few numbers, which is no part of the loops over elements.
template <class F>
__attribute__((noinline)) void find_groups(const uint32_t* __restrict tops, Groups& __restrict found) {
#pragma omp simd
  for (int64_t g = 0; g < kTileGroups; ++g) {
    const Group group = F::group(tops[g]);
    found.scale[g] = uint16_t(group.scale);
    found.per_scale[g] = group.per_scale;
    found.mask[g] = group.mask;
  }
}

// In two phases, over all groups each: one group after the other waits for its maximum, 0.89 -> 0.66 ns per element.
template <class F>
PRECOND_INLINE void encode_tile(const Operand& operand, int64_t begin, int64_t n, Tile& tile, const uint32_t* word,
                                Draws draws) {
  float* x = tile.value;
  const int64_t groups = (n + kGroup - 1) / kGroup;
  for (int64_t i = n; i < groups * kGroup; ++i) x[i] = 0.0f;
  uint32_t tops[kTileGroups] = {};
  Groups found;
  for (int64_t g = 0; g < groups; ++g) tops[g] = top_of(x + g * kGroup);
  find_groups<F>(tops, found);

  uint8_t* const bytes = reinterpret_cast<uint8_t*>(operand.data) + bytes_of(begin, F::kCodeBits);
  uint16_t* scales = reinterpret_cast<uint16_t*>(operand.beside) + begin / kGroup;
  std::memcpy(scales, found.scale, size_t(groups) * sizeof *scales);
  uint16_t pairs[kTile / 2];
  uint8_t* const codes = F::kCodeBits == 4 ? reinterpret_cast<uint8_t*>(pairs) : bytes;
  for_groups(n, [&](int64_t g, int64_t first, auto count) __attribute__((always_inline)) {
    if (found.mask[g] != 0)
      encode_codes<F>(x + first, found.per_scale[g], word + first, draws, count, codes + first);
    else
      std::memset(codes + first, 0, size_t(count));
  });
  if constexpr (F::kCodeBits == 4) {
    if (n % 2 != 0) codes[n] = 0;
    pack(pairs, (n + 1) / 2, bytes);
  }
}

}  // namespace PRECOND_ISA
}  // namespace precond
