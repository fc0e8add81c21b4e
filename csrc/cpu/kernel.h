// The CPU update of one chunk by one rule: load, rule, store. Included by family_isa.cpp, which is compiled once per
// family and instruction set; no STL containers here, so that no symbol is shared between instruction sets.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/coded.h"
#include "cpu/statistics.h"
#include "cpu/tile.h"
#include "cpu/update.h"
#include "rules/rule.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace precond {

inline namespace PRECOND_ISA {

// The formats of p, of g and of all states, known when compiled.
template <class P, class G, class S>
struct Formats {};

// Element by element in one loop, straight from and to memory: nothing waits for a divider that works on another tile.
// 32M bf16 AdamW, 2 threads, AVX-512: 9.7 ms through tiles, 7.8 ms so.
template <class Rule, class P, class G, class S, class... States>
PRECOND_INLINE void apply(Formats<P, G, S>, const Rule rule, float coef, int64_t n, typename P::Stored* __restrict p,
                          const typename G::Stored* __restrict g, States* __restrict... s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float p_value = P::value(p[i]);
    [&](auto... s_value) __attribute__((always_inline)) {
      update(rule, p_value, coef * G::value(g[i]), s_value...);
      ((s[i] = S::stored(s_value)), ...);
    }(S::value(s[i])...);
    p[i] = P::stored(p_value);
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
        update(rule, p_value, coef * g_block.value[j], s_value...);
        ((s_block[K].value[j] = one_nan(s_value)), ...);
      }(float(s_block[K].value[j])...);
      p_block.value[j] = one_nan(p_value);
    }
    encode_block(p_block.value, p + i);
    (encode_block(s_block[K].value, s[K] + i), ...);
  }
}

template <class Rule, class... States>
PRECOND_INLINE void apply(Formats<Fp16, Fp16, Fp16> formats, const Rule rule, float coef, int64_t n,
                          uint16_t* __restrict p, const uint16_t* __restrict g, States* __restrict... s) {
  uint16_t* const states[sizeof...(s) + 1] = {s...};
  apply_halves(rule, coef, n, p, g, states, std::make_integer_sequence<int, sizeof...(s)>{});
  const int64_t done = n / kHalves * kHalves;
  apply<Rule, Fp16, Fp16, Fp16, States...>(formats, rule, coef, n - done, p + done, g + done, (s + done)...);
}
#endif

// The same for a rule that writes p without reading it: its lines are fetched ahead, or each store waits for its own.
// 32M elements, one thread of a Xeon with AVX-512, ns each: all in fp32 2.6 -> 1.0, all in bf16 0.78 -> 0.59.
template <class Rule, class P, class G, class S, class... States>
PRECOND_INLINE void overwrite(Formats<P, G, S> formats, const Rule rule, float coef, int64_t n,
                              typename P::Stored* __restrict p, const typename G::Stored* __restrict g,
                              States* __restrict... s) {
  constexpr int64_t kStretch = 64, kLine = 64, kAhead = 512;
  int64_t i = 0;
  for (; i + kStretch <= n; i += kStretch) {
    const char* const ahead = reinterpret_cast<const char*>(p + i) + kAhead;
    for (int64_t k = 0; k < kStretch * int64_t(sizeof *p); k += kLine) __builtin_prefetch(ahead + k, 1);
    apply(formats, rule, coef, kStretch, p + i, g + i, (s + i)...);
  }
  apply(formats, rule, coef, n - i, p + i, g + i, (s + i)...);
}

// True where every operand of the tensor is dense and in the format given for it.
template <int kStates>
PRECOND_INLINE bool is_dense_in(const Tensor& t, Format p, Format g, Format states) {
  bool in = t.p.strides == kDense && t.g.strides == kDense && t.p.format == p && t.g.format == g;
  for (int k = 0; k < kStates; ++k) in = in && t.state[k].strides == kDense && t.state[k].format == states;
  return in;
}

