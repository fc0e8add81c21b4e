// How a thread treats denormals: as IEEE says, while it runs for a plan.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace precond {

// IEEE denormals while scalars are rounded to fp32 and while a worker runs; torch.set_flush_denormal(True) would
// otherwise change our bits.
class IeeeDenormals {
 public:
#if defined(__SSE2__)
  IeeeDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~IeeeDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~((uint64_t(1) << 24) | (uint64_t(1) << 19))));
  }
  ~IeeeDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace precond
