// The CUDA update of tensors whose formats stand alone: one block per chunk, for all tensors that share a rule and
// formats; load, rule, store. Also compiled as plain C++ by the tests, see tests/cuda_on_host.
#pragma once

#include <utility>

#include "cuda/tensors.cuh"

namespace precond {
inline namespace PRECOND_ISA {

// Asked of the compiler for the fast kernels: up to 80 registers. Left alone it stops at 64 and spills 8 bytes in a
// few.
constexpr int kBlocksPerSm = 3;
// Packs that a thread loads before it uses the first. AdamW then has 128 bytes per thread in flight in fp32 and 64 in
// bf16: 64 KB or more per multiprocessor, where about 23 KB fill the memory system. Two packs of 8 would spill.
template <int V>
constexpr int kPacksInFlight = V == 4 ? 2 : 1;

// Elements per 16-byte access of the narrowest format among the operands.
template <class... Formats>
constexpr int kPackSize = ((sizeof(typename Formats::Stored) == 2) || ...) ? 8 : 4;

// V consecutive elements as they lie in memory, moved 16 bytes at a time.
template <class Format, int V>
struct Pack {
  static constexpr int kWords = V * int(sizeof(typename Format::Stored)) / 16;
  uint4 word[kWords];

  __device__ __forceinline__ void load(const char* data, int64_t i) {
    const char* from = data + i * int64_t(sizeof(typename Format::Stored));
#pragma unroll
    for (int w = 0; w < kWords; ++w) word[w] = load_128(from + 16 * w);
  }
  __device__ __forceinline__ void store(char* data, int64_t i) const {
    char* to = data + i * int64_t(sizeof(typename Format::Stored));
#pragma unroll
    for (int w = 0; w < kWords; ++w) store_128(to + 16 * w, word[w]);
  }
  // Element k; k is a constant after unrolling, so the words stay in registers.
  __device__ __forceinline__ uint32_t& lane(int w, int k) {
    uint4& q = word[w];
    return k == 0 ? q.x : k == 1 ? q.y : k == 2 ? q.z : q.w;
  }
  __device__ __forceinline__ float value(int k) {
    if (sizeof(typename Format::Stored) == 4) return float_of(lane(k / 4, k % 4));
    const uint32_t both = lane(k / 8, k % 8 / 2);
    return Format::value(typename Format::Stored(k % 2 ? both >> 16 : both & 0xffffu));
  }
  __device__ __forceinline__ void set(int k, float x) {
    if (sizeof(typename Format::Stored) == 4) {
      lane(k / 4, k % 4) = bits_of(x);
      return;
    }
    const uint32_t half = uint32_t(Format::stored(x));
    uint32_t& both = lane(k / 8, k % 8 / 2);
    both = k % 2 ? (both & 0xffffu) | half << 16 : (both & 0xffff0000u) | half;
  }
};

// One element of dense operands.
template <class Rule, class P, class G, class S, int... K>
__device__ __forceinline__ void update_element(const Rule& rule, const DeviceTensor& t, Incoming incoming, int64_t i,
                                               std::integer_sequence<int, K...>) {
  float p = P::value(element<P>(t.operand[0], i));
  float s[Rule::kStates + 1] = {S::value(element<S>(t.operand[2 + K], i))...};
  rule(p, incoming(G::value(element<G>(t.operand[1], i))), s[K]...);
  element<P>(t.operand[0], i) = P::stored(p);
  ((element<S>(t.operand[2 + K], i) = S::stored(s[K])), ...);
}

// kCount packs, `stride` elements apart: all loads first.
template <int kCount, class Rule, class P, class G, class S, int V, int... K>
__device__ __forceinline__ void update_packs(const Rule& rule, const DeviceTensor& t, Incoming incoming, int64_t i,
                                             int64_t stride, std::integer_sequence<int, K...>) {
  Pack<P, V> p[kCount];
  Pack<G, V> g[kCount];
  [[maybe_unused]] Pack<S, V> s[kCount][Rule::kStates + 1];
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    p[n].load(t.operand[0].data, i + n * stride);
    g[n].load(t.operand[1].data, i + n * stride);
    (s[n][K].load(t.operand[2 + K].data, i + n * stride), ...);
  }
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      float p_value = p[n].value(k);
      float s_value[Rule::kStates + 1] = {s[n][K].value(k)...};
      rule(p_value, incoming(g[n].value(k)), s_value[K]...);
      p[n].set(k, p_value);
      (s[n][K].set(k, s_value[K]), ...);
    }
    p[n].store(t.operand[0].data, i + n * stride);
    (s[n][K].store(t.operand[2 + K].data, i + n * stride), ...);
  }
}

template <class Rule, class P, class G, class S, int... K>
__device__ __forceinline__ void update_range(const Rule& rule, const DeviceTensor& t, Incoming incoming, Range range,
                                             std::integer_sequence<int, K...> states) {
  constexpr int V = kPackSize<P, G, S>;
  constexpr int kCount = kPacksInFlight<V>;
  constexpr int64_t stride = int64_t(kThreads) * V;
  // Views into flat buffers may be misaligned, and then no operand moves by 16 bytes.
  uint64_t addresses = reinterpret_cast<uint64_t>(t.operand[0].data) | reinterpret_cast<uint64_t>(t.operand[1].data);
  ((addresses |= reinterpret_cast<uint64_t>(t.operand[2 + K].data)), ...);
  const int64_t packed_end = range.begin + (addresses % 16 == 0 ? (range.end - range.begin) / V * V : 0);

  int64_t i = range.begin + int64_t(threadIdx.x) * V;
#pragma unroll 1
  for (; i + (kCount - 1) * stride < packed_end; i += kCount * stride)
    update_packs<kCount, Rule, P, G, S, V>(rule, t, incoming, i, stride, states);
  if (kCount > 1 && i < packed_end) update_packs<1, Rule, P, G, S, V>(rule, t, incoming, i, stride, states);
#pragma unroll 1
  for (i = packed_end + threadIdx.x; i < range.end; i += kThreads)
    update_element<Rule, P, G, S>(rule, t, incoming, i, states);
}

// Dense tensors whose states share a format.
template <class Rule, class P, class G, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    update_kernel(const DeviceTensor* tensors, const DeviceChunk* chunks, const float* scalars,
                  const Control* control) {
  if (control->skip != 0.0f) return;
  const DeviceChunk chunk = chunks[blockIdx.x];
  const DeviceTensor& t = tensors[chunk.tensor];
  update_range<Rule, P, G, S>(rule_of<Rule>(t, scalars), t, {t.sign * control->grad_coef, control->clip_value},
                              range_of(chunk, t), std::make_integer_sequence<int, Rule::kStates>{});
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

// Any strides and any mix of formats, one element at a time: correct but slow.
template <class Rule, int... K>
__device__ __forceinline__ void update_any(const Rule& rule, const DeviceTensor& t, const Strides* strides,
                                           Incoming incoming, int64_t i, std::integer_sequence<int, K...>) {
  const int64_t at[kMaxStates + 2] = {offset_of(t.operand[0], strides, i), offset_of(t.operand[1], strides, i),
                                      offset_of(t.operand[2 + K], strides, i)...};
  float p = value_at(t.operand[0], at[0]);
  float s[Rule::kStates + 1] = {value_at(t.operand[2 + K], at[2 + K])...};
  rule(p, incoming(value_at(t.operand[1], at[1])), s[K]...);
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