// A tensor that is dense in these formats.
template <class P, class G, class S, class Rule, int... K>
PRECOND_INLINE void update_dense(const ChunkArgs& a, const Rule& rule, float coef, std::integer_sequence<int, K...>) {
  const Tensor& t = *a.tensor;
  auto* const p = reinterpret_cast<typename P::Stored*>(t.p.data) + a.begin;
  const auto* const g = reinterpret_cast<const typename G::Stored*>(t.g.data) + a.begin;
  const auto state = [&](int k) { return reinterpret_cast<typename S::Stored*>(t.state[k].data) + a.begin; };
  if constexpr (kOverwrites<Rule>)
    overwrite(Formats<P, G, S>{}, rule, coef, a.count, p, g, state(K)...);
  else
    apply(Formats<P, G, S>{}, rule, coef, a.count, p, g, state(K)...);
}

// What tiles read and write of a tensor, from element `begin` on.
struct Stretch {
  const ChunkArgs& chunk;
  int64_t begin, n, end;  // end: of the chunk
};
// The next one: elements that draw from one row of the unsharded tensor.
PRECOND_INLINE Stretch next_stretch(const ChunkArgs& a, Seed seed, int64_t begin, int64_t limit, RandomTile& random) {
  const Tensor& t = *a.tensor;
  int64_t n = limit - begin < kTile ? limit - begin : kTile;
  if (t.draws) {
    const int64_t in_row = t.place.left_in_row(begin);
    n = n < in_row ? n : in_row;
    fill_random(seed, uint64_t(t.place.index(begin)), n, random);
  }
  return {a, begin, n, a.begin + a.count};
}
PRECOND_INLINE void load(const Stretch& at, const Operand& operand, Tile& tile) {
  load(operand, at.chunk.strides, at.begin, at.n, tile);
}
PRECOND_INLINE void prefetch_next(const Stretch& at, const Operand& operand) {
  prefetch(operand, at.begin + at.n, kTile, at.end);
}
PRECOND_INLINE void store(const Stretch& at, const Operand& operand, Tile& tile, const RandomTile& random, int number) {
  store(operand, at.chunk.strides, at.begin, at.n, tile, random, draws_of(number));
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
    const Stretch at = next_stretch(a, seed, begin, end, random);
    load(at, t.p, p);
    load(at, t.g, g);
    (load(at, t.state[K], s[K]), ...);
    prefetch_next(at, t.p);
    prefetch_next(at, t.g);
    (prefetch_next(at, t.state[K]), ...);

    if (clamps) clamp_tile(incoming, at.n, g);
    apply_tile(rule, coef, at.n, p.value, g.value, s[K].value...);

    store(at, t.p, p, random, 0);
    (store(at, t.state[K], s[K], random, 1 + K), ...);
    begin += at.n;
  }
}

// One tile of a rule with parts, which leaves p as it is, and what the statistics see of it.
template <class Rule, class... States>
PRECOND_INLINE void apply_measured(const Rule rule, float coef, int64_t n, const float* __restrict p,
                                   const float* __restrict g, float* __restrict after, float* __restrict taken,
                                   States* __restrict... s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    [&](auto... s_value) __attribute__((always_inline)) {
      const Moved moved = rule(p[i], coef * g[i], s_value...);
      after[i] = moved.p;
      taken[i] = moved.taken;
      ((s[i] = s_value), ...);
    }(float(s[i])...);
  }
}

