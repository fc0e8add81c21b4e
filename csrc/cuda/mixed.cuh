// The CUDA update of tensors whose formats have no kernel of their own: codes, remainders, stochastic rounding, rare
// mixes, in any layout. One kernel per rule; formats are chosen per tensor at run time, so that work grows as rules +
// formats, not as their product. Load, rule, store, as update_tiled in cpu/kernel.h.
#pragma once

#include <utility>

#include "cuda/formats.cuh"
#include "cuda/statistics.cuh"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

// 128 registers.
constexpr int kMixedBlocksPerSm = 2;

// Lets the compiler forget what it has read of a tensor: addresses of five operands, kept in registers, made rules with
// three states spill up to 224 bytes. Reading them again takes an access to the first cache for eight elements.
__device__ __forceinline__ void read_again() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

template <class Rule>
__device__ __forceinline__ void decode_state_for(Format format, const Words& words, uint32_t scale, float* x) {
  if constexpr (kHasParts<Rule>) {
    const Run run = decode_state_apart(format, words, scale);
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] = run.x[k];
  } else {
    decode_state(format, words, scale, x);
  }
}
template <class Rule>
__device__ __forceinline__ Words encode_state_for(Format format, const float* values, int count, const uint32_t* word,
                                                  int number, uint32_t& scale) {
  if constexpr (kHasParts<Rule>) {
    Run run;
    Words random;
#pragma unroll
    for (int k = 0; k < kRun; ++k) run.x[k] = values[k], random.word[k] = word[k];
    const Encoded encoded = encode_state_apart(format, run, count, random, number, scale);
    scale = encoded.scale;
    return encoded.words;
  } else {
    return encode_state(format, values, count, word, number, scale);
  }
}

// shared: where statistics are taken, of rules with parts; null: nowhere. only: nothing is updated.
template <class Rule, int... K>
__device__ __forceinline__ void update_mixed(const DeviceTensor& t, const Strides* strides, const float* scalars,
                                             Incoming incoming, Range range, [[maybe_unused]] SharedStatistics* shared,
                                             bool only, std::integer_sequence<int, K...>) {
  const auto format = [&](int operand) { return t.operand[operand].format; };
  const auto items = [&](int operand) {
    // A rule with parts may have no average: an operand of no bits is neither read nor written.
    const bool there = !kHasParts<Rule> || t.operand[operand].data != nullptr;
    return items_of(t.operand[operand].data, there ? item_bits(format(operand)) : 0, t.operand[operand].strides,
                    strides);
  };
  const auto beside = [&](int operand) {
    return items_of(t.operand[operand].beside, remainder_bits(format(operand)), kDense, strides);
  };
  [[maybe_unused]] const auto scale_of = [&](int operand, int64_t i) -> uint16_t& {
    return reinterpret_cast<uint16_t*>(t.operand[operand].beside)[i / kGroup];
  };

  // No lane leaves early: lanes of a group meet in encode_state.
#pragma unroll 1
  for (int64_t begin = range.begin; begin < range.end; begin += int64_t(kThreads) * kRun) {
    const int64_t i = begin + int64_t(threadIdx.x) * kRun, left = range.end - i;
    const int count = left >= kRun ? kRun : left > 0 ? int(left) : 0;
    [[maybe_unused]] const bool first_of_group = threadIdx.x % kGroupLanes == 0 && count > 0;

    read_again();
    const Words p_words = fetch<32>(items(0), i, count), p_remainder = fetch<16>(beside(0), i, count);
    const Words g_words = fetch<32>(items(1), i, count);
    [[maybe_unused]] const Words s_words[Rule::kStates + 1] = {fetch<32>(items(2 + K), i, count)...};
    [[maybe_unused]] uint32_t scale[Rule::kStates + 1] = {
        (is_coded(format(2 + K)) && count > 0 ? uint32_t(scale_of(2 + K, i)) : 0u)...};

    float p[kRun] = {}, g[kRun] = {};
    [[maybe_unused]] float s[Rule::kStates + 1][kRun] = {};
    decode_weight(format(0), p_words, p_remainder, p);
    decode_gradient(format(1), g_words, g);
    (decode_state_for<Rule>(format(2 + K), s_words[K], scale[K], s[K]), ...);

    Rule rule = rule_of<Rule>(t, scalars);
    if constexpr (kHasParts<Rule>) {
      if (only) rule.leave_out_decay();
      float taken[kRun];
      if (shared != nullptr) {
        note(shared, kSeenBefore, p, count);
        if (only) note(shared, kSeenAfter, p, count);
      }
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        g[k] = incoming(g[k]);
        const Moved moved = rule(p[k], g[k], s[K][k]...);
        p[k] = moved.p;
        taken[k] = moved.taken;
      }
      if (shared != nullptr) {
        note(shared, kSeenGrad, g, count);
        note(shared, kSeenTaken, taken, count);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k) update(rule, p[k], incoming(g[k]), s[K][k]...);
    }

    read_again();
    uint32_t random[kRun] = {};
    if (t.draws != 0) fill_random(seed_in(scalars + int64_t(t.scalars) * kScalarFloats), t.place, i, random);
    Words remainder = {};
    const Words stored = encode_weight(format(0), p, random, remainder);
    if constexpr (kHasParts<Rule>) {
      if (shared != nullptr) {
        if (!only) {
          decode_weight(format(0), stored, remainder, p);
          note(shared, kSeenAfter, p, count);
        }
        add_noted(shared);
      }
      if (only) continue;
    }
    put<32>(items(0), i, count, stored);
    put<16>(beside(0), i, count, remainder);
    (put<32>(items(2 + K), i, count, encode_state_for<Rule>(format(2 + K), s[K], count, random, 1 + K, scale[K])), ...);
    ((is_coded(format(2 + K)) && first_of_group ? void(scale_of(2 + K, i) = uint16_t(scale[K])) : void()), ...);
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kMixedBlocksPerSm)
    update_mixed_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const Strides* strides,
                        const float* scalars, const Control* control) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  update_mixed<Rule>(t, strides, scalars, {t.sign * control->grad_coef, control->clip_value}, range_of(chunk, t),
                     nullptr, false, std::make_integer_sequence<int, Rule::kStates>{});
}

// The same for a rule with parts, and its statistics.
template <class Rule>
__global__ void __launch_bounds__(kThreads, kMixedBlocksPerSm)
    update_parts_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const Strides* strides,
                        const float* scalars, const Control* control, const Noting* noting) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  const Range range = range_of(chunk, t);
  const Noting now = noting == nullptr ? Noting{nullptr, nullptr, 0} : *noting;
  const bool notes = now.table != nullptr && range.begin < range.end;
  SharedStatistics* const shared = notes ? shared_statistics() : nullptr;
  if (notes) clear(shared);
  update_mixed<Rule>(t, strides, scalars, {t.sign * control->grad_coef, control->clip_value}, range, shared,
                     now.only != 0, std::make_integer_sequence<int, Rule::kStates>{});
  if (notes) fold(shared, now.table + (now.first[chunk.tensor] + chunk.begin / kNormBlock) * int64_t(kBlockStatistics));
}

}  // namespace PRECOND_ISA
}  // namespace precond
