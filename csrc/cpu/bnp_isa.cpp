// Compiled once per instruction set, with PRECOND_ISA naming it: one row of bnp.h's transform.
#include "base/arithmetic.h"
#include "cpu/bnp.h"

namespace precond {
inline namespace PRECOND_ISA {

// Partial sums, by the column modulo kBnpLanes, then added by halves: one order everywhere. So many hide the latency of
// a fused multiply-add: a row costs what copying it does.
constexpr int kBnpLanes = 64;

// g - mean * bias_grad, divided by q2 s2, and its product with the mean added to `sum`.
PRECOND_INLINE float bnp_element(float g, float bias_grad, float mean, float scale, float& sum) {
  const float out = fma(-mean, bias_grad, g) * scale;
  sum = fma(out, mean, sum);
  return out;
}

static float bnp_row(const float* __restrict g, float bias_grad, const float* __restrict mean,
                     const float* __restrict scale, int64_t length, float* __restrict out) {
  float sum[kBnpLanes] = {};
  const int64_t whole = length / kBnpLanes * kBnpLanes;
  for (int64_t j = 0; j < whole; j += kBnpLanes) {
#pragma omp simd
    for (int lane = 0; lane < kBnpLanes; ++lane)
      out[j + lane] = bnp_element(g[j + lane], bias_grad, mean[j + lane], scale[j + lane], sum[lane]);
  }
  for (int64_t j = whole; j < length; ++j) out[j] = bnp_element(g[j], bias_grad, mean[j], scale[j], sum[j - whole]);
  for (int half = kBnpLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

extern const BnpRow kBnpRow;
const BnpRow kBnpRow = &bnp_row;

}  // namespace PRECOND_ISA
}  // namespace precond
