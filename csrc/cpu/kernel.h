// The CPU update of one chunk by one rule: load, rule, store. Included by family_isa.cpp, which is compiled once per
// family and instruction set; no STL containers here, so that no symbol is shared between instruction sets.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/tile.h"
#include "cpu/update.h"
#include "rules/rule.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace precond {

inline namespace PRECOND_ISA {

// Element by element in one loop, straight from and to memory: nothing waits for a divider that works on another tile.
// 32M bf16 AdamW, 2 threads, AVX-512: 9.7 ms through tiles, 7.8 ms so.
template <class Rule, class Format, class... States>
PRECOND_INLINE void apply(Format, const Rule rule, float coef, int64_t n, typename Format::Stored* __restrict p,
                          const typename Format::Stored* __restrict g, States* __restrict... s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float p_value = Format::value(p[i]);
    [&](auto... s_value) __attribute__((always_inline)) {
      rule(p_value, coef * Format::value(g[i]), s_value...);
      ((s[i] = Format::stored(s_value)), ...);
    }(Format::value(s[i])...);
    p[i] = Format::stored(p_value);
  }
}

#if defined(__F16C__)
// As many fp16 as one vector of fp32 takes, converted by the instruction for that; it gives Fp16's bits once a NaN is
// the one that `stored` makes.
#if defined(__AVX512F__)
constexpr int kHalves = 16;
PRECOND_INLINE void decode_block(const uint16_t* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
PRECOND_INLINE void encode_block(const float* from, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
constexpr int kHalves = 8;
PRECOND_INLINE void decode_block(const uint16_t* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
PRECOND_INLINE void encode_block(const float* from, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
struct alignas(64) Block {
  float value[kHalves];
};

// Block by block: GCC 12 does not vectorise conversions of _Float16, and those in integers take twice torch's time.
template <class Rule, int... K>
PRECOND_INLINE void apply_halves(const Rule& rule, float coef, int64_t n, uint16_t* __restrict p,
                                 const uint16_t* __restrict g, uint16_t* const* s, std::integer_sequence<int, K...>) {
  const float nan = float_of(0x7fc00000u);
  const auto one_nan = [nan](float x) __attribute__((always_inline)) { return x != x ? nan : x; };
  for (int64_t i = 0; i + kHalves <= n; i += kHalves) {
    Block p_block, g_block, s_block[sizeof...(K) + 1];
    decode_block(p + i, p_block.value);
    decode_block(g + i, g_block.value);
    (decode_block(s[K] + i, s_block[K].value), ...);
#pragma omp simd
    for (int j = 0; j < kHalves; ++j) {
      float p_value = p_block.value[j];
      [&](auto... s_value) __attribute__((always_inline)) {
        rule(p_value, coef * g_block.value[j], s_value...);
        ((s_block[K].value[j] = one_nan(s_value)), ...);
      }(float(s_block[K].value[j])...);
      p_block.value[j] = one_nan(p_value);
    }
    encode_block(p_block.value, p + i);
    (encode_block(s_block[K].value, s[K] + i), ...);
  }
}

template <class Rule, class... States>
PRECOND_INLINE void apply(Fp16, const Rule rule, float coef, int64_t n, uint16_t* __restrict p,
                          const uint16_t* __restrict g, States* __restrict... s) {
  uint16_t* const states[sizeof...(s) + 1] = {s...};
  apply_halves(rule, coef, n, p, g, states, std::make_integer_sequence<int, sizeof...(s)>{});
  const int64_t done = n / kHalves * kHalves;
  apply<Rule, Fp16, States...>(Fp16{}, rule, coef, n - done, p + done, g + done, (s + done)...);
}
#endif

// True where every operand of the tensor is dense and in p's format, which is plain.
template <int kStates>
PRECOND_INLINE bool is_uniform(const Tensor& t) {
  bool uniform = t.p.strides == kDense && t.g.strides == kDense && is_plain(t.p.format) && t.g.format == t.p.format;
  for (int k = 0; k < kStates; ++k)
    uniform = uniform && t.state[k].strides == kDense && t.state[k].format == t.p.format;
  return uniform;
}

template <class Rule, int... I>
PRECOND_INLINE void update_uniform(const ChunkArgs& a, const Rule& rule, float coef, std::integer_sequence<int, I...>) {
  with_plain_format(a.tensor->p.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    const auto at = [&](const Operand& operand) { return reinterpret_cast<Stored*>(operand.data) + a.begin; };
    apply(format, rule, coef, a.count, at(a.tensor->p), at(a.tensor->g), at(a.tensor->state[I])...);
  });
}

// One tile.
template <class Rule, class... States>
PRECOND_INLINE void apply_tile(const Rule rule, float coef, int64_t n, float* __restrict p, const float* __restrict g,
                               States* __restrict... s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float p_value = p[i];
    [&](auto... s_value) __attribute__((always_inline)) {
      rule(p_value, coef * g[i], s_value...);
      ((s[i] = s_value), ...);
    }(float(s[i])...);
    p[i] = p_value;
  }
}

// The next tile's lines: the hardware's prefetchers start anew in each stretch of a tile, and memory would rest while a
// tile is decoded and encoded. 4M elements, ns each: split24 + int8 0.92 -> 0.86, split32 + fp32 1.38 -> 0.82.
PRECOND_INLINE void prefetch_tile(const Operand& operand, int64_t begin, int64_t end) {
  // Inlined, or GCC takes it for a function without effect and leaves it out.
  const auto prefetch = [begin, end](const char* data, int64_t bits) __attribute__((always_inline)) {
    const int64_t last = begin + kTile < end ? begin + kTile : end;
    for (const char* line = data + begin * bits / 8; line < data + last * bits / 8; line += 64)
      __builtin_prefetch(line, 1);
  };
  if (operand.strides == kDense) prefetch(operand.data, item_bits(operand.format));
  if (has_remainder(operand.format)) prefetch(operand.beside, remainder_bits(operand.format));
}

// Through tiles of fp32, so that work grows as rules + formats, not as their product.
template <class Rule, int... K>
PRECOND_INLINE void update_tiled(const ChunkArgs& a, const Rule& rule, Incoming incoming,
                                 std::integer_sequence<int, K...>) {
  const Tensor& t = *a.tensor;
  const bool clamps = incoming.clip_value != HUGE_VALF;
  const float coef = clamps ? 1.0f : incoming.coef;
  const Seed seed = t.draws ? seed_in(a.scalars) : Seed{0, 0};
  Tile p, g, s[sizeof...(K) + 1];
  RandomTile random;
  for (int64_t begin = a.begin, end = a.begin + a.count; begin < end;) {
    int64_t n = end - begin < kTile ? end - begin : kTile;
    if (t.draws) {
      const int64_t in_row = t.place.left_in_row(begin);
      n = n < in_row ? n : in_row;
      fill_random(seed, uint64_t(t.place.index(begin)), n, random);
    }
    load(t.p, a.strides, begin, n, p);
    load(t.g, a.strides, begin, n, g);
    (load(t.state[K], a.strides, begin, n, s[K]), ...);
    prefetch_tile(t.p, begin + n, end);
    prefetch_tile(t.g, begin + n, end);
    (prefetch_tile(t.state[K], begin + n, end), ...);

    if (clamps) clamp_tile(incoming, n, g);
    apply_tile(rule, coef, n, p.value, g.value, s[K].value...);

    store(t.p, a.strides, begin, n, p, random, draws_of(0));
    (store(t.state[K], a.strides, begin, n, s[K], random, draws_of(1 + K)), ...);
    begin += n;
  }
}

template <class P, class = void>
struct RemainderOf {
  using Type = char;
};
template <class P>
struct RemainderOf<P, std::void_t<typename P::Remainder>> {
  using Type = typename P::Remainder;
};

// A state's codes, each in a byte, and where its values go.
template <class F>
struct Decoding {
  const uint8_t* codes;
  float unit;
  float* out;
};

// A group of elements whose states have codes. The weights are stored, the new states are left as values.
template <class P, class G, class Rule, class... S>
PRECOND_INLINE void apply_group(const Rule rule, float coef, typename P::Stored* __restrict p, char* beside,
                                const typename G::Stored* __restrict g, const uint32_t* __restrict word,
                                const Decoding<S>... s) {
  using Remainder = typename RemainderOf<P>::Type;
  [[maybe_unused]] Remainder* __restrict remainder = reinterpret_cast<Remainder*>(beside);
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    float p_value;
    if constexpr (P::kStoring == Storing::remainder)
      p_value = P::value(p[i], remainder[i]);
    else
      p_value = P::value(p[i]);
    [&](auto... s_value) __attribute__((always_inline)) {
      rule(p_value, coef * G::value(g[i]), s_value...);
      ((s.out[i] = s_value), ...);
    }(S::value(s.codes[i], s.unit)...);
    if constexpr (P::kStoring == Storing::remainder) {
      const auto split = P::split(p_value, draws_of(0)(word[i]));
      p[i] = split.stored;
      remainder[i] = split.remainder;
    } else if constexpr (P::kStoring == Storing::drawn) {
      p[i] = P::stored(p_value, draws_of(0)(word[i]));
    } else {
      p[i] = P::stored(p_value);
    }
  }
}

// Whole groups of a dense tensor in formats that are known when compiled: in one loop, so that decoding and storing
// weights go on while the divider works. Returns how many elements it has done.
template <class P, class G, class Mean, class Square, class Rule, int... K>
PRECOND_INLINE int64_t update_coded(const ChunkArgs& a, const Rule& rule, float coef,
                                    std::integer_sequence<int, K...>) {
  const Tensor& t = *a.tensor;
  const Seed seed = seed_in(a.scalars);
  const int64_t groups = a.count / kGroup * kGroup, end = a.begin + groups;
  Tile s[sizeof...(K)];
  alignas(64) uint8_t bytes[sizeof...(K)][kTile];
  RandomTile random;
  for (int64_t begin = a.begin; begin < end; begin += kTile) {
    const int64_t n = end - begin < kTile ? end - begin : kTile;
    fill_random(seed, uint64_t(t.place.begin + begin), n, random);
    const uint8_t* const codes[] = {codes_of(t.state[K], begin, n, bytes[K])...};
    prefetch_tile(t.p, begin + n, end);
    prefetch_tile(t.g, begin + n, end);
    (prefetch_tile(t.state[K], begin + n, end), ...);
    for (int64_t i = 0; i < n; i += kGroup) {
      const int64_t at = begin + i;
      const auto scale = [at](const Operand& state) __attribute__((always_inline)) {
        return uint32_t(reinterpret_cast<const uint16_t*>(state.beside)[at / kGroup]);
      };
      apply_group<P, G>(
          rule, coef, reinterpret_cast<typename P::Stored*>(t.p.data) + at,
          t.p.beside + at * remainder_bits(t.p.format) / 8, reinterpret_cast<const typename G::Stored*>(t.g.data) + at,
          random.word + random.first + i,
          Decoding<state_format<Rule, K, Mean, Square>>{
              codes[K] + i, state_format<Rule, K, Mean, Square>::unit(scale(t.state[K])), s[K].value + i}...);
    }
    (encode_tile<state_format<Rule, K, Mean, Square>>(t.state[K], begin, n, s[K], random.word + random.first,
                                                      draws_of(1 + K)),
     ...);
  }
  return groups;
}

// The elements that update_coded has done, at the beginning of a chunk.
template <class Rule, int... K>
PRECOND_INLINE int64_t update_often(const ChunkArgs& a, const Rule& rule, Incoming incoming,
                                    std::integer_sequence<int, K...> states) {
  const Tensor& t = *a.tensor;
  if (incoming.clip_value != HUGE_VALF || t.place.row != 0) return 0;
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
      done = update_coded<P, G, Mean, Square>(a, rule, incoming.coef, states);
  };
#define PRECOND_ATTEMPT(P, G, Mean, Square) attempt(P{}, G{}, Mean{}, Square{});
  PRECOND_OFTEN_CODED(PRECOND_ATTEMPT)
#undef PRECOND_ATTEMPT
  return done;
}

template <class Rule>
void update_chunk(const ChunkArgs& chunk) {
  ChunkArgs a = chunk;
  if (a.control->skip != 0.0f) return;
  Rule rule;
  std::memcpy(&rule, a.scalars, sizeof rule);
  // Multiplying by 1 changes no bit, so there is no case without a coefficient.
  const Incoming incoming{a.sign * a.control->grad_coef, a.control->clip_value};
  const auto states = std::make_integer_sequence<int, Rule::kStates>{};
  // Uniform tensors that are clipped by value go through tiles too.
  if (is_uniform<Rule::kStates>(*a.tensor) && incoming.clip_value == HUGE_VALF)
    return update_uniform(a, rule, incoming.coef, states);
  if constexpr (kOften<Rule>) {
    const int64_t done = update_often(a, rule, incoming, states);
    a.begin += done;
    a.count -= done;
    if (a.count == 0) return;
  }
  update_tiled(a, rule, incoming, states);
}

}  // namespace PRECOND_ISA
}  // namespace precond
