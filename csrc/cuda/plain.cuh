// The CUDA update of tensors whose formats stand alone: one block per chunk, for all tensors that share a rule and
// formats; load, rule, store. Also compiled as plain C++ by the tests, see tests/cuda_on_host.
#pragma once

#include <utility>

#include "cuda/tensors.cuh"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

// Asked of the compiler for the fast kernels: up to 80 registers. Left alone it stops at 64 and spills 8 bytes in a
// few.
constexpr int kBlocksPerSm = 3;

// Elements per pack: of 16 bytes in the widest format among the operands, so that neighbouring lanes access
// neighbouring bytes. Beside fp32, 16-bit operands move by 8 bytes.
template <class... Formats>
constexpr int kPackSize = ((sizeof(typename Formats::Stored) == 4) || ...) ? 4 : 8;
// Packs that a thread loads before it uses the first. AdamW then has 128 bytes per thread in flight in fp32 and 64 in
// bf16: 64 KB or more per multiprocessor, where about 23 KB fill the memory system. Two packs of 8 would spill.
template <int V>
constexpr int kPacksInFlight = V == 4 ? 2 : 1;

// V consecutive elements as they lie in memory.
template <class Format, int V>
struct Pack {
  static constexpr bool kWide = sizeof(typename Format::Stored) == 4;
  static constexpr int kWords = V * int(sizeof(typename Format::Stored)) / 4;
  uint32_t word[kWords];

  __device__ __forceinline__ void load(const char* from) {
    if constexpr (kWords == 4) {
      const uint4 q = load_128(from);
      word[0] = q.x, word[1] = q.y, word[2] = q.z, word[3] = q.w;
    } else {
      const uint2 q = load_64(from);
      word[0] = q.x, word[1] = q.y;
    }
  }
  __device__ __forceinline__ void store(char* to) const {
    if constexpr (kWords == 4)
      store_128(to, {word[0], word[1], word[2], word[3]});
    else
      store_64(to, {word[0], word[1]});
  }
  // Element k; k is a constant after unrolling, so the words stay in registers.
  __device__ __forceinline__ float value(int k) const {
    if constexpr (kWide)
      return float_of(word[k]);
    else
      return Format::value(typename Format::Stored(k % 2 ? word[k / 2] >> 16 : word[k / 2] & 0xffffu));
  }
  // Elements k and k + 1.
  __device__ __forceinline__ void set_both(int k, float low, float high) {
    if constexpr (kWide)
      word[k] = bits_of(low), word[k + 1] = bits_of(high);
    else
      word[k / 2] = Format::stored_both(low, high);
  }
};

// The part of a tensor that a block updates: where it begins in each operand, read from memory once. An index into it
// has 32 bits.
template <int kOperands>
struct Part {
  char* data[kOperands];
  int count;
};

// Where the part begins. The compiler does not see how it is found: else it would add 64-bit indices to addresses in
// every iteration.
template <class Format>
__device__ __forceinline__ char* begin_of(const Operand& operand, int64_t i) {
  char* data = operand.data + i * int64_t(sizeof(typename Format::Stored));
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(data));
#endif
  return data;
}

// Where element i of an operand lies. The compiler does not see that all operands have the same i: it would share the
// product with the size and add it to each address in two instructions, where one does both.
template <class Format>
__device__ __forceinline__ char* address_of(char* data, int i) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(i));
#endif
  return data + i * int64_t(sizeof(typename Format::Stored));
}

// One element of dense operands.
template <class Rule, class P, class G, class S, int... K>
__device__ __forceinline__ void update_element(const Rule& rule, const Part<Rule::kStates + 2>& part, Incoming incoming,
                                               int i, std::integer_sequence<int, K...>) {
  float p = P::value(element<P>(part.data[0], i));
  float s[Rule::kStates + 1] = {S::value(element<S>(part.data[2 + K], i))...};
  update(rule, p, incoming(G::value(element<G>(part.data[1], i))), s[K]...);
  element<P>(part.data[0], i) = P::stored(p);
  ((element<S>(part.data[2 + K], i) = S::stored(s[K])), ...);
}

