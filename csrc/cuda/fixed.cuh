// The CUDA update of whole chunks in formats that are known when compiled: those with codes, remainders and draws that
// training uses most. A block takes kBlockElements, all there, of a tensor that is dense and aligned to 16 bytes and
// lies in the unsharded one in a stretch that begins with a run; tails and all else go to mixed.cuh, for the same bits.
// Per element it executes about a third of that kernel's instructions (bench/NOTES.md).
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/formats.cuh"
#include "cuda/quick.cuh"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

// With codes 80 registers: on an H200 more blocks spilled, and fewer of them, or no loads ahead, hid less of the
// latency (bench/NOTES.md). Without codes a thread has 48 bytes or more on the way at a time, and two blocks have
// enough.
template <class... S>
constexpr int kFixedBlocksPerSm = ((S::kStoring == Storing::codes) || ...) ? 3 : 2;

template <class F>
constexpr int item_bits_of() {
  return item_bits(format_of<F>());
}
template <class F>
constexpr int remainder_bits_of() {
  return remainder_bits(format_of<F>());
}

template <class F>
constexpr bool is_signed_code() {
  if constexpr (F::kStoring == Storing::codes)
    return F::kSign != 0;
  else
    return false;
}

// Runs of an operand in memory, one after the other of a thread.
template <class F>
struct Cursor {
  static constexpr int kBits = item_bits_of<F>(), kBeside = remainder_bits_of<F>();
  static constexpr bool kCoded = F::kStoring == Storing::codes;
  static constexpr int kStride = kThreads * kRun;
  char *data, *beside;

  __device__ __forceinline__ Cursor(const Operand& operand, int64_t i)
      : data(operand.data + i * kBits / 8),
        beside(operand.beside + (kCoded ? i / kGroup * int64_t(sizeof(uint16_t)) : i * kBeside / 8)) {}
  __device__ __forceinline__ void advance() {
    data += kStride * kBits / 8;
    beside += kCoded ? kStride / kGroup * sizeof(uint16_t) : kStride * kBeside / 8;
  }
};

template <int kBits>
__device__ __forceinline__ void load_run(const char* from, Words& words) {
  if constexpr (kBits >= 16) load_128(true, from, words.word);
  if constexpr (kBits == 32) load_128(true, from + 16, words.word + 4);
  if constexpr (kBits == 8) load_64(true, from, words.word);
  if constexpr (kBits == 4) load_32(true, from, words.word);
}
template <int kBits>
__device__ __forceinline__ void store_run(char* to, const Words& words) {
  if constexpr (kBits >= 16) store_128(true, to, words.word);
  if constexpr (kBits == 32) store_128(true, to + 16, words.word + 4);
  if constexpr (kBits == 8) store_64(true, to, words.word);
  if constexpr (kBits == 4) store_32(true, to, words.word);
}

// A run of an operand as it lies in memory.
template <class F>
struct Held {
  Words words, beside;
  uint32_t scale;

  __device__ __forceinline__ void load(const Cursor<F>& at) {
    load_run<Cursor<F>::kBits>(at.data, words);
    load_run<Cursor<F>::kBeside>(at.beside, beside);
    if constexpr (Cursor<F>::kCoded) scale = *reinterpret_cast<const uint16_t*>(at.beside);
  }
};

// The bits of `mask`, which are from place `at` of a word on, from place `to` on; both are constants after unrolling.
__device__ __forceinline__ uint32_t moved(uint32_t word, uint32_t mask, int at, int to) {
  return (to >= at ? word << (to - at) : word >> (at - to)) & mask << to;
}

// `table`: the values of signed codes for a unit of 1.
template <class F>
__device__ __forceinline__ void fill_table(float* table) {
  for (uint32_t code = threadIdx.x; code < 1u << F::kCodeBits; code += kThreads) table[code] = F::value(code, 1.0f);
}
template <class F>
__device__ __forceinline__ float state_value(const Held<F>& held, float unit, const float* table, int k) {
  if constexpr (F::kStoring == Storing::codes) {
    const int at = k * F::kCodeBits % 32;
    const uint32_t word = held.words.word[k * F::kCodeBits / 32];
    if constexpr (F::kSign != 0) {
      const uint32_t offset = moved(word, (1u << F::kCodeBits) - 1, at, 2);
      return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset) * unit;
    } else {
      return fma(float_of(moved(word, F::kMost, at, F::kBelow) | F::kTwo), unit, -2.0f * unit);
    }
  } else {
    return value_of<F>(item<Cursor<F>::kBits>(held.words, k));
  }
}

