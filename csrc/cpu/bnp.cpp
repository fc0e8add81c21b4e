// The rows of bnp.h's transform in one parallel region.
#include "cpu/bnp.h"

#include "base/denormals.h"
#include "cpu/dispatch.h"

namespace precond {

// Below this many elements one thread is quicker than waking a second one.
constexpr int64_t kSerialElements = 32768;

void precondition(const BnpGradients& of, int threads) {
  const BnpRow row = bnp_function();
  if (of.rows * of.length < kSerialElements) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const IeeeDenormals ieee;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < of.rows; ++i) {
      const int64_t statistics = i / of.rows_per_group * of.length;
      const float moved = row(of.weight_grad + i * of.length, of.bias_grad[i], of.mean + statistics,
                              of.scale + statistics, of.length, of.weight_out + i * of.length);
      of.bias_out[i] = of.bias_grad[i] * of.inv_q2 - moved;
    }
  }
}

}  // namespace precond
