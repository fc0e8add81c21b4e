// A number that a parameter's state holds as a tensor of one element: its step counter, or a scalar state. Whoever made
// that tensor chose its dtype; it is read and advanced in place, on the host and on a device alike.
#pragma once

#include <cmath>

#include "base/arithmetic.h"

namespace precond {

enum class NumberType : int32_t { fp32, fp64, int32, int64 };

struct Number {
  Number() = default;
  Number(float* address) : data(address) {}
  Number(void* address, NumberType stored_as) : data(address), type(stored_as) {}
  explicit operator bool() const { return data != nullptr; }

  void* data = nullptr;  // null: none is kept
  NumberType type = NumberType::fp32;
};

inline namespace PRECOND_ISA {

PRECOND_INLINE double read_number(const void* data, NumberType type) {
  if (type == NumberType::fp64) return *static_cast<const double*>(data);
  if (type == NumberType::int32) return double(*static_cast<const int32_t*>(data));
  if (type == NumberType::int64) return double(*static_cast<const int64_t*>(data));
  return double(*static_cast<const float*>(data));
}

// As it will be read again.
PRECOND_INLINE double rounded_number(NumberType type, double x) {
  return type == NumberType::fp32 ? double(float(x)) : x;
}

PRECOND_INLINE void write_number(void* data, NumberType type, double x) {
  if (type == NumberType::fp64)
    *static_cast<double*>(data) = x;
  else if (type == NumberType::int32)
    *static_cast<int32_t*>(data) = x < 0x1p31 ? int32_t(x) : INT32_MAX;
  else if (type == NumberType::int64)
    *static_cast<int64_t*>(data) = x < 0x1p63 ? int64_t(x) : INT64_MAX;
  else
    *static_cast<float*>(data) = float(x);
}

// A counter after one more step. A float that 1 no longer moves, fp32 from 2^24 on, goes to the next one that there is:
// random bits, which depend on it, would otherwise be the same in every step.
PRECOND_INLINE double next_step(NumberType type, double step) {
  if (type == NumberType::fp32) {
    const float now = float(step), next = now + 1.0f;
    return double(next == now && now > 0.0f && now < HUGE_VALF ? float_of(bits_of(now) + 1u) : next);
  }
  const double next = step + 1.0;
  if (type == NumberType::int32) return next < 0x1p31 ? next : step;
  if (next != step || !(step > 0.0 && step < HUGE_VAL)) return next;
  uint64_t u;
  std::memcpy(&u, &step, sizeof u);
  ++u;
  double x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

}  // namespace PRECOND_ISA
}  // namespace precond
