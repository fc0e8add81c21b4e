// Between memory and registers: eight elements of any format and layout. What cpu/formats.h is to the CPU.
#pragma once

#include "cuda/tensors.cuh"

namespace precond {
inline namespace PRECOND_ISA {

// A thread takes runs; lanes of a warp whose elements share a scale.
constexpr int kGroupLanes = kGroup / kRun;

// A run as it lies in memory: in 8, 4, 2 or 1 words.
struct Words {
  uint32_t word[kRun];
};

// What an operand has in memory: the elements themselves, or what lies beside them. Of `bits` each, or none.
struct Items {
  char* data;
  int bits;
  bool wide;               // moved by up to 16 bytes: dense, and aligned to that
  const Strides* strides;  // null: dense
};

__device__ __forceinline__ Items items_of(char* data, int bits, int32_t stride, const Strides* strides) {
  const uint64_t bytes = bits == 32 ? 16 : uint64_t(bits);
  const bool dense = stride == kDense;
  const bool wide = dense && (reinterpret_cast<uint64_t>(data) & (bytes - 1)) == 0;
  return {data, bits, wide, dense ? nullptr : strides + stride};
}

// Accesses under a condition, without a branch. nvcc 13.0 gives the loads of an operand the same registers and waits
// for each before the next, so that a warp has one operand on its way: 8 KB per multiprocessor, and 15 to 55 % of a
// copy on an H200 (bench/NOTES.md). With formats known at compile time the same text reaches 97 % where no codes are.
__device__ __forceinline__ void load_128(bool when, const char* from, uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred q; setp.ne.s32 q, %4, 0; @q ld.global.v4.u32 {%0, %1, %2, %3}, [%5];}"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(int(when)), "l"(from));
#else
  if (when) std::memcpy(word, __builtin_assume_aligned(from, 16), 16);
#endif
}
__device__ __forceinline__ void load_64(bool when, const char* from, uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q ld.global.v2.u32 {%0, %1}, [%3];}"
               : "+r"(word[0]), "+r"(word[1])
               : "r"(int(when)), "l"(from));
#else
  if (when) std::memcpy(word, __builtin_assume_aligned(from, 8), 8);
#endif
}
__device__ __forceinline__ void load_32(bool when, const char* from, uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred q; setp.ne.s32 q, %1, 0; @q ld.global.u32 %0, [%2];}"
               : "+r"(word[0])
               : "r"(int(when)), "l"(from));
#else
  if (when) std::memcpy(word, __builtin_assume_aligned(from, 4), 4);
#endif
}
__device__ __forceinline__ void store_128(bool when, char* to, const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q st.global.v4.u32 [%1], {%2, %3, %4, %5};}" ::"r"(int(when)),
               "l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]));
#else
  if (when) std::memcpy(__builtin_assume_aligned(to, 16), word, 16);
#endif
}
__device__ __forceinline__ void store_64(bool when, char* to, const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q st.global.v2.u32 [%1], {%2, %3};}" ::"r"(int(when)), "l"(to),
               "r"(word[0]), "r"(word[1]));
#else
  if (when) std::memcpy(__builtin_assume_aligned(to, 8), word, 8);
#endif
}
__device__ __forceinline__ void store_32(bool when, char* to, const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  asm volatile("{.reg .pred q; setp.ne.s32 q, %0, 0; @q st.global.u32 [%1], %2;}" ::"r"(int(when)), "l"(to),
               "r"(word[0]));
#else
  if (when) std::memcpy(__builtin_assume_aligned(to, 4), word, 4);
#endif
}

// The slow way, for tails, strides and misaligned views: item by item, two codes of 4 bits at once. Calls
// f(address, bits, place in the words).
template <class F>
__device__ __forceinline__ void for_items(const Items& items, int64_t i, int count, F&& f) {
  const int bits = items.bits == 4 ? 8 : items.bits;
  const int64_t first = items.bits == 4 ? i / 2 : i;
  const int n = items.bits == 4 ? (count + 1) / 2 : count;
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    const int64_t offset = items.strides == nullptr ? first + k : offset_in(*items.strides, first + k);
    f(items.data + offset * (bits / 8), bits, k * bits);
  }
}

