// Compiled once per instruction set, with PRECOND_ISA naming it: between memory and tiles, in every format and layout.
// No STL containers here, so that no symbol is shared between instruction sets.
#include <type_traits>

#include "cpu/tile.h"

namespace precond {
inline namespace PRECOND_ISA {

void fill_hashes(Seed seed, uint64_t run, int64_t runs, uint32_t* hash) {
  const uint32_t low = uint32_t(run), high = uint32_t(run >> 32);
  // Runs before the low half overflows.
  const int64_t left = int64_t(0x100000000u - low), first = runs < left ? runs : left;
#pragma omp simd
  for (int64_t i = 0; i < first; ++i) hash[i] = hashed(seed, low + uint32_t(i), high);
  for (int64_t i = first; i < runs; ++i) hash[i] = hashed(seed, low + uint32_t(i), high + 1);
}

void fill_random(Seed seed, uint64_t index, int64_t n, RandomTile& random) {
  random.first = int(index % kRun);
  const int64_t runs = (random.first + n + kRun - 1) / kRun;
  uint32_t hash[kTile / kRun + 1];
  fill_hashes(seed, index / kRun, runs, hash);
  // A vector type: GCC 12 makes a loop over k scalar, which takes longer than all else here.
  typedef uint32_t Run __attribute__((vector_size(kRun * sizeof(uint32_t))));
  const Run odds = {odd(0), odd(1), odd(2), odd(3), odd(4), odd(5), odd(6), odd(7)};
  Run* const words = reinterpret_cast<Run*>(random.word);
  for (int64_t i = 0; i < runs; ++i) words[i] = hash[i] * odds;
}

template <class F>
PRECOND_INLINE void decode_tile(const Operand& operand, int64_t begin, int64_t n, float* out) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(operand.data) + bytes_of(begin, F::kCodeBits);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(operand.beside) + begin / kGroup;
  uint16_t pairs[kTile / 2];
  if constexpr (F::kCodeBits == 4) {
    unpack(codes, (n + 1) / 2, pairs);
    codes = reinterpret_cast<const uint8_t*>(pairs);
  }
  for_groups(n, [&](int64_t g, int64_t first, auto count) __attribute__((always_inline)) {
    decode_codes<F>(codes + first, F::unit(scales[g]), count, out + first);
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
PRECOND_INLINE void encode_elements(const float* __restrict x, const uint32_t* __restrict word, Draws draws, int64_t n,
                                    typename F::Stored* __restrict out, char* beside, int64_t begin) {
  if constexpr (F::kStoring == Storing::remainder) {
    auto* __restrict remainder = reinterpret_cast<typename F::Remainder*>(beside) + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const auto split = F::split(x[i], draws(word[i]));
      out[i] = split.stored;
      remainder[i] = split.remainder;
    }
  } else if constexpr (F::kStoring == Storing::drawn) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::stored(x[i], draws(word[i]));
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

void store(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile,
           const RandomTile& random, Draws draws) {
  const uint32_t* word = random.word + random.first;
  with_format(operand.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (F::kStoring == Storing::codes) {
      encode_tile<F>(operand, begin, n, tile, word, draws);
    } else {
      using Stored = typename F::Stored;
      Stored* data = reinterpret_cast<Stored*>(operand.data);
      if (operand.strides == kDense) {
        encode_elements<F>(tile.value, word, draws, n, data + begin, operand.beside, begin);
      } else {
        Stored encoded[kTile];
        encode_elements<F>(tile.value, word, draws, n, encoded, operand.beside, begin);
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
