// What every CUDA kernel sees of a plan: tensors and chunks in device memory, and where elements lie.
#pragma once

#include <cuda_runtime.h>

#include "plan/layout.h"
#include "plan/plan.h"

namespace precond {
inline namespace PRECOND_ISA {

constexpr int kThreads = 256;
// Elements of a block's chunk. A tensor's last chunk may be shorter.
constexpr int64_t kBlockElements = 8192;

// One tensor in device memory: p, g and states. Inactive ones have numel 0, so that the list of chunks need not change.
struct DeviceTensor {
  Operand operand[kMaxStates + 2];
  int64_t numel;
  Place place;
  int32_t scalars;
  float sign;
  int32_t draws;
};

struct DeviceChunk {
  int64_t begin;
  int32_t tensor;
};

// Accesses of 128 and 64 bits, spelled: where inline assembly is near (fp16), nvcc no longer sees that an address it
// read from memory is a global one, and makes them generic.
__device__ __forceinline__ uint4 load_128(const char* address) {
#if defined(__CUDA_ARCH__)
  uint4 word;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
#else
  return *reinterpret_cast<const uint4*>(address);
#endif
}
__device__ __forceinline__ void store_128(char* address, const uint4& word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w));
#else
  *reinterpret_cast<uint4*>(address) = word;
#endif
}

__device__ __forceinline__ uint2 load_64(const char* address) {
#if defined(__CUDA_ARCH__)
  uint2 word;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(address));
  return word;
#else
  return *reinterpret_cast<const uint2*>(address);
#endif
}
__device__ __forceinline__ void store_64(char* address, const uint2& word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(word.x), "r"(word.y));
#else
  *reinterpret_cast<uint2*>(address) = word;
#endif
}

template <class Format>
__device__ __forceinline__ typename Format::Stored& element(char* data, int64_t i) {
  return reinterpret_cast<typename Format::Stored*>(data)[i];
}
template <class Format>
__device__ __forceinline__ typename Format::Stored& element(const Operand& operand, int64_t i) {
  return reinterpret_cast<typename Format::Stored*>(operand.data)[i];
}

// The block's part of its tensor, or an empty one.
struct Range {
  int64_t begin, end;
};
__device__ __forceinline__ Range range_of(const DeviceChunk& chunk, const DeviceTensor& t) {
  const int64_t limit = chunk.begin + kBlockElements, end = limit < t.numel ? limit : t.numel;
  return {chunk.begin, end > chunk.begin ? end : chunk.begin};
}

template <class Rule>
__device__ __forceinline__ Rule rule_of(const DeviceTensor& t, const float* scalars) {
  // Float by float: a memcpy of the scalars themselves becomes loads of single bytes.
  float fields[sizeof(Rule) / sizeof(float)];
#pragma unroll
  for (size_t k = 0; k < sizeof(Rule) / sizeof(float); ++k)
    fields[k] = scalars[int64_t(t.scalars) * kScalarFloats + int64_t(k)];
  Rule rule;
  std::memcpy(&rule, fields, sizeof rule);
  return rule;
}

// Where element i of the visiting order lies, in elements.
__device__ __forceinline__ int64_t offset_in(const Strides& s, int64_t i) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = s.ndim - 1; d >= 0; --d) {
    offset += i % s.size[d] * s.stride[d];
    i /= s.size[d];
  }
  return offset;
}
__device__ __forceinline__ int64_t offset_of(const Operand& operand, const Strides* strides, int64_t i) {
  return operand.strides == kDense ? i : offset_in(strides[operand.strides], i);
}

}  // namespace PRECOND_ISA
}  // namespace precond