// What `value` of the format gives, where that is below kOrdinary.
template <class P>
constexpr uint32_t kOrdinary = P::kStoring == Storing::remainder ? 0x7f7f8000u : 0x7f800000u;
template <class P>
__device__ __forceinline__ float ordinary_weight(const Held<P>& held, int k) {
  if constexpr (P::kStoring == Storing::remainder) {
    const uint32_t word = held.words.word[k / 2];
    uint32_t remainder;
    if constexpr (sizeof(typename P::Remainder) == 1)
      remainder = permuted(held.beside.word[k / 4], 0u, 0x8804u + uint32_t(k % 4) * 0x1110u);
    else
      remainder = permuted(held.beside.word[k / 2], 0u, k % 2 == 0 ? 0x9910u : 0xbb32u);
    return float_of((k % 2 == 0 ? word << 16 : word & 0xffff0000u) + remainder);
  } else {
    return value_of<P>(item<Cursor<P>::kBits>(held.words, k));
  }
}

// The new weights, of which none is a NaN but 0x7fc00000.
template <class P>
__device__ __forceinline__ void store_weights(const Cursor<P>& at, const float* x, const uint32_t* word) {
  static_assert(P::kStorage == Storage::bf16 || P::kStoring == Storing::alone);
  Words out = {}, beside = {};
  if constexpr (P::kStoring == Storing::alone) {
    out = encode_alone<P>(x, word, 0);
  } else {
    uint32_t exact[kRun], rounded[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      exact[k] = bits_of(x[k]);
      if constexpr (P::kStoring == Storing::drawn) exact[k] += draws_of(0)(word[k]);
      if constexpr (kBitsOf<typename P::Stored> == 16 && remainder_bits_of<P>() == 8)
        exact[k] += draws_of(0)(word[k]) >> 8;
      rounded[k] = P::kStoring == Storing::remainder ? exact[k] + 0x8000u : exact[k];
    }
#pragma unroll
    for (int k = 0; k < kRun; k += 2) out.word[k / 2] = upper_halves(rounded[k], rounded[k + 1]);
    if constexpr (remainder_bits_of<P>() == 16) {
#pragma unroll
      for (int k = 0; k < kRun; k += 2) beside.word[k / 2] = lower_halves(exact[k], exact[k + 1]);
    } else if constexpr (remainder_bits_of<P>() == 8) {
#pragma unroll
      for (int k = 0; k < kRun; k += 4)
        beside.word[k / 4] = second_bytes(exact[k], exact[k + 1], exact[k + 2], exact[k + 3]);
    }
  }
  store_run<Cursor<P>::kBits>(at.data, out);
  store_run<Cursor<P>::kBeside>(at.beside, beside);
}

// The largest magnitude among a run's values, as bits: a NaN is larger than all.
template <bool kSigned>
__device__ __forceinline__ uint32_t top_of_run(const float* x) {
  if constexpr (kSigned) {
    float top = 0.0f;
#pragma unroll
    for (int k = 0; k < kRun; ++k) top = max_magnitude(top, x[k]);
    return bits_of(top);
  } else {
    // Of numbers that are not below 0; others are larger than all.
    uint32_t top = 0;
#pragma unroll
    for (int k = 0; k < kRun; ++k) top = bits_of(x[k]) > top ? bits_of(x[k]) : top;
    return top;
  }
}