// With statistics: block by block, in tiles. Dense fp32 is read and written where it lies, but for the new p, and where
// nothing is updated the states. What is fetched ahead there delays it: 32M elements, ns each on one thread: 2.6
// -> 3.0. In one loop with the update the sums took as long: bench/NOTES.md, entry 21.
template <class Rule, int... K>
PRECOND_INLINE void update_measured(const ChunkArgs& a, Rule rule, Incoming incoming,
                                    std::integer_sequence<int, K...>) {
  if (a.only) rule.leave_out_decay();
  const Tensor& t = *a.tensor;
  const bool clamps = incoming.clip_value != HUGE_VALF;
  const float coef = clamps ? 1.0f : incoming.coef;
  const bool in_place = !clamps && is_dense_in<Rule::kStates>(t, Format::fp32, Format::fp32, Format::fp32);
  const Seed seed = t.draws ? seed_in(a.scalars) : Seed{0, 0};
  Tile p, g, after, taken;
  [[maybe_unused]] Tile s[sizeof...(K) + 1];
  RandomTile random;
  StatisticLanes lanes;
  const int64_t chunk_end = a.begin + a.count;
  for (int64_t block = a.begin; block < chunk_end; block += kNormBlock) {
    clear(lanes);
    const int64_t end = chunk_end - block < kNormBlock ? chunk_end : block + kNormBlock;
    for (int64_t begin = block; begin < end;) {
      const Stretch at = next_stretch(a, seed, begin, end, random);
      const auto values = [&](const Operand& operand, Tile& tile, bool there) {
        if (there) return reinterpret_cast<float*>(operand.data) + begin;
        load(at, operand, tile);
        if (!in_place) prefetch_next(at, operand);
        return tile.value;
      };
      float* const old_p = values(t.p, p, in_place);
      const float* const seen_g = values(t.g, g, in_place);
      if (clamps) clamp_tile(incoming, at.n, g);
      apply_measured(rule, coef, at.n, old_p, seen_g, after.value, taken.value,
                     values(t.state[K], s[K], in_place && !a.only)...);
      if (!in_place && !a.only) {
        store(at, t.p, after, random, 0);
        (store(at, t.state[K], s[K], random, 1 + K), ...);
        load(at, t.p, after);
      }
      add_statistics(lanes, begin - block, at.n, coef, seen_g, old_p, taken.value, a.only ? old_p : after.value);
      if (in_place && !a.only) std::memcpy(old_p, after.value, size_t(at.n) * sizeof(float));
      begin += at.n;
    }
    fold(lanes, a.statistics + (block - a.begin) / kNormBlock * kBlockStatistics);
  }
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
  if constexpr (kHasParts<Rule>)
    if (a.statistics != nullptr) return update_measured(a, rule, incoming, states);
  // Tensors that are clipped by value go through tiles.
  if (incoming.clip_value == HUGE_VALF) {
    const Format format = a.tensor->p.format;
    if constexpr (kHasParts<Rule>) {
      // An average of 16 bits is drawn: no other format is that of all operands.
      if (is_dense_in<Rule::kStates>(*a.tensor, Format::fp32, Format::fp32, Format::fp32))
        return update_dense<Fp32, Fp32, Fp32>(a, rule, incoming.coef, states);
    } else if (is_plain(format) && is_dense_in<Rule::kStates>(*a.tensor, format, format, format)) {
      return with_plain_format(format, [&](auto of_all) {
        using F = decltype(of_all);
        update_dense<F, F, F>(a, rule, incoming.coef, states);
      });
    }
    // As there, ns each, through tiles and so: an average in bf16 1.30 -> 0.90, a step along bf16 0.69 -> 0.56.
    if constexpr (kOftenMixed<Rule>) {
      if (is_dense_in<Rule::kStates>(*a.tensor, Format::bf16, Format::fp32, Format::fp32))
        return update_dense<Bf16, Fp32, Fp32>(a, rule, incoming.coef, states);
      if (is_dense_in<Rule::kStates>(*a.tensor, Format::fp32, Format::bf16, Format::fp32))
        return update_dense<Fp32, Bf16, Fp32>(a, rule, incoming.coef, states);
    }
  }
  // 32M bf16 with states in fp32, through tiles and so: 36.7 -> 19.6 ms on two threads of a Xeon, and DeepSpeed
  // takes 23.5.
  if constexpr (kOften<Rule>) {
    if (incoming.clip_value == HUGE_VALF &&
        is_dense_in<Rule::kStates>(*a.tensor, Format::bf16, Format::bf16, Format::fp32))
      return update_dense<Bf16, Bf16, Fp32>(a, rule, incoming.coef, states);
    const int64_t done = update_often(a, rule, incoming, states);
    a.begin += done;
    a.count -= done;
    if (a.count == 0) return;
  }
  update_tiled(a, rule, incoming, states);
}

}  // namespace PRECOND_ISA
}  // namespace precond
