// The CPU update in the formats with codes that training uses most (PRECOND_OFTEN_CODED), known when compiled. By pairs
// of elements: two bf16 lie in 32 bits, two codes of 8 bits in 16 and two of 4 bits in 8, so shifts and masks take both
// out of a word, and no vector is unpacked or packed. A block is as many pairs as a vector of fp32 has lanes; in a tile
// the first elements of its pairs come before the second ones.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/tile.h"
#include "cpu/update.h"
#include "rules/rule.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace precond {
inline namespace PRECOND_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kBlock = 2 * kLanes;

typedef uint32_t Lanes __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint32_t LanesInMemory __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(1), may_alias));

// Not memcpy, of which GCC 12 makes two of half the width: what reads both as one then waits until they are written.
PRECOND_INLINE void copy_lanes(const void* from, void* to) {
  *static_cast<LanesInMemory*>(to) = *static_cast<const LanesInMemory*>(from);
}

// From and to integers of fewer bits. One instruction, or three, where GCC 12 makes four or more of a conversion.
template <class T>
PRECOND_INLINE void widen(const void* from, uint32_t* to) {
#if defined(__AVX512F__)
  __m512i wide;
  if constexpr (std::is_same_v<T, int16_t>)
    wide = _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  else if constexpr (std::is_same_v<T, uint16_t>)
    wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  else
    wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  _mm512_storeu_si512(to, wide);
#elif defined(__AVX2__)
  __m256i wide;
  if constexpr (std::is_same_v<T, int16_t>)
    wide = _mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  else if constexpr (std::is_same_v<T, uint16_t>)
    wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  else
    wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), wide);
#else
  T numbers[kLanes];
  std::memcpy(numbers, from, sizeof numbers);
  for (int i = 0; i < kLanes; ++i) to[i] = uint32_t(int32_t(numbers[i]));
#endif
}
template <class T>
PRECOND_INLINE void narrow(const uint32_t* from, void* to) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_loadu_si512(from);
  if constexpr (sizeof(T) == 2)
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(wide));
  else
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(wide));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  if constexpr (sizeof(T) == 2)
    _mm_storeu_si128(static_cast<__m128i*>(to), words);
  else
    _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  T numbers[kLanes];
  for (int i = 0; i < kLanes; ++i) numbers[i] = T(from[i]);
  std::memcpy(to, numbers, sizeof numbers);
#endif
}

// Functions of a block: pointers are to its first element in memory, and to its part of a tile. Weights and gradients
// have 16 bits, two to a word, or 32; remainders have 8.
template <class F>
PRECOND_INLINE void decode_pairs(const char* data, [[maybe_unused]] const char* beside, float* __restrict out) {
  using Stored = typename F::Stored;
  if constexpr (sizeof(Stored) == 4) {
    const Stored* __restrict in = reinterpret_cast<const Stored*>(data);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      out[i] = F::value(in[2 * i]);
      out[kLanes + i] = F::value(in[2 * i + 1]);
    }
  } else {
    alignas(64) uint32_t pair[kLanes];
    copy_lanes(data, pair);
    if constexpr (F::kStoring == Storing::remainder) {
      static_assert(sizeof(typename F::Remainder) == 1);
      alignas(64) uint32_t remainder[kLanes];
      widen<int16_t>(beside, remainder);
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        out[i] = master_of(Stored(pair[i]), uint32_t(int32_t(remainder[i] << 24) >> 16));
        out[kLanes + i] = master_of(Stored(pair[i] >> 16), remainder[i] & 0xffffff00u);
      }
    } else {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        out[i] = F::value(Stored(pair[i]));
        out[kLanes + i] = F::value(Stored(pair[i] >> 16));
      }
    }
  }
}

template <class F>
PRECOND_INLINE void encode_pairs(const float* __restrict x, [[maybe_unused]] const uint32_t* __restrict word,
                                 char* data, [[maybe_unused]] char* beside) {
  using Stored = typename F::Stored;
  if constexpr (sizeof(Stored) == 4) {
    Stored* __restrict out = reinterpret_cast<Stored*>(data);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      out[2 * i] = F::stored(x[i]);
      out[2 * i + 1] = F::stored(x[kLanes + i]);
    }
  } else {
    const auto draw = [word](int i) __attribute__((always_inline)) { return draws_of(0)(word[i]); };
    alignas(64) uint32_t pair[kLanes];
    if constexpr (F::kStoring == Storing::remainder) {
      alignas(64) uint32_t remainder[kLanes];
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        const auto first = F::split(x[i], draw(i)), second = F::split(x[kLanes + i], draw(kLanes + i));
        pair[i] = uint32_t(first.stored) | uint32_t(second.stored) << 16;
        remainder[i] = uint32_t(uint8_t(first.remainder)) | uint32_t(uint8_t(second.remainder)) << 8;
      }
      narrow<uint16_t>(remainder, beside);
    } else {
      static_assert(F::kStoring == Storing::drawn);
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t first = F::stored(x[i], draw(i)), second = F::stored(x[kLanes + i], draw(kLanes + i));
        pair[i] = first | second << 16;
      }
    }
    copy_lanes(pair, data);
  }
}