// `count` elements from i on, of up to kMost bits; the words of others are 0 or undefined.
template <int kMost>
__device__ __forceinline__ Words fetch(const Items& items, int64_t i, int count) {
  Words words = {};
  const bool wide = items.wide && count == kRun;
  const char* from = items.data + i / kRun * items.bits;
  load_128(wide && items.bits >= 16, from, words.word);
  if (kMost == 32) load_128(wide && items.bits == 32, from + 16, words.word + 4);
  load_64(wide && items.bits == 8, from, words.word);
  load_32(wide && items.bits == 4, from, words.word);
  if (!wide && items.bits != 0) {
    words = {};
    for_items(items, i, count, [&](const char* address, int bits, int at) {
      const uint32_t item = bits == 32   ? *reinterpret_cast<const uint32_t*>(address)
                            : bits == 16 ? *reinterpret_cast<const uint16_t*>(address)
                                         : *reinterpret_cast<const uint8_t*>(address);
      // Not words[at / 32]: registers have no addresses.
#pragma unroll
      for (int w = 0; w < kMost / 4; ++w) words.word[w] |= w == at / 32 ? item << at % 32 : 0u;
    });
  }
  return words;
}

template <int kMost>
__device__ __forceinline__ void put(const Items& items, int64_t i, int count, const Words& words) {
  const bool wide = items.wide && count == kRun;
  char* to = items.data + i / kRun * items.bits;
  store_128(wide && items.bits >= 16, to, words.word);
  if (kMost == 32) store_128(wide && items.bits == 32, to + 16, words.word + 4);
  store_64(wide && items.bits == 8, to, words.word);
  store_32(wide && items.bits == 4, to, words.word);
  if (!wide && items.bits != 0) {
    for_items(items, i, count, [&](char* address, int bits, int at) {
      uint32_t item = 0;
#pragma unroll
      for (int w = 0; w < kMost / 4; ++w) item |= words.word[w] >> at % 32 & (w == at / 32 ? 0xffffffffu : 0u);
      if (bits == 32)
        *reinterpret_cast<uint32_t*>(address) = item;
      else if (bits == 16)
        *reinterpret_cast<uint16_t*>(address) = uint16_t(item);
      else
        *reinterpret_cast<uint8_t*>(address) = uint8_t(item);
    });
  }
}

// Item k of a run; k is a constant after unrolling, so words stay in registers.
template <int kBits>
__device__ __forceinline__ uint32_t item(const Words& words, int k) {
  const uint32_t word = words.word[k * kBits / 32] >> k * kBits % 32;
  return word & (0xffffffffu >> (32 - kBits));
}
template <int kBits>
__device__ __forceinline__ void add_item(Words& words, int k, uint32_t x) {
  words.word[k * kBits / 32] |= (x & (0xffffffffu >> (32 - kBits))) << k * kBits % 32;
}

template <class F>
__device__ __forceinline__ float value_of(uint32_t stored) {
  if constexpr (sizeof(typename F::Stored) == 4)
    return float_of(stored);
  else
    return F::value(typename F::Stored(stored));
}
template <class T>
constexpr int kBitsOf = 8 * int(sizeof(T));

// What rounds stochastically is read like what does not.
PRECOND_INLINE constexpr Format read_as(Format format) {
  if (format == Format::bf16_stochastic) return Format::bf16;
  return format == Format::fp16_stochastic ? Format::fp16 : format;
}

// The values of a run: of a plain format, of a parameter with its remainder, of a state with its group's scale.
template <class F>
__device__ __forceinline__ void decode_plain(const Words& words, float* x) {
#pragma unroll
  for (int k = 0; k < kRun; ++k) x[k] = value_of<F>(item<kBitsOf<typename F::Stored>>(words, k));
}
__device__ __forceinline__ void decode_gradient(Format format, const Words& words, float* x) {
  with_plain_format(format, [&](auto as) { decode_plain<decltype(as)>(words, x); });
}
__device__ __forceinline__ void decode_weight(Format format, const Words& words, const Words& beside, float* x) {
  with_format(read_as(format), [&](auto as) {
    using F = decltype(as);
    if constexpr (F::kStoring == Storing::alone) {
      decode_plain<F>(words, x);
    } else if constexpr (F::kStoring == Storing::remainder) {
      using Remainder = typename F::Remainder;
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        x[k] = F::value(typename F::Stored(item<16>(words, k)), Remainder(item<kBitsOf<Remainder>>(beside, k)));
    }
  });
}
__device__ __forceinline__ void decode_state(Format format, const Words& words, uint32_t scale, float* x) {
  with_format(read_as(format), [&](auto as) {
    using F = decltype(as);
    if constexpr (F::kStoring == Storing::alone) {
      decode_plain<F>(words, x);
    } else if constexpr (F::kStoring == Storing::codes) {
      const float unit = F::unit(scale);
#pragma unroll
      for (int k = 0; k < kRun; ++k) x[k] = F::value(item<F::kCodeBits>(words, k), unit);
    }
  });
}

