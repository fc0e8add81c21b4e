// One tensor of any rule, formats and alignment, for the tests of the CUDA sources.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>

#include "problem.h"

namespace {

// One tensor of a rule in given formats; memory in bytes, so that formats and alignment are free.
struct Any {
  std::vector<std::pair<Buffer<char>, int64_t>> memory;  // and the bytes before what is the tensor's
  Tensor tensor;
  float step = 0.0f, scalar = 1.0f;

  char* bytes(int64_t n, int64_t before) {
    memory.emplace_back(Buffer<char>(n + before), before);
    std::memset(memory.back().first.address(), 0, size_t(n + before));
    return memory.back().first.address() + before;
  }
};

// An operand of random values or of zeros. Codes and remainders of zeros are zeros; remainders of values are any.
Operand operand(Any* any, int64_t n, Format format, bool zero, int misalign, std::mt19937* random) {
  std::normal_distribution<float> normal;
  Operand o;
  o.format = format;
  with_format(format, [&](auto as) {
    using As = decltype(as);
    if constexpr (As::kStoring == Storing::codes) {
      o.data = any->bytes((n * As::kCodeBits + 7) / 8, misalign);
      o.beside = any->bytes((n + kGroup - 1) / kGroup * 2, 2 * misalign);
    } else {
      const int64_t size = sizeof(typename As::Stored);
      o.data = any->bytes(n * size, misalign * size);
      for (int64_t i = 0; i < n && !zero; ++i) {
        const float x = normal(*random);
        typename As::Stored stored = {};
        if constexpr (As::kStoring == Storing::alone)
          stored = As::stored(x);
        else
          std::memset(&stored, 0x3c + int(i % 3), sizeof stored);
        std::memcpy(o.data + size * i, &stored, size_t(size));
      }
      if constexpr (As::kStoring == Storing::remainder) {
        const int64_t beside = sizeof(typename As::Remainder);
        o.beside = any->bytes(n * beside, misalign * beside);
        for (int64_t i = 0; i < n * beside; ++i) o.beside[i] = char((*random)());
      }
    }
  });
  return o;
}

std::unique_ptr<Any> make(int rule, int64_t n, Format p, Format g, std::vector<Format> states, int misalign,
                          unsigned seed) {
  auto any = std::make_unique<Any>();
  std::mt19937 random(seed);
  Tensor& t = any->tensor;
  t.rule = rule;
  t.numel = n;
  t.active = true;
  t.fresh = true;
  t.p = operand(any.get(), n, p, false, misalign, &random);
  t.g = operand(any.get(), n, g, false, misalign, &random);
  bool plain = is_plain(p);
  for (int k = 0; k < rules()[size_t(rule)].states; ++k) {
    const Format format = states[size_t(k) % states.size()];
    t.state[k] = operand(any.get(), n, format, true, misalign, &random);
    plain = plain && is_plain(format);
  }
  t.step = &any->step;
  if (rules()[size_t(rule)].scalar_states != 0) t.scalar = &any->scalar;
  t.draws = !plain;
  t.key = seed + 1;
  return any;
}

[[maybe_unused]] int fails(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}

[[maybe_unused]] bool same_memory(const Any& a, const Any& b) {
  if (a.scalar != b.scalar) return false;
  for (size_t i = 0; i < a.memory.size(); ++i) {
    const auto& [ours, before] = a.memory[i];
    const auto& [theirs, same_before] = b.memory[i];
    CHECK(before == same_before);
    if (std::memcmp(ours.data.get() + before, theirs.data.get() + before, size_t(ours.size - before)) != 0)
      return false;
  }
  return true;
}

}  // namespace