template <class F>
using CodePair = std::conditional_t<F::kCodeBits == 8, uint16_t, uint8_t>;

template <class F>
PRECOND_INLINE void decode_code_pairs(const char* codes, float unit, float* __restrict out) {
  alignas(64) uint32_t pair[kLanes];
  widen<CodePair<F>>(codes, pair);
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    out[i] = F::template value<0>(pair[i], unit);
    out[kLanes + i] = F::template value<F::kCodeBits>(pair[i], unit);
  }
}

// Of a group that is finite; of another one, anything.
template <class F>
PRECOND_INLINE void encode_code_pairs(const float* __restrict x, float per_scale, const uint32_t* __restrict word,
                                      Draws draws, char* codes) {
  alignas(64) uint32_t pair[kLanes];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t first = F::raised_code(x[i], per_scale, draws.placed(word[i]));
    const uint32_t second = F::raised_code(x[kLanes + i], per_scale, draws.placed(word[kLanes + i]));
    pair[i] = first >> 24 | (second >> (24 - F::kCodeBits) & F::kAll << F::kCodeBits);
  }
  narrow<CodePair<F>>(pair, codes);
}

// The words of a block, which begins with a run, from the hashes of its runs. Reads kLanes of them.
PRECOND_INLINE void fill_words(const uint32_t* hashes, uint32_t* word) {
  [[maybe_unused]] Lanes run;
  Lanes odds[2];
  for (int i = 0; i < kLanes; ++i) {
    run[i] = uint32_t(2 * i / kRun);
    odds[0][i] = odd(2 * i % kRun);
    odds[1][i] = odd(2 * i % kRun + 1);
  }
#if defined(__AVX512F__)
  const Lanes hash = Lanes(_mm512_permutexvar_epi32(__m512i(run), _mm512_loadu_si512(hashes)));
#elif defined(__AVX2__)
  const __m256i of_runs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(hashes));
  const Lanes hash = Lanes(_mm256_permutevar8x32_epi32(of_runs, __m256i(run)));
#else
  static_assert(kBlock == kRun);
  const uint32_t hash = hashes[0];
#endif
  const Lanes first = hash * odds[0], second = hash * odds[1];
  copy_lanes(&first, word);
  copy_lanes(&second, word + kLanes);
}

// Whether a rule's new states and its step can be had one after the other.
template <class Rule, class = void>
constexpr bool kInTwo = false;
template <class Rule>
constexpr bool kInTwo<Rule, std::void_t<decltype(&Rule::update_moments)>> = Rule::kStates == 2;

// The two parts, as apply_tile is the whole.
template <class Rule>
PRECOND_INLINE void update_tile_moments(const Rule rule, float coef, int64_t n, const float* __restrict p,
                                        const float* __restrict g, float* __restrict m, float* __restrict v) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float m_value = m[i], v_value = v[i];
    rule.update_moments(p[i], coef * g[i], m_value, v_value);
    m[i] = m_value;
    v[i] = v_value;
  }
}
template <class Rule>
PRECOND_INLINE void step_tile(const Rule rule, int64_t n, float* __restrict p, const float* __restrict m,
                              const float* __restrict v) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] = stepped(rule, p[i], rule.step(m[i], v[i]));
}