// kCount packs, `stride` elements apart: all loads first.
template <int kCount, class Rule, class P, class G, class S, int V, int... K>
__device__ __forceinline__ void update_packs(const Rule& rule, const Part<Rule::kStates + 2>& part, Incoming incoming,
                                             int i, std::integer_sequence<int, K...>) {
  constexpr int kStride = kThreads * V;
  char* const p_at = address_of<P>(part.data[0], i);
  char* const g_at = address_of<G>(part.data[1], i);
  [[maybe_unused]] char* const s_at[Rule::kStates + 1] = {address_of<S>(part.data[2 + K], i)...};
  Pack<P, V> p[kCount];
  Pack<G, V> g[kCount];
  [[maybe_unused]] Pack<S, V> s[kCount][Rule::kStates + 1];
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    p[n].load(p_at + n * kStride * int(sizeof(typename P::Stored)));
    g[n].load(g_at + n * kStride * int(sizeof(typename G::Stored)));
    (s[n][K].load(s_at[K] + n * kStride * int(sizeof(typename S::Stored))), ...);
  }
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      float p_value[2], s_value[2][Rule::kStates + 1];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        p_value[j] = p[n].value(k + j);
        ((s_value[j][K] = s[n][K].value(k + j)), ...);
        update(rule, p_value[j], incoming(g[n].value(k + j)), s_value[j][K]...);
      }
      p[n].set_both(k, p_value[0], p_value[1]);
      (s[n][K].set_both(k, s_value[0][K], s_value[1][K]), ...);
    }
    p[n].store(p_at + n * kStride * int(sizeof(typename P::Stored)));
    (s[n][K].store(s_at[K] + n * kStride * int(sizeof(typename S::Stored))), ...);
  }
}

template <class Rule, class P, class G, class S, int... K>
__device__ __forceinline__ void update_range(const Rule& rule, const DeviceTensor& t, Incoming incoming, Range range,
                                             std::integer_sequence<int, K...> states) {
  constexpr int V = kPackSize<P, G, S>;
  constexpr int kCount = kPacksInFlight<V>;
  constexpr int kStride = kThreads * V;
  const Part<Rule::kStates + 2> part{{begin_of<P>(t.operand[0], range.begin), begin_of<G>(t.operand[1], range.begin),
                                      begin_of<S>(t.operand[2 + K], range.begin)...},
                                     int(range.end - range.begin)};
  // Views into flat buffers may be misaligned, and then no operand moves by packs.
  uint64_t addresses = reinterpret_cast<uint64_t>(part.data[0]) | reinterpret_cast<uint64_t>(part.data[1]);
  ((addresses |= reinterpret_cast<uint64_t>(part.data[2 + K])), ...);
  const int packed = addresses % 16 == 0 ? part.count / V * V : 0;

  int i = int(threadIdx.x) * V;
#pragma unroll 1
  for (; i + (kCount - 1) * kStride < packed; i += kCount * kStride)
    update_packs<kCount, Rule, P, G, S, V>(rule, part, incoming, i, states);
  if (kCount > 1 && i < packed) update_packs<1, Rule, P, G, S, V>(rule, part, incoming, i, states);
#pragma unroll 1
  for (i = packed + int(threadIdx.x); i < part.count; i += kThreads)
    update_element<Rule, P, G, S>(rule, part, incoming, i, states);
}

// Dense tensors whose states share a format.
template <class Rule, class P, class G, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    update_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const float* scalars,
                  const Control* control) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  const Range range = range_of(chunk, t);
  if (range.begin == range.end) return;  // its operands may have no address
  update_range<Rule, P, G, S>(rule_of<Rule>(t, scalars), t, {t.sign * control->grad_coef, control->clip_value}, range,
                              std::make_integer_sequence<int, Rule::kStates>{});
}

__device__ __forceinline__ float value_at(const Operand& operand, int64_t offset) {
  float x = 0.0f;
  with_plain_format(operand.format, [&](auto format) { x = format.value(element<decltype(format)>(operand, offset)); });
  return x;
}

__device__ __forceinline__ void store_at(const Operand& operand, int64_t offset, float x) {
  with_plain_format(operand.format,
                    [&](auto format) { element<decltype(format)>(operand, offset) = format.stored(x); });
}

// Any strides and any mix of plain formats, one element at a time: correct but slow.
template <class Rule, int... K>
__device__ __forceinline__ void update_any(const Rule& rule, const DeviceTensor& t, const Strides* strides,
                                           Incoming incoming, int64_t i, std::integer_sequence<int, K...>) {
  const int64_t at[kMaxStates + 2] = {offset_of(t.operand[0], strides, i), offset_of(t.operand[1], strides, i),
                                      offset_of(t.operand[2 + K], strides, i)...};
  float p = value_at(t.operand[0], at[0]);
  float s[Rule::kStates + 1] = {value_at(t.operand[2 + K], at[2 + K])...};
  update(rule, p, incoming(value_at(t.operand[1], at[1])), s[K]...);
  store_at(t.operand[0], at[0], p);
  (store_at(t.operand[2 + K], at[2 + K], s[K]), ...);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    update_any_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const Strides* strides,
                      const float* scalars, const Control* control) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  const Range range = range_of(chunk, t);
  const Rule rule = rule_of<Rule>(t, scalars);
  const Incoming incoming{t.sign * control->grad_coef, control->clip_value};
  for (int64_t i = range.begin + threadIdx.x; i < range.end; i += kThreads)
    update_any(rule, t, strides, incoming, i, std::make_integer_sequence<int, Rule::kStates>{});
}

}  // namespace PRECOND_ISA
}  // namespace precond
