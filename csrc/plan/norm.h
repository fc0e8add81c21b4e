// The norm of all gradients of a step, and what the step makes of it: a coefficient, or nothing at all.
#pragma once

#include <vector>

#include "plan/plan.h"

namespace precond {

// Squares of stored gradients are exact in fp64. They are added in one order, whatever the threads, chunks and backend:
// a block is kNormBlock elements of a tensor in visiting order; its elements go to lanes by their index modulo
// kNormLanes; each lane adds its own in order; the lanes are added by halves, i and i + n / 2. The sums of the blocks,
// tensor after tensor, are added in the same way, by blocks, until one is left. A lane without elements adds 0, which
// changes nothing.
constexpr int64_t kNormBlock = 8192, kNormLanes = 1024;

// What a step does with the norm. Addresses are on the plan's device.
struct Clip {
  double* total = nullptr;  // sum of squares, or largest magnitude, of the stored gradients; null: no norm in this step
  float* grad_norm = nullptr;  // results of the step; null where another plan of the same step writes them
  float* clip_coef = nullptr;
  int64_t* skipped = nullptr;
  float max_norm = 0.0f;
  int32_t classes = 1;         // numbers at `total`: one per Tensor::norm_class
  int32_t inf = 0;             // largest magnitude instead of the square root of the sum of squares
  int32_t skip_nonfinite = 0;  // a norm that is not finite skips the step
  int32_t measure = 0;         // the step fills `total` first
};

// Where the sums of a tensor's blocks are in the table that is added up: class by class, tensors in the plan's order.
struct NormTable {
  std::vector<int64_t> first;  // of each tensor; -1 without a gradient in this step
  std::vector<int64_t> begin;  // of each class, and the end of the last
};
NormTable norm_table(const Plan& plan, int classes);

inline namespace PRECOND_ISA {

// Bits of a magnitude in fp64, in the order of the numbers, with NaN above all.
PRECOND_INLINE uint64_t magnitude(double x) {
  uint64_t u;
  std::memcpy(&u, &x, sizeof u);
  return x != x ? uint64_t(0x7ff8000000000000u) : u & 0x7fffffffffffffffu;
}
PRECOND_INLINE double larger(double a, double b) {
  const uint64_t u = magnitude(a), v = magnitude(b), most = u > v ? u : v;
  double x;
  std::memcpy(&x, &most, sizeof x);
  return x;
}

// The last step of a norm, from control.grad_coef, which is 1 / loss scale, and control.skip as the scaler set it. The
// coefficient is that of torch.nn.utils.clip_grad_norm_.
PRECOND_INLINE void finish(const Clip& clip, Control* control) {
  if (clip.total != nullptr) {
    const double total = *clip.total;
    const float norm = float((clip.inf ? total : ::sqrt(total)) * double(control->grad_coef));
    const bool finite = norm - norm == 0.0f;
    float coef = clip.max_norm / (norm + 1e-6f);
    coef = coef > 1.0f || clip.max_norm == HUGE_VALF ? 1.0f : coef;
    control->grad_coef *= coef;
    if (clip.skip_nonfinite && !finite) control->skip = 1.0f;
    if (clip.grad_norm != nullptr) *clip.grad_norm = norm;
    if (clip.clip_coef != nullptr) *clip.clip_coef = coef;
  }
  if (control->skip != 0.0f && clip.skipped != nullptr) *clip.skipped += 1;
}

}  // namespace PRECOND_ISA
}  // namespace precond
