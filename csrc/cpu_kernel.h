// The CPU update of one chunk: load a tile, apply the rule, store the tile. Included once per instruction set by
// cpu_isa.cpp; no STL containers here, so that no symbol is shared between instruction sets.
#pragma once

#include "plan.h"

namespace precond {

// What a chunk's update needs. One function per rule and instruction set.
struct ChunkArgs {
  const Tensor* tensor;
  const Strides* strides;
  const float* row;
  const Control* control;
  float sign;
  int64_t begin, count;
};
using UpdateChunk = void (*)(const ChunkArgs&);

inline namespace PRECOND_ISA {

// Elements of a tile: the fp32 copies of five operands then take 10 KB of L1. 256 and 1024 time alike.
constexpr int64_t kTile = 512;

struct alignas(64) Tile {
  float value[kTile];
};

// The operand's values as dense fp32, in the tile. Not inlined: five operands times formats times strides in every rule
// made 60 KB of code each, and a call per tile costs nothing.
__attribute__((noinline)) inline void load(const Operand& operand, const Strides* strides, int64_t begin, int64_t n,
                                           Tile& tile) {
  with_format(operand.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    Stored* data = reinterpret_cast<Stored*>(operand.data);
    if (operand.strides == kDense) {
      decode(format, data + begin, n, tile.value);
    } else {
      Stored gathered[kTile];
      copy_strided<true>(strides[operand.strides], data, begin, n, gathered);
      decode(format, gathered, n, tile.value);
    }
  });
}

__attribute__((noinline)) inline void store(const Operand& operand, const Strides* strides, int64_t begin, int64_t n,
                                            const Tile& tile) {
  with_format(operand.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    Stored* data = reinterpret_cast<Stored*>(operand.data);
    const auto prepared = prepare(format, tile.value, n);
    if (operand.strides == kDense) {
      encode(format, tile.value, n, prepared, data + begin);
    } else {
      Stored encoded[kTile];
      encode(format, tile.value, n, prepared, encoded);
      copy_strided<false>(strides[operand.strides], data, begin, n, encoded);
    }
  });
}

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

// True where every operand of the tensor is dense and in p's format.
template <int kStates>
PRECOND_INLINE bool is_uniform(const Tensor& t) {
  bool uniform = t.p.strides == kDense && t.g.strides == kDense && t.g.format == t.p.format;
  for (int k = 0; k < kStates; ++k)
    uniform = uniform && t.state[k].strides == kDense && t.state[k].format == t.p.format;
  return uniform;
}

template <class Rule, int... I>
PRECOND_INLINE void update_uniform(const ChunkArgs& a, const Rule& rule, float coef, std::integer_sequence<int, I...>) {
  with_format(a.tensor->p.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    const auto at = [&](const Operand& operand) { return reinterpret_cast<Stored*>(operand.data) + a.begin; };
    apply(format, rule, coef, a.count, at(a.tensor->p), at(a.tensor->g), at(a.tensor->state[I])...);
  });
}

// Through tiles of fp32, so that work grows as rules + formats, not as their product.
template <class Rule, int... I>
PRECOND_INLINE void update_tiled(const ChunkArgs& a, const Rule& rule, float coef, std::integer_sequence<int, I...>) {
  const Tensor& t = *a.tensor;
  Tile p, g, s[sizeof...(I) + 1];
  for (int64_t begin = a.begin, end = a.begin + a.count; begin < end; begin += kTile) {
    const int64_t n = end - begin < kTile ? end - begin : kTile;
    load(t.p, a.strides, begin, n, p);
    load(t.g, a.strides, begin, n, g);
    (load(t.state[I], a.strides, begin, n, s[I]), ...);

    apply(Fp32{}, rule, coef, n, p.value, g.value, s[I].value...);

    store(t.p, a.strides, begin, n, p);
    (store(t.state[I], a.strides, begin, n, s[I]), ...);
  }
}

template <class Rule>
void update_chunk(const ChunkArgs& a) {
  if (a.control->skip != 0.0f) return;
  Rule rule;
  std::memcpy(&rule, a.row, sizeof rule);
  // Multiplying by 1 changes no bit, so there is no case without a coefficient.
  const float coef = a.sign * a.control->grad_coef;
  const auto states = std::make_integer_sequence<int, Rule::kStates>{};
  if (is_uniform<Rule::kStates>(*a.tensor))
    update_uniform(a, rule, coef, states);
  else
    update_tiled(a, rule, coef, states);
}

}  // namespace PRECOND_ISA
}  // namespace precond