// `ordinary`: no value is a NaN, and no second moment but 0 is below 2^-102.
template <class F>
__device__ __forceinline__ void store_state(const Cursor<F>& at, const float* x, uint32_t top, bool ordinary,
                                            const uint32_t* word, int number) {
  Words out = {};
  if constexpr (std::is_same_v<F, Bf16Stochastic>) {
    if (ordinary) {
#pragma unroll
      for (int k = 0; k < kRun; k += 2)
        out.word[k / 2] =
            upper_halves(bits_of(x[k]) + draws_of(number)(word[k]), bits_of(x[k + 1]) + draws_of(number)(word[k + 1]));
    } else {
      out = encode_alone<F>(x, word, number);
    }
  } else if constexpr (F::kStoring != Storing::codes) {
    out = encode_alone<F>(x, word, number);
  } else {
    const Draws draws = draws_of(number);
    top = top_of_group(top);
    uint32_t scale = F::scale_of(top);
    if (ordinary && scale < 0x7000u) {
      // As Codes::code, with the code and its fraction further up, so that it is a byte.
      const float per_scale = Quick::quotient(F::kRange, float_of(scale << 16));
      uint32_t code[kRun];
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const float z = fma(magnitude(x[k]), per_scale, 2.0f);
        code[k] = (bits_of(z) << (24 - F::kBelow)) + draws.placed(word[k]);
        if constexpr (F::kSign == 0) {
          const uint32_t least = bits_of(x[k]) < 0x01000000u ? bits_of(x[k]) : 0x01000000u;
          code[k] = code[k] > least ? code[k] : least;
        }
      }
      scale |= 0x8000u;
      if constexpr (F::kCodeBits == 8) {
#pragma unroll
        for (int k = 0; k < kRun; k += 4) {
          out.word[k / 4] = upper_bytes(code[k], code[k + 1], code[k + 2], code[k + 3]);
          if constexpr (F::kSign != 0) out.word[k / 4] |= signs_of(x[k], x[k + 1], x[k + 2], x[k + 3]) & 0x80808080u;
        }
      } else {
        out.word[0] =
            upper_bytes(code[0], code[2], code[4], code[6]) + upper_bytes(code[1], code[3], code[5], code[7]) * 16u;
        if constexpr (F::kSign != 0)
          out.word[0] |=
              (signs_of(x[0], x[2], x[4], x[6]) >> 4 & 0x08080808u) | (signs_of(x[1], x[3], x[5], x[7]) & 0x80808080u);
      }
    } else {
      const Group group = F::group(top & 0x7fffffffu);
      scale = group.scale;
#pragma unroll
      for (int k = 0; k < kRun; ++k) add_item<F::kCodeBits>(out, k, F::code(x[k], group, draws.placed(word[k])));
    }
    if (threadIdx.x % kGroupLanes == 0) *reinterpret_cast<uint16_t*>(at.beside) = uint16_t(scale);
  }
  store_run<Cursor<F>::kBits>(at.data, out);
}

template <class... Formats>
constexpr bool kAnyDraws = ((!(Formats::kStoring == Storing::alone || remainder_bits_of<Formats>() == 16)) || ...);
// Bits of the codes with a sign, which all states with such have alike; 0: there are none.
template <class... S>
constexpr int kTableBits = 0;
template <class F, class... S>
constexpr int kTableBits<F, S...> = is_signed_code<F>() ? item_bits_of<F>() : kTableBits<S...>;

// A state's run, and the numbers of its states for a list of them.
template <int K, class F>
struct StateRun {
  using Format = F;
  Cursor<F> at;
  Held<F> held;
};
template <class Numbers, class... S>
struct StateRuns;
template <int... K, class... S>
struct StateRuns<std::integer_sequence<int, K...>, S...> : StateRun<K, S>... {};
template <int K, class F>
__device__ __forceinline__ StateRun<K, F>& run_of(StateRun<K, F>& run) {
  return run;
}

