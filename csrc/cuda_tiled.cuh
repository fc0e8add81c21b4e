// The CUDA update of tensors with formats that do not stand alone: codes, remainders, stochastic rounding, in any mix
// and layout. One kernel per rule; formats are chosen per tensor at run time, so that work grows as rules + formats,
// not as their product. Load, rule, store, as update_tiled in cpu_kernel.h.
#pragma once

#include <utility>

#include "cuda_formats.cuh"

namespace precond {
inline namespace PRECOND_ISA {

// 128 registers.
constexpr int kTiledBlocksPerSm = 2;

// The formats of a tensor; or fixed ones and full runs, from which bench/codegen.py counts what one path takes.
struct FormatsOfTensor {
  static constexpr bool kFull = false;
  const DeviceTensor& t;
  __device__ __forceinline__ Format of(int operand) const { return t.operand[operand].format; }
};
template <Format... kOf>
struct FixedFormats {
  static constexpr bool kFull = true;
  const DeviceTensor& t;
  __device__ __forceinline__ Format of(int operand) const {
    constexpr Format formats[] = {kOf...};
    return formats[operand];
  }
};

template <class Rule, class Formats, int... K>
__device__ __forceinline__ void update_tiled(const Rule& rule, const DeviceTensor& t, const Strides* strides, Seed seed,
                                             float coef, Range range, std::integer_sequence<int, K...>) {
  const Formats formats{t};
  const Format p_format = formats.of(0), g_format = formats.of(1);
  const Format s_format[Rule::kStates + 1] = {formats.of(2 + K)...};
  const auto items = [&](int operand, Format format) {
    return items_of<Formats::kFull>(t.operand[operand].data, item_bits(format), t.operand[operand].strides, strides);
  };
  const Items p_items = items(0, p_format), g_items = items(1, g_format);
  const Items p_beside = items_of<Formats::kFull>(t.operand[0].beside, remainder_bits(p_format), kDense, strides);
  [[maybe_unused]] const Items s_items[Rule::kStates + 1] = {items(2 + K, s_format[K])...};
  [[maybe_unused]] uint16_t* const s_scales[Rule::kStates + 1] = {
      reinterpret_cast<uint16_t*>(t.operand[2 + K].beside)...};
  const bool draws = t.draws != 0;

  // No lane leaves early: lanes of a group meet in encode_state.
#pragma unroll 1
  for (int64_t begin = range.begin; begin < range.end; begin += int64_t(kThreads) * kRun) {
    const int64_t i = begin + int64_t(threadIdx.x) * kRun, left = range.end - i;
    const int count = Formats::kFull || left >= kRun ? kRun : left > 0 ? int(left) : 0;
    const bool first_of_group = threadIdx.x % kGroupLanes == 0 && count > 0;

    const Words p_words = fetch<32>(p_items, i, count), p_remainder = fetch<16>(p_beside, i, count);
    const Words g_words = fetch<32>(g_items, i, count);
    [[maybe_unused]] const Words s_words[Rule::kStates + 1] = {fetch<32>(s_items[K], i, count)...};
    [[maybe_unused]] uint32_t scale[Rule::kStates + 1] = {
        (is_coded(s_format[K]) && count > 0 ? uint32_t(s_scales[K][i / kGroup]) : 0u)...};

    float p[kRun] = {}, g[kRun] = {};
    [[maybe_unused]] float s[Rule::kStates + 1][kRun] = {};
    decode_weight(p_format, p_words, p_remainder, p);
    decode_gradient(g_format, g_words, g);
    (decode_state(s_format[K], s_words[K], scale[K], s[K]), ...);

#pragma unroll
    for (int k = 0; k < kRun; ++k) rule(p[k], coef * g[k], s[K][k]...);

    uint32_t random[kRun] = {};
    if (draws) fill_random(seed, t.place, i, random);
    Words beside = {};
    put<32>(p_items, i, count, encode_weight(p_format, p, random, beside));
    put<16>(p_beside, i, count, beside);
    (put<32>(s_items[K], i, count, encode_state(s_format[K], s[K], count, random, 1 + K, scale[K])), ...);
    ((is_coded(s_format[K]) && first_of_group ? void(s_scales[K][i / kGroup] = uint16_t(scale[K])) : void()), ...);
  }
}

template <class Rule, class Formats>
__global__ void __launch_bounds__(kThreads, kTiledBlocksPerSm)
    update_tiled_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const Strides* strides,
                        const float* rows, const Control* control) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  const Seed seed = seed_in(rows + int64_t(t.row) * kRowFloats);
  update_tiled<Rule, Formats>(rule_of<Rule>(t, rows), t, strides, seed, t.sign * control->grad_coef, range_of(chunk, t),
                              std::make_integer_sequence<int, Rule::kStates>{});
}

}  // namespace PRECOND_ISA
}  // namespace precond