// The words that store values; `word` has the random bits of each element, `number` is which of its draws this is.
template <class F>
__device__ __forceinline__ Words encode_alone(const float* x, const uint32_t* word, int number) {
  Words words = {};
#pragma unroll
  for (int k = 0; k < kRun; k += 2) {
    if constexpr (F::kStoring == Storing::drawn) {
      add_item<16>(words, k, F::stored(x[k], draws_of(number)(word[k])));
      add_item<16>(words, k + 1, F::stored(x[k + 1], draws_of(number)(word[k + 1])));
    } else if constexpr (sizeof(typename F::Stored) == 4) {
      words.word[k] = bits_of(x[k]);
      words.word[k + 1] = bits_of(x[k + 1]);
    } else {
      words.word[k / 2] = F::stored_both(x[k], x[k + 1]);
    }
  }
  return words;
}
__device__ __forceinline__ Words encode_weight(Format format, const float* x, const uint32_t* word, Words& beside) {
  Words words = {};
  with_format(format, [&](auto as) {
    using F = decltype(as);
    if constexpr (F::kStoring == Storing::remainder) {
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const auto split = F::split(x[k], draws_of(0)(word[k]));
        add_item<16>(words, k, split.stored);
        add_item<kBitsOf<typename F::Remainder>>(beside, k, uint32_t(split.remainder));
      }
    } else if constexpr (F::kStoring != Storing::codes) {
      words = encode_alone<F>(x, word, 0);
    }
  });
  return words;
}

// Of the lanes of a group. Every lane of the warp must come here.
__device__ __forceinline__ uint32_t top_of_group(uint32_t top) {
#pragma unroll
  for (int lanes = 1; lanes < kGroupLanes; lanes *= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, top, lanes);
    top = other > top ? other : top;
  }
  return top;
}
// The largest bits of a magnitude among them.
__device__ __forceinline__ uint32_t top_of_group(const float* x) {
  uint32_t top = 0;
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const uint32_t magnitude = bits_of(x[k]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  return top_of_group(top);
}
// `scale` becomes that of the group. Elements after `count` must not count: they are made 0.
__device__ __forceinline__ Words encode_state(Format format, const float* values, int count, const uint32_t* word,
                                              int number, uint32_t& scale) {
  Words words = {};
  with_format(format, [&](auto as) {
    using F = decltype(as);
    if constexpr (F::kStoring == Storing::codes) {
      float x[kRun];
#pragma unroll
      for (int k = 0; k < kRun; ++k) x[k] = k < count ? values[k] : 0.0f;
      const Group group = F::group(top_of_group(x));
      scale = group.scale;
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        add_item<F::kCodeBits>(words, k, F::code(x[k], group, draws_of(number).placed(word[k])));
    } else if constexpr (F::kStoring != Storing::remainder) {
      words = encode_alone<F>(values, word, number);
    }
  });
  return words;
}

// A run of values, and of what encodes it with its group's scale: to be returned from functions.
struct Run {
  float x[kRun];
};
struct Encoded {
  Words words;
  uint32_t scale;
};
#if defined(__CUDACC__)
#define PRECOND_APART static __device__ __noinline__
#else
#define PRECOND_APART static inline
#endif
// The same as functions of their own, for kernels with parts: inlined for each state they take the compiler most of its
// time, and there is such a kernel for every rule.
PRECOND_APART Run decode_state_apart(Format format, Words words, uint32_t scale) {
  Run run = {};
  decode_state(format, words, scale, run.x);
  return run;
}
PRECOND_APART Encoded encode_state_apart(Format format, Run run, int count, Words random, int number, uint32_t scale) {
  Encoded encoded = {{}, scale};
  encoded.words = encode_state(format, run.x, count, random.word, number, encoded.scale);
  return encoded;
}

// A word of random bits for each element of a run.
__device__ __forceinline__ void fill_random(Seed seed, const Place& place, int64_t i, uint32_t* word) {
  uint64_t index = uint64_t(place.index(i));
  int64_t left = place.left_in_row(i);
  if (index % kRun == 0 && left >= kRun) {
    // One hash for all: what nearly every run takes.
    const uint64_t run = index / kRun;
    const uint32_t hash = hashed(seed, uint32_t(run), uint32_t(run >> 32));
#pragma unroll
    for (int k = 0; k < kRun; ++k) word[k] = hash * odd(k);
    return;
  }
#pragma unroll 1
  for (int k = 0; k < kRun; ++k) {
    const uint64_t run = index / kRun;
    const uint32_t next = hashed(seed, uint32_t(run), uint32_t(run >> 32)) * odd(int(index % kRun));
#pragma unroll
    for (int w = 0; w < kRun; ++w) word[w] = w == k ? next : word[w];
    ++index;
    if (--left == 0) {
      index += uint64_t(place.row_step - place.row);
      left = place.row;
    }
  }
}

}  // namespace PRECOND_ISA
}  // namespace precond
