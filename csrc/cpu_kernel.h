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

PRECOND_INLINE bool is_direct(const Operand& operand) {
  return operand.format == Format::fp32 && operand.strides == kDense;
}

// The operand's values as dense fp32: in place where memory already holds that, else decoded into the tile.
PRECOND_INLINE float* load(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile) {
  if (is_direct(operand)) return reinterpret_cast<float*>(operand.data) + begin;
  with_format(operand.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    Stored* data = reinterpret_cast<Stored*>(operand.data);
    if (operand.strides == kDense) {
      format.decode(data + begin, n, tile.value);
    } else {
      Stored gathered[kTile];
      copy_strided<true>(strides[operand.strides], data, begin, n, gathered);
      format.decode(gathered, n, tile.value);
    }
  });
  return tile.value;
}

PRECOND_INLINE void store(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, const Tile& tile) {
  if (is_direct(operand)) return;
  with_format(operand.format, [&](auto format) {
    using Stored = typename decltype(format)::Stored;
    Stored* data = reinterpret_cast<Stored*>(operand.data);
    const auto prepared = format.prepare(tile.value, n);
    if (operand.strides == kDense) {
      format.encode(tile.value, n, prepared, data + begin);
    } else {
      Stored encoded[kTile];
      format.encode(tile.value, n, prepared, encoded);
      copy_strided<false>(strides[operand.strides], data, begin, n, encoded);
    }
  });
}

PRECOND_INLINE const float* scaled(const float* g, float coef, int64_t n, Tile& tile) {
  if (coef == 1.0f) return g;
  // g may already be the tile: an element-wise loop in place is fine.
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) tile.value[i] = coef * g[i];
  return tile.value;
}

// A state's pointer, for the parameter pack of apply().
template <int>
using StatePointer = float*;

template <class Rule, int... I>
PRECOND_INLINE void apply(const Rule& rule, int64_t n, float* p, const float* g, float* const* s,
                          std::integer_sequence<int, I...>) {
  [](const Rule r, int64_t count, float* __restrict pp, const float* __restrict gg,
     StatePointer<I> __restrict... ss) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) r(pp[i], gg[i], ss[i]...);
  }(rule, n, p, g, s[I]...);
}

template <class Rule>
void update_chunk(const ChunkArgs& a) {
  if (a.control->skip != 0.0f) return;
  constexpr int kStates = Rule::kStates;
  Rule rule;
  std::memcpy(&rule, a.row, sizeof rule);
  const Tensor& t = *a.tensor;
  const float coef = a.sign * a.control->grad_coef;

  bool direct = is_direct(t.p) && is_direct(t.g) && coef == 1.0f;
  for (int k = 0; k < kStates; ++k) direct = direct && is_direct(t.state[k]);
  const int64_t tile = direct ? a.count : kTile;

  Tile p_tile, g_tile, s_tile[kStates > 0 ? kStates : 1];
  const int64_t end = a.begin + a.count;
  for (int64_t i = a.begin; i < end; i += tile) {
    const int64_t n = end - i < tile ? end - i : tile;
    float* p = load(t.p, a.strides, i, n, p_tile);
    const float* g = scaled(load(t.g, a.strides, i, n, g_tile), coef, n, g_tile);
    float* s[kStates > 0 ? kStates : 1];
    for (int k = 0; k < kStates; ++k) s[k] = load(t.state[k], a.strides, i, n, s_tile[k]);

    apply(rule, n, p, g, s, std::make_integer_sequence<int, kStates>{});

    store(t.p, a.strides, i, n, p_tile);
    for (int k = 0; k < kStates; ++k) store(t.state[k], a.strides, i, n, s_tile[k]);
  }
}

}  // namespace PRECOND_ISA
}  // namespace precond
