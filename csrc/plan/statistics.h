// What a step finds out about each tensor while it updates it: sums over its elements, of numbers that are there
// anyway.
#pragma once

#include <vector>

#include "plan/norm.h"
#include "plan/plan.h"

namespace precond {

// Of a tensor's elements, with g as its rule takes it and p before the step: sums in fp64 of products that are exact
// there, counts, and a magnitude. `taken` is what p lacks after the step before it is rounded (decays.h), and `arrived`
// what it lacks as it is stored.
enum Statistic {
  kGradSquares,
  kParamSquares,
  kUpdateSquares,
  kUpdateGrad,     // taken times g
  kUpdateArrived,  // taken times arrived
  kNonfinite,      // of g
  kLost,           // taken is not 0, and p is stored as it was
  kLargestUpdate,
  kBlockStatistics,
  kElements = kBlockStatistics,
  kStatistics
};
constexpr int kStatisticSums = kUpdateArrived + 1;

// They are added in one order, whatever the threads, chunks and backend, as a norm is (norm.h), with fewer lanes: five
// sums then fit into a first cache. A block is kNormBlock elements in visiting order; its elements go to lanes by their
// index modulo kStatisticLanes; each lane adds its own in order; the lanes are added by halves, i and i + n / 2. The
// blocks of a tensor are added in the same way.
constexpr int kStatisticLanes = 256;

// What a step does besides updating. Addresses are on the plan's device.
struct Extras {
  // kStatistics for each parameter, which the step writes; null: none. Only rules with parts have them, parts.h.
  double* sums = nullptr;
  // Of each parameter, what its update is multiplied with; null: 1. Only rules with parts have it.
  const float* factors = nullptr;
  // Nothing else is written, and an update is what it is without a decay.
  bool only = false;
};

// Of each tensor the first of its blocks among all; -1 without a gradient in this step. The last one is their number.
std::vector<int64_t> statistic_blocks(const Plan& plan);

inline namespace PRECOND_ISA {

PRECOND_INLINE double combined_statistic(int which, double a, double b) {
  return which == kLargestUpdate ? larger(a, b) : a + b;
}
// From the bits of the largest magnitude of floats, in the order of the numbers; NaN is above all.
PRECOND_INLINE double magnitude_of_bits(uint32_t most) {
  return double(float_of(most > 0x7f800000u ? 0x7fc00000u : most));
}

}  // namespace PRECOND_ISA
}  // namespace precond