// Whole groups of a dense tensor. Returns how many elements it has done. A tile's states come first, since their codes
// need their groups' largest. Then steps, weights and codes: while the divider makes the steps, the rest makes codes.
// In one loop and in two, ns per element in cache: split24 + int8 0.91 -> 0.82, stochastic + int8 0.80 -> 0.75.
template <class P, class G, class... S, class Rule, int... K>
PRECOND_INLINE int64_t update_coded(const ChunkArgs& a, const Rule& rule_of_chunk, float coef,
                                    std::integer_sequence<int, K...>) {
  // Copies, which nothing that is written can change.
  const Tensor t = *a.tensor;
  const Rule rule = rule_of_chunk;
  const Seed seed = seed_in(a.scalars);
  const int64_t elements = groups_of(a.count) * kGroup, end = a.begin + elements;
  // Weights whose decoding costs more than the way through memory are kept as values between the two loops.
  constexpr bool kKeeps = !kInTwo<Rule> || P::kStoring == Storing::remainder;
  Tile p, s[sizeof...(K)];
  uint32_t hashes[kTile / kRun + kLanes] = {};
  uint32_t tops[sizeof...(K)][kTileGroups] = {};
  Groups found[sizeof...(K)];
  const auto weights_at = [&t](int64_t at) { return t.p.data + at * int64_t(sizeof(typename P::Stored)); };
  const auto beside_at = [&t](int64_t at) { return P::kStoring == Storing::remainder ? t.p.beside + at : nullptr; };
  for (int64_t begin = a.begin; begin < end; begin += kTile) {
    const int64_t n = end - begin < kTile ? end - begin : kTile;
    fill_hashes(seed, uint64_t(t.place.begin + begin) / kRun, n / kRun, hashes);
    for (int64_t first = 0; first < n; first += kGroup) {
      alignas(64) float g[kGroup], seen[kGroup];
      float* const weights = kKeeps ? p.value + first : seen;
      const int64_t group = groups_of(begin + first);
      const float units[] = {S::unit(reinterpret_cast<const uint16_t*>(t.state[K].beside)[group])...};
#pragma GCC unroll 8
      for (int64_t i = 0; i < kGroup; i += kBlock) {
        const int64_t at = begin + first + i;
        decode_pairs<P>(weights_at(at), beside_at(at), weights + i);
        decode_pairs<G>(t.g.data + at * int64_t(sizeof(typename G::Stored)), nullptr, g + i);
        (decode_code_pairs<S>(t.state[K].data + bytes_of(at, S::kCodeBits), units[K], s[K].value + first + i), ...);
      }
      if constexpr (kInTwo<Rule>)
        update_tile_moments(rule, coef, kGroup, weights, g, (s[K].value + first)...);
      else
        apply_tile(rule, coef, kGroup, weights, g, (s[K].value + first)...);
      ((tops[K][groups_of(first)] = top_of(s[K].value + first)), ...);
    }
    (find_groups<S>(tops[K], found[K]), ...);
    (std::memcpy(t.state[K].beside + groups_of(begin) * 2, found[K].scale, size_t(groups_of(n)) * 2), ...);
    for (int64_t first = 0; first < n; first += kGroup) {
#pragma GCC unroll 8
      for (int64_t i = first; i < first + kGroup; i += kBlock) {
        const int64_t at = begin + i;
        alignas(64) uint32_t word[kBlock];
        fill_words(hashes + i / kRun, word);
        if constexpr (!kKeeps) decode_pairs<P>(weights_at(at), beside_at(at), p.value + i);
        if constexpr (kInTwo<Rule>) step_tile(rule, kBlock, p.value + i, (s[K].value + i)...);
        encode_pairs<P>(p.value + i, word, weights_at(at), beside_at(at));
        (encode_code_pairs<S>(s[K].value + i, found[K].per_scale[groups_of(first)], word, draws_of(1 + K),
                              t.state[K].data + bytes_of(at, S::kCodeBits)),
         ...);
      }
      // Of a group with a number that is not finite all codes are 0.
      const auto clear = [at = begin + first](const Operand& state, int bits, uint32_t mask) {
        if (mask == 0) std::memset(state.data + bytes_of(at, bits), 0, size_t(bytes_of(kGroup, bits)));
      };
      (clear(t.state[K], S::kCodeBits, found[K].mask[groups_of(first)]), ...);
      // Of the next tile, a group's at a time: more at once would wait for each other.
      const int64_t next = begin + n + first;
      if (next < end) {
        prefetch(t.p, next, kGroup, end);
        prefetch(t.g, next, kGroup, end);
        (prefetch(t.state[K], next, kGroup, end), ...);
      }
    }
  }
  return elements;
}

// The elements that update_coded has done, at the beginning of a chunk.
template <class Rule, int... K>
PRECOND_INLINE int64_t update_often(const ChunkArgs& a, const Rule& rule, Incoming incoming,
                                    std::integer_sequence<int, K...> states) {
  const Tensor& t = *a.tensor;
  if (incoming.clip_value != HUGE_VALF || t.place.row != 0 || t.place.begin % kRun != 0) return 0;
  int64_t done = 0;
  const auto attempt = [&](auto p, auto g, auto mean, auto square) __attribute__((always_inline)) {
    using P = decltype(p);
    using G = decltype(g);
    using Mean = decltype(mean);
    using Square = decltype(square);
    const auto takes = [](const Operand& operand, Format format) __attribute__((always_inline)) {
      return operand.strides == kDense && operand.format == format;
    };
    if (takes(t.p, format_of<P>()) && takes(t.g, format_of<G>()) &&
        (takes(t.state[K], format_of<state_format<Rule, K, Mean, Square>>()) && ...))
      done = update_coded<P, G, state_format<Rule, K, Mean, Square>...>(a, rule, incoming.coef, states);
  };
#define PRECOND_ATTEMPT(P, G, Mean, Square) attempt(P{}, G{}, Mean{}, Square{});
  PRECOND_OFTEN_CODED(PRECOND_ATTEMPT)
#undef PRECOND_ATTEMPT
  return done;
}

}  // namespace PRECOND_ISA
}  // namespace precond