template <class Rule, class P, class G, class... S, int... K>
__device__ __forceinline__ void update_fixed(const DeviceTensor& t, const float* scalars, const Control* control,
                                             int64_t begin, std::integer_sequence<int, K...>) {
  constexpr int kBits = kTableBits<S...>;
  __shared__ float table[1 << kBits];
  const int64_t i = begin + int64_t(threadIdx.x) * kRun;
  Cursor<P> p_at(t.operand[0], i);
  Cursor<G> g_at(t.operand[1], i);
  StateRuns<std::integer_sequence<int, K...>, S...> states{{Cursor<S>(t.operand[2 + K], i), {}}...};
  Held<P> p_held;
  Held<G> g_held;
  const auto load = [&] {
    p_held.load(p_at);
    g_held.load(g_at);
    (run_of<K>(states).held.load(run_of<K>(states).at), ...);
  };
  load();
  if constexpr (kBits != 0) {
    fill_table<Codes<true, kBits>>(table);
    __syncthreads();
  }

  const Rule rule = rule_of<Rule>(t, scalars);
  const Seed seed = seed_in(scalars + int64_t(t.scalars) * kScalarFloats);
  const Incoming incoming{t.sign * control->grad_coef, control->clip_value};
  const bool clamps = incoming.clip_value < HUGE_VALF;
  bool fit = true;
  if constexpr (QuickRule<Rule>::kThere) fit = QuickRule<Rule>::fit(rule);
  uint64_t run = uint64_t(t.place.begin + i) / kRun;

#pragma unroll 1
  for (int n = 0; n < int(kBlockElements / Cursor<P>::kStride); ++n) {
    float p[kRun], g[kRun], s[sizeof...(S)][kRun];
    float top_p = 0.0f;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      p[k] = ordinary_weight<P>(p_held, k);
      top_p = max_magnitude(top_p, p[k]);
    }
    bool ordinary = top_p < float_of(kOrdinary<P>);
    if (!ordinary) decode_weight(format_of<P>(), p_held.words, p_held.beside, p);
    decode_plain<G>(g_held.words, g);
    const auto decode = [&](auto& state, float* x) {
      using F = typename std::remove_reference_t<decltype(state)>::Format;
      float unit = 0.0f;
      if constexpr (F::kStoring == Storing::codes) unit = F::unit(state.held.scale);
#pragma unroll
      for (int k = 0; k < kRun; ++k) x[k] = state_value<F>(state.held, unit, table, k);
    };
    (decode(run_of<K>(states), s[K]), ...);

    const Cursor<P> p_to = p_at;
    const StateRuns<std::integer_sequence<int, K...>, S...> to = states;
    p_at.advance();
    g_at.advance();
    (run_of<K>(states).at.advance(), ...);
    if (n + 1 < int(kBlockElements / Cursor<P>::kStride)) load();

#pragma unroll
    for (int k = 0; k < kRun; ++k) g[k] *= incoming.coef;
    if (clamps) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) g[k] = clamped(g[k], incoming.clip_value);
    }
    uint32_t top[sizeof...(S)];
    if constexpr (QuickRule<Rule>::kThere) {
      static_assert(sizeof...(S) == 2 && Rule::kSquares == 2);
      uint32_t least = 0xffffffffu;
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        rule.update_moments(p[k], g[k], s[0][k], s[1][k]);
        least = least_sum(bits_of(s[0][k]) * 2u, 0xffffffffu, least);
        least = least_sum(bits_of(s[1][k]), 0xffffffffu, least);
      }
      top[0] = top_of_run<true>(s[0]);
      top[1] = top_of_run<false>(s[1]);
      ordinary = ordinary && fit && least >= kQuickLeast && top[0] < kQuickMost && top[1] < kQuickMost;
      if (ordinary) {
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          assume_finite(p[k]);
          p[k] = stepped(rule, p[k], rule.template step<Quick>(s[0][k], s[1][k]));
        }
      } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k) p[k] = with_one_nan(stepped(rule, p[k], rule.step(s[0][k], s[1][k])));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        update(rule, p[k], g[k], s[K][k]...);
        p[k] = with_one_nan(p[k]);
      }
      ((top[K] = top_of_run<(Rule::kSquares >> K & 1) == 0>(s[K])), ...);
      ordinary = Rule::kSquares == 0 && ((top[K] < 0x7f800000u) && ...);
    }

    uint32_t word[kRun] = {};
    if constexpr (kAnyDraws<P, S...>) {
      const uint32_t hash = hashed(seed, uint32_t(run), uint32_t(run >> 32));
#pragma unroll
      for (int k = 0; k < kRun; ++k) word[k] = hash * odd(k);
    }
    store_weights<P>(p_to, p, word);
    (store_state<S>(static_cast<const StateRun<K, S>&>(to).at, s[K], top[K], ordinary, word, 1 + K), ...);
    run += kThreads;
  }
}

template <class Rule, class P, class G, class... S>
__global__ void __launch_bounds__(kThreads, kFixedBlocksPerSm<S...>)
    update_fixed_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const float* scalars,
                        const Control* control) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  if (t.numel == 0) return;  // inactive
  update_fixed<Rule, P, G, S...>(t, scalars, control, chunk.begin, std::make_integer_sequence<int, Rule::kStates>{});
}

}  // namespace PRECOND_ISA
}  // namespace precond
